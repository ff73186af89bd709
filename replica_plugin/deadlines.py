"""Deadlines that are all equally far away, so that the next one is always the oldest.

Each kind of wait has one of these. Starting, stopping and looking at the next are O(1)
however many items wait, which is why ten thousand idle connections cost nothing.

`due` is never later than the first deadline. It may be too early, since stopping an item
leaves it alone: whoever comes then finds nothing, and `expired` puts it right. So a wait
that is started and stopped with every request costs two dictionary operations.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Deadlines(Generic[Item]):
    """Items that expire `seconds` after they were started. `None` seconds: never."""

    def __init__(self, seconds: float | None) -> None:
        self.due = math.inf
        self._since: OrderedDict[Item, float] = OrderedDict()
        self._seconds = math.inf if seconds is None else seconds

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, item: Item) -> bool:
        return item in self._since

    def last(self, seconds: float | None) -> None:
        """From now on items expire after so many seconds; those that wait already, too."""
        self._seconds = math.inf if seconds is None else seconds
        self._find_due()

    def start(self, item: Item, now: float) -> None:
        """(Re)start the wait of an item. `now` must not run backwards."""
        self._since[item] = now
        self._since.move_to_end(item)
        if self.due == math.inf:
            self.due = now + self._seconds

    def stop(self, item: Item) -> None:
        """The item waits no more; nothing happens if it did not."""
        self._since.pop(item, None)

    def oldest(self, count: int) -> list[Item]:
        """Those that will expire first."""
        return list(islice(self._since, count))

    def expired(self, now: float) -> Iterator[Item]:
        """Take out the items whose time is over, oldest first."""
        if self.due > now:
            return
        self._find_due()
        while self.due <= now:
            yield self._since.popitem(last=False)[0]
            self._find_due()

    def _find_due(self) -> None:
        oldest = next(iter(self._since.values()), math.inf)
        self.due = oldest + self._seconds
