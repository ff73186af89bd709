"""Running requests whose time is limited, and how many processes may be ended for them.

Plain values, as in decisions.py, which they are a part of.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import NamedTuple

GRACE = 10.0
"""Seconds after request_timeout in which a request may still end before its process is ended."""
SILENCE = 1.0
"""Seconds after request_timeout in which a process can say that a request is overdue."""
CALM = 60.0
"""Seconds in which at most p processes are ended because of stuck requests."""


class Timed(NamedTuple):
    """A running request: when it is overdue, and the age of its process."""

    overdue_at: float
    age: int


class Overtime:
    """Requests that run, from their start until they end, or have had their grace.

    Each is in `_timed`, until SILENCE after its time, and then in `_late`, until GRACE after
    it: both in the order of `overdue_at`.
    """

    def __init__(self) -> None:
        self._timed: OrderedDict[int, Timed] = OrderedDict()
        self._late: OrderedDict[int, Timed] = OrderedDict()

    def start(self, request: int, age: int, overdue_at: float) -> None:
        """A request begins. It keeps its limit when the rules change."""
        timed = Timed(overdue_at, age)
        in_order = not self._timed or next(reversed(self._timed.values())) <= timed
        self._timed[request] = timed
        if not in_order:  # the limit was lowered, and some from before still run
            self._timed = OrderedDict(sorted(self._timed.items(), key=lambda item: item[1]))

    def end(self, request: int) -> None:
        self._timed.pop(request, None)
        self._late.pop(request, None)

    def overdue_at(self, request: int) -> float:
        """When its time is over; infinity for one without a limit, or that has had its grace."""
        timed = self._timed.get(request) or self._late.get(request)
        return timed.overdue_at if timed else math.inf

    def due(self, grace: float) -> float:
        """When `silent` or `stuck` has something to tell."""
        return min(_first(self._timed) + _silence(grace), _first(self._late) + grace)

    def silent(self, now: float, grace: float) -> Iterator[tuple[int, int]]:
        """Request and age: of those the process should have said by now that they are overdue."""
        while _first(self._timed) + _silence(grace) <= now:
            request, timed = self._timed.popitem(last=False)
            self._late[request] = timed
            yield request, timed.age

    def stuck(self, now: float, grace: float) -> Iterator[tuple[int, int]]:
        """Request and age: those that have had their grace; they are forgotten here."""
        while _first(self._late) + grace <= now:
            request, timed = self._late.popitem(last=False)
            yield request, timed.age


class Quota:
    """So many at most in any CALM seconds."""

    def __init__(self) -> None:
        self._taken: deque[float] = deque()

    @property
    def next(self) -> float:
        """When there may be one more than `take` has seen lately; infinity if none was taken."""
        return self._taken[0] + CALM if self._taken else math.inf

    def take(self, most: int, now: float) -> bool:
        """Whether there may be one more now; then it counts."""
        self.forget(now)
        if len(self._taken) >= most:
            return False
        self._taken.append(now)
        return True

    def forget(self, now: float) -> None:
        while self.next <= now:
            self._taken.popleft()


def _first(timed: OrderedDict[int, Timed]) -> float:
    return next(iter(timed.values())).overdue_at if timed else math.inf


def _silence(grace: float) -> float:
    return min(SILENCE, grace / 2)
