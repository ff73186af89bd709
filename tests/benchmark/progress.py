"""One line for each step: how long the run has been, and about how long it will go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping


class Progress:
    """`parts` are those to be run, each with the seconds that it takes as a rule."""

    def __init__(self, parts: Mapping[str, float]) -> None:
        self._later = dict(parts)
        self._start = time.monotonic()

    def begin(self, part: str) -> None:
        self._part, self._begun = part, time.monotonic()
        self._takes = self._later.pop(part)

    def say(self, *step: object) -> None:
        now = time.monotonic()
        left = max(0.0, self._begun + self._takes - now) + sum(self._later.values())
        text = ", ".join(map(str, step))
        times = f"{_clock(now - self._start)}, {_clock(left)} to go"
        print(f"{times}  {self._part}: {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:2}:{int(seconds) % 60:02}"
