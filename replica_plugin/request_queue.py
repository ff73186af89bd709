"""A queue of ready requests in the order of their numbers, and when each has waited enough.

A request waits no longer than a limit that is common to all, and than one of its own, if it
has one. Of the common limit the first request knows: it waits longest. Those with a limit
of their own are listed a second time, in the order in which they expire.

1. `_limited` lists exactly those in the queue whose `until` is finite, sorted.

It assumes that `since` grows with the numbers. A list that is kept sorted moves some memory
with each change, 240 KB for 30000 requests at most; a heap would keep what has left the
queue until its time comes, which is up to the clients.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple


class Wait(NamedTuple):
    """When a request became ready, and when it has waited enough by a limit of its own.

    `exempt` says that it counts neither for the cap, where that is possible, nor for the bound.
    """

    since: float
    until: float = math.inf
    exempt: bool = False


class Queue(OrderedDict[int, Wait]):
    """Requests by number, oldest first. It is changed by these methods only."""

    def __init__(self) -> None:
        super().__init__()
        self._limited: list[tuple[float, int]] = []

    def append(self, request: int, wait: Wait) -> None:
        """A request that is newer than all others."""
        self[request] = wait
        if wait.until < math.inf:
            insort(self._limited, (wait.until, request))

    def remove(self, request: int) -> None:
        """A request leaves; nothing happens if it is not here."""
        wait = self.pop(request, None)
        if wait is not None:
            self._unlimit(request, wait)

    def take(self) -> tuple[int, Wait]:
        """Take the first one out."""
        request, wait = self.popitem(last=False)
        self._unlimit(request, wait)
        return request, wait

    def put_back(self, requests: Iterable[tuple[int, Wait]]) -> None:
        """Put requests that were taken out where their numbers belong."""
        for request, wait in sorted(requests, reverse=True):
            self._insert(request, wait)

    def _insert(self, request: int, wait: Wait) -> None:
        """From the end that is nearer: a process may give back hundreds, one after the other."""
        older: list[int] = []
        newer: list[int] = []
        at_head = False
        for first, last in zip(self, reversed(self), strict=True):
            at_head = first > request
            if at_head or last < request:
                break
            older.append(first)
            newer.append(last)
        self.append(request, wait)
        if at_head:
            self.move_to_end(request, last=False)
        for each in reversed(older if at_head else newer):
            self.move_to_end(each, last=not at_head)

    def next_expiry(self, limit: float) -> float:
        """When one of them has waited for `limit`, or its own; infinity if none ever has."""
        if not self:
            return math.inf
        first = next(iter(self.values())).since + limit
        return min(first, self._limited[0][0]) if self._limited else first

    def expired(self, now: float, limit: float) -> list[int]:
        """Take out those that have waited enough."""
        late = []
        while self.next_expiry(limit) <= now:
            own, request = self._limited[0] if self._limited else (math.inf, 0)
            if own > now:
                request = next(iter(self))
            self.remove(request)
            late.append(request)
        return sorted(late)

    def take_all(self) -> list[int]:
        """Take all out, in their order."""
        left = list(self)
        self.clear()
        self._limited.clear()
        return left

    def _unlimit(self, request: int, wait: Wait) -> None:
        if wait.until < math.inf:
            del self._limited[bisect_left(self._limited, (wait.until, request))]
