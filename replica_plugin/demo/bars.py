"""What a picture of a burst consists of, whatever it is drawn with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .burst import Row, Slot


@dataclass(frozen=True)
class Bar:
    """A line of the picture: a request beside the thread that ran it, or a thread that ran none.

    Times are seconds since the first request of the burst was sent.
    """

    lane: str
    sent: float = 0
    begin: float = 0
    end: float = 0

    @property
    def idle(self) -> bool:
        return self.end == 0


def lay_out(rows: Sequence[Row], names: Mapping[Slot, str], lanes: Sequence[str]) -> list[Bar]:
    """The bars of a burst, by lane; the requests of one lane stand below each other."""
    start = min(row.sent for row in rows)
    bars = [
        Bar(names[row.slot], row.sent - start, row.begin - start, row.end - start)
        for row in sorted(rows, key=lambda row: row.begin)
    ]
    used = {bar.lane for bar in bars}
    bars += [Bar(lane) for lane in lanes if lane not in used]
    return sorted(bars, key=lambda bar: lanes.index(bar.lane))


def tick_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... ms that is at least `least`."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if step >= least:
                return step
        power *= 10
