"""The cap of one process where no dispatcher keeps it: a first-in-first-out semaphore.

1. At most `slots` are inside. A slot that is left goes straight to the first who waits, so
   nobody overtakes.
2. At most `bound` are inside or waiting; the next is refused at once.
3. Whoever waits leaves the queue in one way: with a slot, or at its deadline without one.
4. `leave` never waits for the lock. A body that is garbage leaves from its `__del__`, which
   the collector may run in a thread that has the lock. So `leave` only notes that a slot
   was left; if the lock is taken, whoever has it settles that after letting go.
5. A forked child, in which no other thread lives on, begins with nobody inside.

The race of 3, in steps: a waiter's time is over; before it takes the lock, it is handed a
slot. It then finds itself no longer in the queue, and has the slot: it goes in.

A turn is a bare lock, taken by whoever waits for it and released by whoever hands the slot
over, since an Event's own lock may be held where the collector interrupts. Its kind is asked for
anew each time: gevent may patch threading behind our import, with preload_app, say.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from .actions import Why
from .rate import Rate


def new_turn() -> Any:
    """A lock of greenlets, where gevent has patched."""
    return threading.Lock()


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
        self.begin()
        _gates.add(self)

    def begin(self) -> None:
        """Nobody is inside, and nobody waits."""
        self.running = 0
        self._lock = threading.Lock()
        self._queue: OrderedDict[Any, None] = OrderedDict()
        self._left: deque[None] = deque()
        self._rate = Rate()

    def __repr__(self) -> str:
        return f"<Gate {self.running}/{self.slots} running, {self.waiting} waiting>"

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._queue)

    def enter(self) -> None:
        """Take a slot, waiting for one if need be. Raises TurnedAwayError."""
        turn = new_turn()
        turn.acquire()
        with self._alone():
            if self.running + self.waiting >= self.bound:
                raise TurnedAwayError(Why.FULL)
            if self.running < self.slots:
                self.running += 1
                self._rate.count(time.monotonic())
                return
            self._queue[turn] = None
        self._wait(turn)

    def leave(self) -> None:
        """Give a slot back: to the first who waits, if there is one. Never blocks."""
        self._left.append(None)
        self._settle()

    def retry_after(self) -> int:
        """Seconds until a queue as long as this one has drained, as far as one can tell."""
        with self._alone():
            return self._rate.seconds_for(self.waiting + 1, time.monotonic())

    def _wait(self, turn: Any) -> None:
        try:
            came = turn.acquire(timeout=-1 if self.timeout is None else self.timeout)
        except BaseException:  # the waiter was interrupted: its place or its slot goes on
            if not self._withdraw(turn):
                self.leave()
            raise
        if not came and self._withdraw(turn):
            raise TurnedAwayError(Why.WAITED)

    def _withdraw(self, turn: Any) -> bool:
        """Leave the queue without a slot; False if it is too late for that."""
        with self._alone():
            return self._queue.pop(turn, self) is None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the lock, and settle what was left meanwhile."""
        try:
            with self._lock:
                yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """Pass on what was left, unless somebody has the lock, who then does it."""
        while self._left and self._lock.acquire(blocking=False):
            try:
                while self._left:
                    self._left.pop()
                    self._pass_on()
            finally:
                self._lock.release()

    def _pass_on(self) -> None:
        if not self._queue:
            self.running -= 1
            return
        self._rate.count(time.monotonic())
        self._queue.popitem(last=False)[0].release()


_gates: WeakSet[Gate] = WeakSet()


def _begin_in_child() -> None:
    for gate in _gates:
        gate.begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)
