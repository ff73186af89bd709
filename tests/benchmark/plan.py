"""How much is measured: all of it, or a few minutes' worth; and what a part is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .progress import Progress
from .record import Part


@dataclass(frozen=True)
class Plan:
    name: str
    rounds: int
    bursts: int  # of each kind, for each peer
    main: float  # seconds of open-loop load in the cells that all peers have
    rest: float  # and in the others
    wrk: int  # seconds of each run of wrk
    overload: float
    faults: int  # rounds of what kills something
    idle: Sequence[int]
    depths: Sequence[int]
    shapes: Sequence[tuple[int, int]]


FULL = Plan(
    "full",
    3,
    40,
    10,
    7,
    2,
    4,
    3,
    (0, 1000, 10000),
    (0, 1000, 10000, 29900),
    ((2, 2), (4, 4), (16, 4)),
)
QUICK = Plan("quick", 1, 5, 2, 2, 1, 1.5, 1, (0, 1000), (0, 1000), ((2, 2), (16, 4)))


@dataclass(frozen=True)
class Run:
    """One run of one part: how much, which peers, where figures go, and who is told."""

    plan: Plan
    peers: Sequence[str]
    part: Part
    progress: Progress

    def among(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.peers]
