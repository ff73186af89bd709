"""The replica in numbers, for whoever asks in any of its processes.

The dispatcher writes a page (pages.py) that gunicorn's master has and passes on to all it
forks; asking is reading memory. Where there is no dispatcher, the numbers are those of this
process's gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .gate import Gate
    from .pages import ReplicaPage

_page: ReplicaPage | None = None  # set once, by gunicorn's master, before it forks


@dataclass(frozen=True)
class Stats:
    """The replica at one moment; of this process alone if `whole` is False.

    `processes` are usable ones, `slots` all they have. `spared` counts the requests that
    `overload_dry_run` has let in, and that would have been refused. Numbers that change together
    are written one after the other, so that one may be newer than the next.
    """

    processes: int
    slots: int
    running: int
    waiting: int
    max_replica_concurrency: int
    whole: bool
    spared: int = 0

    @property
    def in_flight(self) -> int:
        """Requests waiting plus requests running."""
        return self.waiting + self.running

    def __repr__(self) -> str:
        return f"<Replica {self.running}/{self.slots} running, {self.waiting} waiting>"


def share(page: ReplicaPage) -> None:
    """This process, and what it forks, belong to a replica with a dispatcher, which writes this."""
    global _page
    _page = page


def shared() -> bool:
    """Whether this process belongs to a replica with a dispatcher."""
    return _page is not None


def of_replica() -> Stats | None:
    """The numbers of the whole replica; None where there is no dispatcher."""
    if _page is None:
        return None
    now = _page.read()
    return Stats(now.processes, now.slots, now.running, now.waiting, now.bound, True, now.spared)


def of_gate(gate: Gate) -> Stats:
    """The numbers of a process that keeps its cap by itself."""
    return Stats(1, gate.slots, gate.running, gate.waiting, gate.bound, False)
