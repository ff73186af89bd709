"""When the dispatcher begins, once something has woken it, while all CPUs are busy.

    few events a second     at once, by interrupting who runs (SCHED_OTHER, the default)
    many (BUSY)             when a CPU is free, or its turn has come (SCHED_BATCH, sched(7))

To interrupt a process costs it what its caches hold. With thousands of events a second that is a
fifth of all CPU, and nobody gains: what the processes are at is over in less than a millisecond,
slots that are busy take the next request themselves (deck.py), and a process that has nothing to do
leaves its CPU to the dispatcher, which then finds several events at a time. Where processes compute
for long, events are few, and a request for which a slot is free begins at once.
"""

from __future__ import annotations

import os
from contextlib import suppress

BUSY = 2000
"""Events a second, from which on the dispatcher interrupts nobody."""

SPAN = 0.005
"""Seconds in which events are counted, at least."""


def may_choose() -> bool:
    """Whether a process may choose, and the operator has not: a child tries, since a sandbox may
    kill who does."""
    try:
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            return False
        pid = os.fork()
        if not pid:
            _choose(os.SCHED_BATCH)
            os._exit(0)
        return os.waitpid(pid, 0)[1] == 0
    except OSError:  # no room for a child, say
        return False


class Scheduling:
    """That of this process, if it `may` choose. Who has it counts its `events`, and while it
    `is_busy` has it `tick` again soon."""

    def __init__(self, may: bool) -> None:
        self.events = 0  # since the last look at them
        self.is_busy = False
        self._may = may
        self._since = 0.0

    def tick(self, now: float) -> None:
        """Choose by how many there were lately, unless the operator has chosen meanwhile."""
        span = now - self._since
        if not self._may or span < SPAN:
            return
        is_busy = self.events >= BUSY * span
        self.events, self._since = 0, now
        if is_busy is self.is_busy:
            return
        self._may = os.sched_getscheduler(0) == _policy(self.is_busy)
        self.is_busy = is_busy and self._may
        if self._may:
            _choose(_policy(is_busy))


def _policy(is_busy: bool) -> int:
    return os.SCHED_BATCH if is_busy else os.SCHED_OTHER


def _choose(policy: int) -> None:
    with suppress(OSError):  # no such call in musl, or in a sandbox
        os.sched_setscheduler(0, policy, os.sched_param(0))
