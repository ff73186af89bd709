"""How much is measured: all of it, or a few minutes' worth; and what a part is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .progress import Progress
from .record import Part


@dataclass(frozen=True)
class Plan:
    """Seconds are those of one load."""

    name: str
    rounds: int  # of what targets are about
    less: int  # rounds of the rest
    bursts: int
    main: float  # seconds of waiting, in the cells that all peers have
    rest: float  # and in the others
    wrk: int
    overload: float
    idle: Sequence[int]
    depths: Sequence[int]
    shapes: Sequence[tuple[int, int]]


FULL = Plan(
    name="full",
    rounds=3,
    less=2,
    bursts=30,
    main=7.5,
    rest=6,
    wrk=4,
    overload=3,
    idle=(0, 1000, 10000),
    depths=(0, 1000, 10000, 29900),
    shapes=((2, 2), (4, 4), (16, 4)),
)
QUICK = Plan(
    name="quick",
    rounds=1,
    less=1,
    bursts=5,
    main=2,
    rest=2,
    wrk=1,
    overload=1.5,
    idle=(0, 1000),
    depths=(0, 1000),
    shapes=((2, 2), (16, 4)),
)


@dataclass(frozen=True)
class Run:
    """One run of one part: how much, which peers, where figures go, and who is told."""

    plan: Plan
    peers: Sequence[str]
    part: Part
    progress: Progress

    def among(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.peers]
