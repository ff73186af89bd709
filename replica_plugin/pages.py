"""Memory that processes share: who writes which page, and how a reader knows it is whole.

    page          writer      readers
    MasterPage    master      supervisor, dispatcher: the settings, and what the master wants
    ReplicaPage   dispatcher  supervisor, its own successor, anyone who asks for numbers
    LoadPage      processes   themselves, master: who has loaded the app; a word each time
    Cells         process     dispatcher: what its slots do (cells.py)

Each page has one writer at a time and outlives it, which is the point: what a dead process
knew is still there. A page is an anonymous file (memfd), passed on as a descriptor.

Words that are read without a checksum are written by assigning whole bytes: `pack_into` makes
zeros of what it is about to write, and a reader who comes in between would see a heart that
stopped at 0.

Processes run the app, so what they inherit of master and dispatcher they can only read, and no
page can be made smaller: whoever looked at it then would be killed (SIGBUS).
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

_BLOB = struct.Struct("=QII")  # turn; length and checksum of the JSON text that follows
_LOOKS = 100  # at a page on which something is written all the time
_MASTER_SIZE = 1 << 21  # the longest settings fit (config/values.py, master.py)
_TABLE_OFFSET = 256
_REPLICA_SIZE = 1 << 16
_LOAD_SIZE = 1 << 14
_NOTES = 1 << 20  # the byte that is locked by whoever takes a note; the others are turns
_NOTE_TIME = 1.0  # seconds to wait for it: its holder waits for nothing, but may be stopped
_MOMENT = 0.001
_NUMBERS = struct.Struct("@dQQQQQQQQQQ")  # native: each number is one aligned word
_LOCK = struct.Struct("@hhqqi0q")  # struct flock: type, whence, start, length, pid


def create(name: str, size: int) -> int:
    """A new page of zeros; its descriptor. Nobody else can open it, and nobody make it smaller."""
    fd = os.memfd_create(f"replica-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def keeps_its_size(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # a file, a pipe, a socket
        return False


def _to_read(fd: int) -> int:
    """A descriptor of the same page with which it can only be read."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no /proc: then at least no stray write gets through a mapping
        return os.dup(fd)


def _locked_by(fd: int, start: int, length: int) -> int:
    """The pid of the process that has locked these bytes, to the end with a length of 0; 0 if
    none, or the caller, has."""
    ask = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    kind, *_, pid = _LOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, ask))
    return 0 if kind == fcntl.F_UNLCK else int(pid)


class _Blob:
    """A JSON value in shared memory, in two places of which the older one is written.

    So there always is a whole one, also when the writer dies. Where a write is under way, or was
    left so, the checksum is wrong.
    """

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._room = (len(memory) - offset) // 2 - _BLOB.size
        self._starts = (offset, offset + _BLOB.size + self._room)
        self._memory = memory

    def move(self, memory: mmap.mmap) -> None:
        """The same page is mapped in another way."""
        self._memory = memory

    def write(self, value: Any) -> None:
        text = json.dumps(value).encode()
        if len(text) > self._room:
            raise ValueError(f"{len(text)} bytes do not fit where {self._room} do")
        turn = self._newest()[0] + 1
        start = self._starts[turn % 2]
        self._memory[start + _BLOB.size : start + _BLOB.size + len(text)] = text
        header = _BLOB.pack(turn, len(text), zlib.crc32(text))
        self._memory[start : start + _BLOB.size] = header

    def read(self) -> Any | None:
        """The value, or None if there is none, or each look took longer than a write."""
        for _ in range(_LOOKS):
            headers = self._headers()
            _, text = self._newest()
            if self._headers() == headers:
                return json.loads(text) if text else None
        return None

    def _headers(self) -> list[bytes]:
        return [self._memory[start : start + _BLOB.size] for start in self._starts]

    def _newest(self) -> tuple[int, bytes]:
        return max(map(self._look, self._starts))

    def _look(self, start: int) -> tuple[int, bytes]:
        turn, length, checksum = _BLOB.unpack_from(self._memory, start)
        text = self._memory[start + _BLOB.size : start + _BLOB.size + length]
        return (turn, text) if text and zlib.crc32(text) == checksum else (0, b"")


class _Page:
    """A page of which a process that runs the app gets no more than the right to read."""

    def __init__(self, name: str, size: int, fd: int | None, offset: int) -> None:
        self.fd = create(name, size) if fd is None else fd
        self._memory = mmap.mmap(self.fd, size)
        self._blob = _Blob(self._memory, offset)

    def only_read(self) -> None:
        """From now on this process does not write the page, not by mistake either."""
        before, self.fd = self.fd, _to_read(self.fd)
        memory = mmap.mmap(self.fd, len(self._memory), prot=mmap.PROT_READ)
        self._blob.move(memory)
        self._memory.close()
        self._memory = memory
        os.close(before)


class MasterPage(_Page):
    """What the master knows, as state. Written by the master only; followed by a nudge."""

    def __init__(self, fd: int | None = None) -> None:
        super().__init__("master", _MASTER_SIZE, fd, 0)

    def write(self, state: Mapping[str, Any]) -> None:
        self._blob.write(state)

    def read(self) -> dict[str, Any] | None:
        """The state; None if it was written too fast to see: look again after the nudge."""
        state: dict[str, Any] | None = self._blob.read()
        return state


class Numbers(NamedTuple):
    """The replica in numbers.

    `beat` is the monotonic time of the dispatcher's last turn; infinity once it has ended well.
    `unsent` are bytes of responses that slots have left to the dispatcher. `spared` counts, since
    the start of the replica, the requests that overload_dry_run has let in. `short` is 1 while the
    dispatcher has no descriptor to spare, and is to be left no more such responses.
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
    short: int = 0


_LOAD = struct.Struct("@QQ")  # waiting and running, which are neighbours
_LOAD_OFFSET = 8 * Numbers._fields.index("waiting")
_NOTHING = bytes(8)


class ReplicaPage(_Page):
    """What the dispatcher knows. Written by the dispatcher that lives; read by its successor.

    Which one lives is the kernel's knowledge: it holds a lock on the page, from its birth to
    its death. So there are never two, and a pid that came back is not taken for it.
    """

    def __init__(self, fd: int | None = None) -> None:
        super().__init__("numbers", _REPLICA_SIZE, fd, _TABLE_OFFSET)

    def claim(self) -> bool:
        """Become the one that lives; False if another does.

        The lock ends with the process, or when it closes any descriptor of the page.
        """
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def find_living(self) -> tuple[int, int] | None:
        """Pid and pidfd of the dispatcher that lives, unless that is the caller."""
        while pid := _locked_by(self.fd, 0, 0):
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                # If it still has it, it is this process, which the pidfd now keeps apart.
                if _locked_by(self.fd, 0, 0) == pid:
                    return pid, pidfd
                os.close(pidfd)
        return None

    def write(self, numbers: Numbers) -> None:
        self._memory[: _NUMBERS.size] = _NUMBERS.pack(*numbers)

    def read(self) -> Numbers:
        return Numbers(*_NUMBERS.unpack_from(self._memory, 0))

    def write_load(self, waiting: int, running: int) -> None:
        """Two of the numbers, ahead of the others: a request that begins finds itself counted."""
        self._memory[_LOAD_OFFSET : _LOAD_OFFSET + _LOAD.size] = _LOAD.pack(waiting, running)

    def something_waits(self) -> bool:
        """Whether a request waits, as far as has been written."""
        return self._memory[_LOAD_OFFSET : _LOAD_OFFSET + 8] != _NOTHING

    def write_table(self, rows: list[tuple[int, int, int]]) -> None:
        """Every registered process: its age, how many of its slots may be busy, its pid."""
        self._blob.write(rows)

    def read_table(self) -> list[tuple[int, int, int]]:
        return [(age, slots, pid) for age, slots, pid in self._blob.read() or []]


class LoadPage:
    """Who has loaded the app. Written by the processes that load it, a word at a time.

    The words: how often it has been loaded; and the ages of those that have it, in no order. A
    process that dies leaves each word old or new. Locks end with the process that holds them.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = create("load", _LOAD_SIZE) if fd is None else fd
        self._memory = mmap.mmap(self.fd, _LOAD_SIZE)
        self._words = memoryview(self._memory).cast("Q")

    def close(self) -> None:
        """The process has loaded the app, and has nothing more to say here."""
        self._words.release()
        self._memory.close()
        os.close(self.fd)

    @property
    def was_loaded(self) -> bool:
        """Whether a process has ever had it; one that is through with this page has."""
        return self._memory.closed or self.loads > 0

    @property
    def loads(self) -> int:
        """How often it has been loaded."""
        return self._words[0]

    def take_turn(self, lane: int) -> bool:
        """Take the turn to load the app, if nobody else has it; there is one in each lane."""
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, lane)
        except OSError:
            return False
        return True

    def whose_turn(self, lane: int) -> int:
        """The pid of the process that has it; 0 if none, or the caller, has."""
        return _locked_by(self.fd, lane, 1)

    def end_turn(self, lane: int) -> None:
        fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, lane)

    def loaded(self, live: Iterable[int]) -> set[int]:
        """The ages of the processes, of these, that have the app loaded."""
        return set(self._words[1:]) & set(live)

    def note_loaded(self, age: int, live: Iterable[int]) -> None:
        others = set(live)
        with self._noting():
            free = (n for n, each in enumerate(self._words[1:], 1) if each not in others)
            self._words[next(free)] = age
            self._words[0] += 1

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """One at a time; but in the end rather beside another than never."""
        until = time.monotonic() + _NOTE_TIME
        while not self.take_turn(_NOTES) and time.monotonic() < until:
            time.sleep(_MOMENT)
        try:
            yield
        finally:
            self.end_turn(_NOTES)
