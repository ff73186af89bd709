"""The cap of one process where no dispatcher keeps it: a first-in-first-out semaphore.

1. At most `slots` are inside. A slot that is left goes straight to the first who waits, so
   nobody overtakes.
2. At most `bound` are inside or waiting; the next is refused at once.
3. Whoever waits leaves the queue in one way: with a slot, or at its deadline without one.

The race of 3, in steps: a waiter's time is over; before it takes the lock, `leave` hands it
a slot. It then finds itself no longer in the queue, and has the slot: it goes in.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from .decisions import Why
from .rate import Rate


class TurnedAwayError(Exception):
    """The caller does not get in; `why` is FULL or WAITED."""

    def __init__(self, why: Why) -> None:
        super().__init__(why)
        self.why = why


class Gate:
    """A counting semaphore with a fair queue. `timeout` in seconds, None for no limit."""

    def __init__(self, slots: int, bound: int, timeout: float | None = None) -> None:
        self.slots = slots
        self.bound = bound
        self.timeout = timeout
        self.running = 0
        self._lock = threading.Lock()
        self._queue: OrderedDict[threading.Event, None] = OrderedDict()
        self._rate = Rate()

    def __repr__(self) -> str:
        return f"<Gate {self.running}/{self.slots} running, {self.waiting} waiting>"

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._queue)

    def enter(self) -> None:
        """Take a slot, waiting for one if need be. Raises TurnedAwayError."""
        with self._lock:
            if self.running + self.waiting >= self.bound:
                raise TurnedAwayError(Why.FULL)
            if self.running < self.slots:
                self.running += 1
                self._rate.count(time.monotonic())
                return
            turn = threading.Event()
            self._queue[turn] = None
        try:
            came = turn.wait(self.timeout)
        except BaseException:  # the waiter was interrupted: its place or its slot goes on
            if not self._withdraw(turn):
                self.leave()
            raise
        if not came and self._withdraw(turn):
            raise TurnedAwayError(Why.WAITED)

    def leave(self) -> None:
        """Give a slot back: to the first who waits, if there is one."""
        with self._lock:
            if self._queue:
                self._queue.popitem(last=False)[0].set()
                self._rate.count(time.monotonic())
            else:
                self.running -= 1

    def retry_after(self) -> int:
        """Seconds until a queue as long as this one has drained, as far as one can tell."""
        with self._lock:
            return self._rate.seconds_for(self.waiting + 1, time.monotonic())

    def _withdraw(self, turn: threading.Event) -> bool:
        """Leave the queue without a slot; False if it is too late for that."""
        with self._lock:
            return self._queue.pop(turn, self) is None
