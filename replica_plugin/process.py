"""What the decisions know of one gunicorn worker: its slots, credits and requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request_queue import Wait


@dataclass(eq=False)
class Process:
    """One gunicorn worker, as the dispatcher sees it."""

    age: int
    slots: int
    owed: int = 0
    registered: bool = True
    free: int = 0
    leaving: bool = False
    dismissed: bool = False
    blocked: bool = False
    stalled: bool = False
    last_start: int = 0
    extra: int = 0
    exempt: int = 0  # of its requests
    requests: dict[int, Wait] = field(default_factory=dict)
    overdue: set[int] = field(default_factory=set)  # of which the process has said so
    stuck: set[int] = field(default_factory=set)  # those that have had their grace
    killed: bool = False

    @property
    def has_credit(self) -> bool:
        """Whether it may be sent a request now."""
        return self.free > 0 and not (self.blocked or self.stalled)

    @property
    def order(self) -> tuple[int, int]:
        """Of those with credits the first one gets the next request."""
        return self.running, self.last_start

    @property
    def is_silent(self) -> bool:
        """Whether it has not said that a request is overdue, though there was time to."""
        return not self.stuck <= self.overdue

    @property
    def is_idle(self) -> bool:
        """Whether it runs nothing, but for stuck requests."""
        return self.busy == len(self.stuck)

    @property
    def busy(self) -> int:
        """How many of its slots are busy, of whatever kind, as far as anybody knows."""
        return self.owed + len(self.requests)

    @property
    def running(self) -> int:
        """How many of its slots are busy, as far as anybody knows; the extra one does not count."""
        beyond = self.exempt if self.extra else 0
        return min(self.owed, self.slots) + len(self.requests) - beyond

    @property
    def is_complete(self) -> bool:
        """Whether each of its slots has come to wait, or works on something."""
        return self.free + self.busy >= self.slots + self.extra
