"""How fast things happen, as of late."""

from __future__ import annotations

import math

WINDOW = 10.0
"""Seconds over which is averaged."""


class Rate:
    """Events a second, averaged over WINDOW with exponentially fading weights."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._last = 0.0
        self._since: float | None = None

    def count(self, now: float) -> None:
        if self._since is None:
            self._since = now
        self._weight = self._faded(now) + 1.0
        self._last = now

    def per_second(self, now: float) -> float:
        """The rate; a history shorter than the window is not mistaken for a slow one."""
        if self._since is None:
            return 0.0
        seen = -math.expm1(-max(now - self._since, 1.0) / WINDOW)
        return self._faded(now) / (WINDOW * seen)

    def seconds_for(self, count: int, now: float) -> int:
        """Whole seconds, 1 to 60, in which so many more will happen at this rate."""
        rate = self.per_second(now)
        if count >= 60 * rate:
            return 60
        return max(1, math.ceil(count / rate))

    def _faded(self, now: float) -> float:
        return self._weight * math.exp((self._last - now) / WINDOW)
