"""The replica in numbers, for whoever asks in any of its processes.

The dispatcher writes a page (pages.py) that every process of ours has; asking is reading
memory. Where there is no dispatcher, the numbers are those of this process's gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .gate import Gate
    from .pages import ReplicaPage

_page: ReplicaPage | None = None  # set once, by the worker, before its app runs


@dataclass(frozen=True)
class Stats:
    """The replica at one moment; of this process alone if `whole` is False.

    `processes` are usable ones, `slots` all they have. `in_flight` is `waiting` plus
    `running`, and never above `max_replica_concurrency`.
    """

    processes: int
    slots: int
    running: int
    waiting: int
    max_replica_concurrency: int
    whole: bool

    @property
    def in_flight(self) -> int:
        """Requests waiting plus requests running."""
        return self.waiting + self.running

    def __repr__(self) -> str:
        return f"<Replica {self.running}/{self.slots} running, {self.waiting} waiting>"


def share(page: ReplicaPage) -> None:
    """This process belongs to a replica with a dispatcher, which writes this page."""
    global _page
    _page = page


def shared() -> bool:
    """Whether this process belongs to a replica with a dispatcher."""
    return _page is not None


def read(gate: Gate | None) -> Stats:
    """The numbers of the replica, or of the gate, or of a process that has served nothing yet."""
    if _page is not None:
        numbers = _page.read()
        return Stats(
            numbers.processes,
            numbers.slots,
            numbers.running,
            numbers.waiting,
            numbers.bound,
            True,
        )
    if gate is None:
        return Stats(1, 0, 0, 0, 0, False)
    return Stats(1, gate.slots, gate.running, gate.waiting, gate.bound, False)
