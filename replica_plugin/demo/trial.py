"""What a server made of its bursts, and in how many rounds that was what p*t promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .bars import Bar, lay_out
from .burst import Row, Slot, at_once, faults, name_slot, name_slots, sentence


@dataclass(frozen=True)
class Plan:
    """What every server is asked."""

    processes: int
    threads: int
    rounds: int
    """How often a burst of each size is sent."""

    @property
    def slots(self) -> int:
        return self.processes * self.threads

    @property
    def shape(self) -> str:
        processes = _count(self.processes, "process", "processes")
        return f"{processes} x {_count(self.threads, 'thread', 'threads')}"

    @property
    def patience(self) -> float:
        """Seconds for the start; processes may load the app one after another."""
        return 30 + 20 * self.processes

    @property
    def sizes(self) -> tuple[int, int]:
        return self.slots, self.slots + 1

    def claim(self, size: int) -> str:
        """What makes a round right."""
        requests = f"{_count(size, 'request', 'requests')} sent together"
        if size == self.slots:
            return f"{requests}: all begin at once"
        return f"{requests}: exactly one waits, for the thread that is free first"


@dataclass
class Trial:
    """A server, by the name it is told by, and its rounds; a round is one burst."""

    server: str
    plan: Plan
    rounds: dict[int, list[list[Row]]] = field(default_factory=dict)
    """By the size of the burst, in the order they were sent."""

    @property
    def names(self) -> dict[Slot, str]:
        bursts = [rows for rounds in self.rounds.values() for rows in rounds]
        return name_slots([row for rows in bursts for row in rows])

    @property
    def lanes(self) -> list[str]:
        """All threads by name, those that never ran anything included."""
        promised = [
            name_slot(process, thread)
            for process in range(1, self.plan.processes + 1)
            for thread in range(1, self.plan.threads + 1)
        ]
        return list(dict.fromkeys([*promised, *self.names.values()]))

    def add(self, rows: list[Row]) -> bool:
        """Take one more round; return whether it went right."""
        self.rounds.setdefault(len(rows), []).append(rows)
        return not self.faults(rows)

    def faults(self, rows: Sequence[Row]) -> list[str]:
        return faults(rows, self.names, self.plan.processes, self.plan.threads)

    def right(self, size: int) -> list[bool]:
        """Which rounds went right."""
        return [not self.faults(rows) for rows in self.rounds[size]]

    def share(self, size: int) -> str:
        right = self.right(size)
        return f"{sum(right)} of {_count(len(right), 'round', 'rounds')}"

    def broken(self) -> list[str]:
        """What did not go right, with its round."""
        return [
            f"{size} requests, round {number}: {fault}"
            for size, rounds in self.rounds.items()
            for number, rows in enumerate(rounds, 1)
            for fault in self.faults(rows)
        ]

    def worst(self) -> list[Row]:
        """Of the largest bursts, the one of which fewest began at once, and the longest waited."""
        rounds = self.rounds[max(self.rounds)]
        return min(rounds, key=lambda rows: (at_once(rows), -sum(row.waited for row in rows)))

    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        return lay_out(rows, self.names, self.lanes)

    def sentence(self, rows: Sequence[Row]) -> str:
        """Say what happened in a round, and how many threads had nothing to do meanwhile."""
        told = sentence(rows, self.names)
        idle = sum(bar.idle for bar in self.bars(rows))
        if not idle or at_once(rows) == len(rows):
            return told
        return f"{told}, while {_count(idle, 'thread', 'threads')} ran nothing"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
