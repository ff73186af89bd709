"""Which request goes where, what is refused, expired or lost, and when a process leaves.

The dispatcher's whole judgement, as one object of plain values. It takes events and
answers with actions; it knows no sockets, no clock, no HTTP and no configuration file.
Requests are integers that grow in the order in which they became ready; processes are
named by their age, as gunicorn counts them.

Invariants, after every event:

1. `running` is the sum over all known processes of what they run: requests sent and not
   reported done, plus `owed` slots (busy with a request of a dispatcher that died).
2. A request is sent only against a credit (`free`) of its process, and only while
   `running < processes * threads`. `_start` is the one place that takes a credit.
3. A request is in exactly one of: `waiting`, the `requests` of one process, or gone.
4. `waiting` is ordered by request number: the order in which they became ready.
5. Nothing is admitted while `in_flight >= bound`.
6. A dismissed process is sent nothing more; a process is dismissed once.
7. Because of stuck requests (overtime.py) at most p processes are ended in CALM seconds.

It assumes that request numbers are never used twice, and that `now` never runs backwards.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from .overtime import GRACE, Overtime, Quota
from .rate import Rate


class Why(Enum):
    """Why a request is answered without having run."""

    FULL = "full"
    WAITED = "waited"
    STOPPING = "stopping"


class Send(NamedTuple):
    """Hand this request to the process of this age."""

    request: int
    age: int


class Refuse(NamedTuple):
    """Answer this request without running it."""

    request: int
    why: Why


class Lost(NamedTuple):
    """The process that ran this request died; `overdue` if it was killed, and that is why."""

    request: int
    overdue: bool = False


class Dismiss(NamedTuple):
    """Tell the process of this age to finish what it runs, and leave."""

    age: int


class Inspect(NamedTuple):
    """See what the process of this age is doing, of which we should have heard by now."""

    age: int


class Kill(NamedTuple):
    """Kill the process of this age: it runs nothing but stuck requests, or is silent."""

    age: int


Action = Send | Refuse | Lost | Dismiss | Inspect | Kill


@dataclass(frozen=True)
class Rules:
    """What the operator asked for."""

    processes: int = 1
    threads: int = 1
    bound: int = 1024
    queue_timeout: float | None = None
    request_timeout: float | None = None
    grace: float = GRACE

    @property
    def cap(self) -> int:
        """How many requests may run at once in the replica."""
        return self.processes * self.threads


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
    requests: dict[int, float] = field(default_factory=dict)
    overdue: set[int] = field(default_factory=set)  # of which the process has said so
    stuck: set[int] = field(default_factory=set)  # those that have had their grace
    killed: bool = False

    @property
    def is_silent(self) -> bool:
        """Whether it has not said that a request is overdue, though there was time to."""
        return not self.stuck <= self.overdue

    @property
    def is_idle(self) -> bool:
        """Whether it runs nothing, but for stuck requests."""
        return self.running == len(self.stuck)

    @property
    def running(self) -> int:
        """How many of its slots are busy, as far as anybody knows."""
        return self.owed + len(self.requests)

    @property
    def is_complete(self) -> bool:
        """Whether each of its slots has come to wait, or works on something."""
        return self.free + self.running >= self.slots


class Decisions:
    """The replica: its processes, its queue, and the rules that join them."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.waiting: OrderedDict[int, float] = OrderedDict()
        self.processes: dict[int, Process] = {}
        self.live: frozenset[int] = frozenset()
        self.failed = 0
        self.running = 0
        self.stopping = False
        self.drained = False
        self.given_up = False
        self.was_ready = False
        self._usable: list[Process] = []
        self._starts = 0
        self._rate = Rate()
        self._overtime = Overtime()
        self._stuck: set[int] = set()  # ages of processes with stuck requests
        self._quota = Quota()  # of processes that are ended because of them

    def __repr__(self) -> str:
        return f"<Replica {self.running}/{self.rules.cap} running, {len(self.waiting)} waiting>"

    # What can be asked at any time.

    @property
    def in_flight(self) -> int:
        """Requests waiting plus requests running."""
        return len(self.waiting) + self.running

    @property
    def usable(self) -> int:
        """How many processes may be sent requests."""
        return len(self._usable)

    @property
    def booting(self) -> bool:
        """Whether the master has a process that has not registered with us yet."""
        return bool(self.live - {each.age for each in self.processes.values() if each.registered})

    @property
    def cannot_load(self) -> bool:
        """Whether the newest process that has tried to load the app could not."""
        return self.failed > max(
            (p.age for p in self.processes.values() if p.registered), default=0
        )

    @property
    def is_ready(self) -> bool:
        """Whether readyz says 200: all p were ready once, one is usable, no stop has begun."""
        return self.was_ready and self.usable > 0 and not self.stopping

    @property
    def is_healthy(self) -> bool:
        """Whether healthz says 200: a process is usable, or one is on its way."""
        return self.usable > 0 or self.booting

    def next_expiry(self) -> float:
        """When the oldest waiting request reaches `queue_timeout`; infinity if none will."""
        if self.rules.queue_timeout is None or not self.waiting:
            return math.inf
        return next(iter(self.waiting.values())) + self.rules.queue_timeout

    def overdue_at(self, request: int) -> float:
        """When a request that was just sent reaches `request_timeout`; infinity if it does not."""
        return self._overtime.overdue_at(request)

    def next_overdue(self) -> float:
        """When there is something to do about requests that run for too long; or sooner."""
        due = self._overtime.due(self.rules.grace)
        return min(due, self._quota.next) if self._stuck else due

    def retry_after(self, now: float) -> int:
        """Seconds, 1 to 60, until a queue as long as this one has drained at today's rate."""
        return self._rate.seconds_for(len(self.waiting) + 1, now)

    def runs(self, age: int, request: int) -> bool:
        """Whether this process was sent this request, and has not reported it."""
        process = self.processes.get(age)
        return process is not None and request in process.requests

    # Events from clients.

    def ready(self, request: int, now: float) -> list[Action]:
        """A request has arrived whole. Admit or refuse it; start it if a slot is free."""
        if self.given_up:
            return [Refuse(request, Why.STOPPING)]
        if self.in_flight >= self.rules.bound:
            return [Refuse(request, Why.FULL)]
        self.waiting[request] = now
        return self._start(now)

    def gone(self, request: int) -> None:
        """The client of a waiting request left: it will not be run."""
        self.waiting.pop(request, None)

    # Events from processes.

    def expected(self, age: int, slots: int) -> None:
        """A process of the dispatcher before us has not registered again: all it has is busy."""
        self._forget(age)
        self._remember(Process(age, slots, owed=slots, registered=False))

    def registered(self, age: int, slots: int, owed: int = 0) -> list[Action]:
        """A process has its app loaded. Its credits come one by one, with `freed`."""
        self._forget(age)
        self._remember(Process(age, slots, owed=owed))
        return self._changed()

    def freed(self, age: int, now: float) -> list[Action]:
        """A slot that ran nothing of ours has come to wait: one credit, and one a slot at most."""
        process = self.processes.get(age)
        if process is None or (process.is_complete and not process.owed):
            return []
        process.free += 1
        if process.owed:
            process.owed -= 1
            self.running -= 1
        self._see_whether_ready()
        return self._start(now)

    def done(self, age: int, request: int, now: float) -> list[Action]:
        """A slot has finished this request and waits for the next: one credit."""
        if not self.runs(age, request):
            return []
        process = self.processes[age]
        del process.requests[request]
        self._untime(process, request)
        process.free += 1
        self.running -= 1
        return self._start(now)

    def overdue(self, age: int, request: int) -> bool:
        """The process says that a request has reached `request_timeout`; whether it is its own."""
        process = self.processes.get(age)
        if process is None or request not in process.requests:
            return False
        process.overdue.add(request)
        return True

    def unsent(self, age: int, request: int, now: float) -> list[Action]:
        """The message could not be delivered: undo the start, send nothing until `sendable`."""
        process = self.processes[age]
        process.blocked = True
        self._undo_start(process, request)
        return self._start(now)

    def sendable(self, age: int, now: float) -> list[Action]:
        """Messages to this process can be delivered again."""
        process = self.processes.get(age)
        if process is not None:
            process.blocked = False
        return self._start(now)

    def stalled(self, age: int) -> None:
        """The process has stopped taking what it is sent: send it nothing until `turning`."""
        process = self.processes.get(age)
        if process is not None:
            process.stalled = True

    def turning(self, age: int, now: float) -> list[Action]:
        """The process takes what it is sent again."""
        process = self.processes.get(age)
        if process is not None:
            process.stalled = False
        return self._start(now)

    def returned(self, age: int, request: int, now: float) -> list[Action]:
        """A stalled process gives back what no slot has taken: undo the start."""
        process = self.processes.get(age)
        if process is None or request not in process.requests:
            return []
        self._undo_start(process, request)
        return self._start(now)

    def leaving(self, age: int) -> list[Action]:
        """A process was told to leave, or wants to; it serves until it is dismissed."""
        process = self.processes.get(age)
        if process is None:
            return []
        process.leaving = True
        return self._changed()

    def died(self, age: int, unread: Collection[int], now: float) -> list[Action]:
        """A process is dead. What it had not begun to read goes back to the head of the queue."""
        process = self.processes.get(age)
        if process is None:
            return []
        lost: list[Action] = [
            Lost(r, process.killed and self._is_overdue(process, r, now))
            for r in process.requests
            if r not in unread
        ]
        self._forget(age)
        self._requeue([(r, at) for r, at in process.requests.items() if r in unread])
        return lost + self._changed() + self._start(now)

    # Events from the master, and from the clock.

    def ruled(self, rules: Rules, live: Iterable[int], now: float, failed: int = 0) -> list[Action]:
        """The master's word: the rules, and the ages of the processes it has forked.

        `failed` is the age of the newest one that could not load the app; it is known by the time
        that one is not among the living any more.
        """
        self.rules = rules
        self.live = frozenset(live)
        self.failed = failed
        return self._changed() + self._start(now)

    def stop(self) -> None:
        """The replica stops: what is in flight goes on, and processes stay until `drain`."""
        self.stopping = True

    def resume(self, now: float) -> list[Action]:
        """It was a pause: what is in flight goes on, and processes leave as ever."""
        self.stopping = self.drained = False
        return self._changed() + self._start(now)

    def drain(self) -> list[Action]:
        """Nothing waits, and nothing can become ready any more: all processes may go."""
        self.drained = True
        return self._changed()

    def tick(self, now: float) -> list[Action]:
        """Refuse what has waited for `queue_timeout`, see to what runs for longer than
        `request_timeout`, and start what a change of processes allows."""
        refused: list[Action] = []
        while self.next_expiry() <= now:
            refused.append(Refuse(self.waiting.popitem(last=False)[0], Why.WAITED))
        overdue = self._see_to_overdue(now) if self._overtime or self._stuck else []
        return refused + overdue + self._start(now)

    def give_up(self) -> list[Action]:
        """The stop is about to end: refuse everything that still waits, and that comes."""
        self.given_up = True
        refused: list[Action] = [Refuse(request, Why.STOPPING) for request in self.waiting]
        self.waiting.clear()
        return refused

    # How it is decided.

    def _start(self, now: float) -> list[Action]:
        """Send from the head of the queue while there are credits and the cap allows."""
        started: list[Action] = []
        cap = self.rules.cap
        while self.waiting and self.running < cap:
            process = self._least_busy()
            if process is None:
                break
            request, since = self.waiting.popitem(last=False)
            process.requests[request] = since
            process.free -= 1
            if self.rules.request_timeout is not None:
                overdue_at = now + self.rules.request_timeout
                self._overtime.start(request, process.age, overdue_at)
            self._starts += 1
            process.last_start = self._starts
            self.running += 1
            self._rate.count(now)
            started.append(Send(request, process.age))
        return started

    def _least_busy(self) -> Process | None:
        """The usable process with a credit that runs fewest; of equals, the longest unused."""
        able = [p for p in self._usable if p.free and not p.blocked and not p.stalled]
        return min(able, key=lambda each: (each.running, each.last_start), default=None)

    def _changed(self) -> list[Action]:
        """The set of processes or the rules changed: who leaves now, and who is usable."""
        dismissed: list[Action] = []
        for process in sorted(self.processes.values(), key=lambda each: each.age):
            if self._wants_to_leave(process) and self._may_leave(process):
                process.dismissed = True
                dismissed.append(Dismiss(process.age))
        present = sorted(self._present(), key=lambda each: each.age, reverse=True)
        self._usable = present[: self.rules.processes]
        self._see_whether_ready()
        return dismissed

    def _see_whether_ready(self) -> None:
        """The replica is ready once p processes have all their slots waiting, or working."""
        if not self.was_ready:
            complete = sum(each.is_complete for each in self._usable)
            self.was_ready = complete >= self.rules.processes > 0

    def _present(self) -> list[Process]:
        """Processes that have registered and have not been dismissed."""
        return [p for p in self.processes.values() if p.registered and not p.dismissed]

    def _wants_to_leave(self, process: Process) -> bool:
        if process.dismissed or not process.registered:
            return False
        return process.leaving or self.drained

    def _may_leave(self, process: Process) -> bool:
        """Whether a process that is told to leave can be spared.

        Either p newer ones are ready; or no successor is loading, since gunicorn will fork
        one only when this process has gone, and then one process leaves at a time. But not
        while that one would not be able to load the app.
        """
        if self.stopping:
            return self.drained
        present = self._present()
        wanted = self.rules.processes
        if sum(each.age > process.age for each in present) >= wanted:
            return True
        return not (self.booting or self.cannot_load) and len(present) >= wanted

    def _see_to_overdue(self, now: float) -> list[Action]:
        """Inspect processes that are silent; end those with requests that have had their grace."""
        grace = self.rules.grace
        actions: list[Action] = [
            Inspect(age)
            for request, age in self._overtime.silent(now, grace)
            if request not in self.processes[age].overdue
        ]
        for request, age in self._overtime.stuck(now, grace):
            self.processes[age].stuck.add(request)
            self._stuck.add(age)
        self._quota.forget(now)
        for age in sorted(self._stuck):
            actions += self._end_stuck(self.processes[age], now)
        return actions

    def _end_stuck(self, process: Process, now: float) -> list[Action]:
        """End a process with stuck requests, as far as may be now.

        It is killed, if it is silent, since then nobody can be asked; or when it runs nothing
        else. Until then it is dismissed, and finishes; as long as it has slots that work it
        has to wait until it can be spared.
        """
        at_once = process.is_silent or (process.is_idle and not process.free)
        actions: list[Action] = []
        if not process.dismissed:
            may_leave = at_once or self._may_leave(process)
            if not (may_leave and self._quota.take(max(1, self.rules.processes), now)):
                return []
            process.dismissed = True
            actions = [Dismiss(process.age), *self._changed()]
        if (at_once or process.is_idle) and not process.killed:
            process.killed = True
            actions.append(Kill(process.age))
        return actions

    def _is_overdue(self, process: Process, request: int, now: float) -> bool:
        return request in process.stuck or self._overtime.overdue_at(request) <= now

    def _untime(self, process: Process, request: int) -> None:
        self._overtime.end(request)
        process.overdue.discard(request)
        process.stuck.discard(request)
        if not process.stuck:
            self._stuck.discard(process.age)

    def _undo_start(self, process: Process, request: int) -> None:
        process.free += 1
        self.running -= 1
        self._untime(process, request)
        self._requeue([(request, process.requests.pop(request))])

    def _requeue(self, requests: Iterable[tuple[int, float]]) -> None:
        """Put requests that were sent back where their numbers belong, near the head."""
        back = dict(requests)
        if not back:
            return
        last = max(back)
        while self.waiting and next(iter(self.waiting)) < last:
            request, since = self.waiting.popitem(last=False)
            back[request] = since
        for request in sorted(back, reverse=True):
            self.waiting[request] = back[request]
            self.waiting.move_to_end(request, last=False)

    def _remember(self, process: Process) -> None:
        self.processes[process.age] = process
        self.running += process.running

    def _forget(self, age: int) -> None:
        process = self.processes.pop(age, None)
        if process is not None:
            self.running -= process.running
            for request in process.requests:
                self._untime(process, request)
