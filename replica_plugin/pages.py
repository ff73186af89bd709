"""Memory that processes share: who writes which page, and how a reader knows it is whole.

    page          writer      readers
    MasterPage    master      supervisor, dispatcher: the settings, and what the master wants
    ReplicaPage   dispatcher  supervisor, its own successor, anyone who asks for numbers
    Cells         process     dispatcher: one cell a slot, what it does with which request

Each page has one writer at a time and outlives it, which is the point: what a dead process
knew is still there. A page is an anonymous file (memfd), passed on as a descriptor.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

_BLOB = struct.Struct("=II")  # length and checksum of the JSON text that follows
_MASTER_SIZE = 1 << 20
_TABLE_OFFSET = 256
_REPLICA_SIZE = 1 << 16
_NUMBERS = struct.Struct("@dQQQQQQQQQ")  # native: each number is one aligned word


def create(name: str, size: int) -> int:
    """A new page of zeros; its descriptor."""
    fd = os.memfd_create(f"replica-{name}", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


class _Blob:
    """A JSON value in shared memory. A reader in the middle of a write sees a wrong checksum."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._memory = memory
        self._offset = offset

    def write(self, value: Any) -> None:
        text = json.dumps(value).encode()
        start = self._offset + _BLOB.size
        if start + len(text) > len(self._memory):
            raise ValueError(f"{len(text)} bytes do not fit a page of {len(self._memory)}")
        self._memory[start : start + len(text)] = text
        _BLOB.pack_into(self._memory, self._offset, len(text), zlib.crc32(text))

    def read(self) -> Any | None:
        """The value, or None if nothing whole is there (never written, or being written)."""
        length, checksum = _BLOB.unpack_from(self._memory, self._offset)
        start = self._offset + _BLOB.size
        text = self._memory[start : start + length]
        return json.loads(text) if text and zlib.crc32(text) == checksum else None


class MasterPage:
    """What the master knows, as state. Written by the master only; followed by a nudge."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = create("master", _MASTER_SIZE) if fd is None else fd
        self._blob = _Blob(mmap.mmap(self.fd, _MASTER_SIZE), 0)

    def write(self, state: Mapping[str, Any]) -> None:
        self._blob.write(state)

    def read(self) -> dict[str, Any] | None:
        """The state, or None while it is being written: look again after the nudge."""
        state: dict[str, Any] | None = self._blob.read()
        return state


class Numbers(NamedTuple):
    """The replica in numbers. `beat` is the monotonic time of the dispatcher's last turn.

    `unsent` are bytes of responses that slots have left to the dispatcher. `spared` counts, since
    the start of the replica, the requests that overload_dry_run has let in.
    """

    beat: float = 0.0
    was_ready: int = 0
    processes: int = 0
    slots: int = 0
    waiting: int = 0
    running: int = 0
    bound: int = 0
    connections: int = 0
    unsent: int = 0
    spared: int = 0


class ReplicaPage:
    """What the dispatcher knows. Written by the dispatcher that lives; read by its successor."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = create("numbers", _REPLICA_SIZE) if fd is None else fd
        self._memory = mmap.mmap(self.fd, _REPLICA_SIZE)
        self._table = _Blob(self._memory, _TABLE_OFFSET)

    def write(self, numbers: Numbers) -> None:
        _NUMBERS.pack_into(self._memory, 0, *numbers)

    def read(self) -> Numbers:
        return Numbers(*_NUMBERS.unpack_from(self._memory, 0))

    def write_table(self, rows: list[tuple[int, int, int]]) -> None:
        """Age, slots and pid of every registered process."""
        self._table.write(rows)

    def read_table(self) -> list[tuple[int, int, int]]:
        return [(age, slots, pid) for age, slots, pid in self._table.read() or []]


class Cells:
    """One cell a slot, written by that slot only: the request it has, and how far it is.

    A cell is one aligned 64-bit word, so a process that dies leaves each either old or new.
    """

    def __init__(self, slots: int, fd: int | None = None) -> None:
        size = max(1, slots) * 8
        self.fd = create("cells", size) if fd is None else fd
        self._memory = mmap.mmap(self.fd, size)
        self._words = memoryview(self._memory).cast("Q")

    def close(self) -> None:
        """Give the memory back; the descriptor is its owner's to close."""
        self._words.release()
        self._memory.close()

    def begin(self, slot: int, request: int) -> None:
        """The slot has taken the request, and has not read from its socket yet."""
        self._words[slot] = request << 1

    def answering(self, slot: int) -> None:
        """The next thing the slot does is to write the first byte of the response."""
        self._words[slot] |= 1

    def end(self, slot: int) -> None:
        """The slot has reported the request, and has none."""
        self._words[slot] = 0

    def begun(self) -> dict[int, bool]:
        """Request number to whether its response may have begun, for every busy slot."""
        return {word >> 1: bool(word & 1) for word in self._words if word}
