"""Deadlines that are all equally far away, so that the next one is always the oldest.

Each kind of wait has one of these. Starting, stopping and looking at the next are O(1)
however many items wait, which is why ten thousand idle connections cost nothing.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Deadlines(Generic[Item]):
    """Items that expire `seconds` after they were started. `None` seconds: never."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._since: OrderedDict[Item, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, item: Item) -> bool:
        return item in self._since

    def start(self, item: Item, now: float) -> None:
        """(Re)start the wait of an item. `now` must not run backwards."""
        self._since[item] = now
        self._since.move_to_end(item)

    def stop(self, item: Item) -> None:
        """The item waits no more; nothing happens if it did not."""
        self._since.pop(item, None)

    def next(self) -> float:
        """When the next item expires; infinity if none will."""
        if self.seconds is None or not self._since:
            return math.inf
        return next(iter(self._since.values())) + self.seconds

    def expired(self, now: float) -> Iterator[Item]:
        """Take out the items whose time is over, oldest first."""
        while self.next() <= now:
            yield self._since.popitem(last=False)[0]
