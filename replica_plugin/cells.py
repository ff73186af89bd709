"""The page of a process: what each of its slots does, or did, for the dispatcher to see."""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import time

from .pages import create, keeps_its_size

STALL = 1.0  # seconds after which a hub that has not turned counts as stalled
_STACKS = 1 << 16  # bytes of stacks that are read

DUMP = signal.SIGRTMIN + 7
"""Has a process write the stacks of its threads behind its cells, though the GIL is held."""


class Cells:
    """One cell a slot: the request it has, and how far it is.

    It is written by that slot; in its place by the attendant, if that has the claim to the response
    (overdue.py), for which the slot then waits.

    A cell is one aligned 64-bit word, so a process that dies leaves each either old or new. Two
    more words follow: in gevent mode the process says in one when its hub turned last; in the
    other one the dispatcher says that it answers in place of all slots. Then comes a byte for each
    slot: whether its response is complete. Behind them is what the process has written at DUMP.

    A response has one writer. Its process says that it answers, then looks whether it still may;
    the dispatcher takes that right away, and looks who answers already in a later turn. So at most
    one of them finds that it is the one.
    """

    def __init__(self, slots: int, fd: int | None = None) -> None:
        """Raises OSError or ValueError for a descriptor of another process that is no page."""
        if fd is not None and not keeps_its_size(fd):
            raise ValueError("no memory that keeps its size")
        self._complete_at = (slots + 2) * 8
        self._size = self._stacks_at = self._complete_at + slots
        self.fd = create("cells", self._size) if fd is None else fd
        self._use(mmap.mmap(self.fd, self._size))

    def _use(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._words = memoryview(memory)[: self._complete_at].cast("Q")

    def part(self) -> None:
        """In a child that the app has forked: what its copies of the slots write, nobody sees."""
        alone = mmap.mmap(-1, self._size)
        alone[:] = self._memory[:]
        self._use(alone)

    def close(self) -> None:
        """Give the memory back; the descriptor is its owner's to close."""
        self._words.release()
        self._memory.close()

    def begin(self, slot: int, request: int) -> None:
        """The slot has taken the request, and has not read from its socket yet."""
        self._words[slot] = request << 2

    def take(self, slot: int) -> None:
        """The slot, done with its request, is about to take another off the deck (deck.py); until
        it has reported both it has this mark."""
        self._words[slot] |= 2

    def is_taking(self) -> bool:
        """Whether a slot has that mark."""
        return any(word & 2 for word in self._words[:-2])

    def answering(self, slot: int) -> bool:
        """The first byte of the slot's response is about to be written; whether it may be."""
        self._words[slot] |= 1
        return not self._words[-1]

    def complete(self, slot: int) -> None:
        """All of the slot's response is there, and its last byte may be written from now on."""
        self._memory[self._complete_at + slot] = 1

    def ending(self) -> int:
        """How many slots have such a response, and have not reported it."""
        return self._memory[self._complete_at : self._size].count(1)

    def silence(self) -> None:
        """No slot that has not begun its response may begin one."""
        self._words[-1] = 1

    def end(self, slot: int) -> None:
        """The slot has reported the request, and has none."""
        self._words[slot] = 0
        self._memory[self._complete_at + slot] = 0

    def begun(self) -> dict[int, bool]:
        """Request number to whether its response may have begun, for every busy slot."""
        return {word >> 2: bool(word & 1) for word in self._words[:-2] if word}

    def turn(self) -> None:
        """The hub turns."""
        self._words[-2] = time.monotonic_ns()

    def has_stalled(self, now: float) -> bool:
        """Whether there is a hub, and it has not turned for STALL."""
        turned: int = self._words[-2]
        return turned > 0 and now - turned / 1e9 > STALL

    def await_dump(self) -> None:
        """Called in a process's main thread: from now on DUMP has stacks written here.

        By a signal handler in C, which waits for no GIL; the descriptor stays open for it.
        """
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_APPEND)
        except OSError:  # no /proc: nobody will know, then
            signal.signal(DUMP, signal.SIG_IGN)
        else:
            faulthandler.register(DUMP, fd, all_threads=True)

    def expect_stacks(self) -> None:
        """DUMP is about to be sent: what was written at an earlier one does not count any more."""
        self._stacks_at = os.fstat(self.fd).st_size

    def stacks(self) -> str:
        """What was written since."""
        return os.pread(self.fd, _STACKS, self._stacks_at).decode("utf-8", "replace")
