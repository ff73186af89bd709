"""Which request goes where, what is refused, expired or lost, and when a process leaves.

The dispatcher's whole judgement, as one object of plain values. It takes events and
answers with actions; it knows no sockets, no clock, no HTTP and no configuration file.
Requests are integers that grow in the order in which they became ready; processes are
named by their age, as gunicorn counts them.

Invariants, after every event:

1. `running` is the sum over all known processes of what they run: requests sent and not
   reported done, plus `owed` slots (busy with a request of a dispatcher that died, as far as
   anybody knows: of those that end, and give no credit, `owes` tells).
2. A request is sent only against a credit (`free`) of its process, and only while
   `running < processes * threads`. `_start` is the one place that takes a credit; but that a slot
   which ends a request may take the next one off the deck, and reports both at once (`done`).
3. A request is in exactly one of: `waiting`, `exempt`, `taken`, the `requests` of one process, or
   gone.
4. `waiting` is ordered by request number: the order in which they became ready. So is `exempt`.
5. Nothing is admitted while `in_flight >= bound`, but by `spare`, in a dry run; `_spared` then
   tells how many in flight would not be there otherwise.
6. Exempt requests have a queue of their own. A process with an `extra` slot runs one of them
   beyond its `slots`: it does not count as running. In one without, it runs within `slots` and
   the cap, ahead of all that wait; then it counts as running, but not as in flight.
7. A dismissed process is sent nothing more; a process is dismissed once.
8. Because of stuck requests (overtime.py) at most p processes are ended in CALM seconds.
9. `offered` are the first of `waiting`: those that lie on the deck (deck.py). They do only while
   `_start` would send the first one to whichever slot is free next: `_may_offer`. Whatever changes
   that, or the queue before its end, takes them back first (`clear_deck`), and what is sent all the
   same, since its slot has looked there too early, alone. Those that are not there any more are
   `taken`: by a slot whose report of it is on its way.

The slots of a process are alike, and so are their credits: what makes one of them the extra
one is how many requests of which kind are sent. Of `owed` slots nobody knows which kind they
run: as many as may be count as running.

It assumes that request numbers are never used twice, and that `now` never runs backwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter

from .actions import Action, Dismiss, Inspect, Kill, Lost, Refuse, Send, Why
from .overtime import GRACE, Overtime, Quota
from .process import Process
from .rate import Rate
from .request_queue import Queue, Wait
from .roster import Roster

EXEMPT_QUEUE = 16
"""How many exempt requests may wait."""
DECK = 16
"""How many requests may lie on the deck."""

_order = attrgetter("order")


@dataclass(frozen=True)
class Rules:
    """What the operator asked for."""

    processes: int = 1
    threads: int = 1
    bound: int = 1024
    queue_timeout: float | None = None
    request_timeout: float | None = None
    grace: float = GRACE
    dry_run: bool = False

    @property
    def cap(self) -> int:
        """How many requests may run at once in the replica."""
        return self.processes * self.threads

    @property
    def wait_limit(self) -> float:
        """`queue_timeout`, or infinity."""
        return math.inf if self.queue_timeout is None else self.queue_timeout


class Decisions:
    """The replica: its processes, its queue, and the rules that join them.

    `recall` takes back the first that lie on the deck, so many at most, and tells which requests
    still did.
    """

    def __init__(
        self, rules: Rules, recall: Callable[[int], Collection[int]] = lambda most: ()
    ) -> None:
        self.rules = rules
        self.waiting = Queue()
        self.exempt = Queue()
        self.offered: dict[int, None] = {}  # in their order
        self.taken: dict[int, Wait] = {}
        self._recall = recall
        self.roster = Roster(rules.processes)
        self.processes = self.roster.processes
        self.running = 0
        self.given_up = False
        self._starts = 0
        self._spared = 0
        self._exempt_within = 0  # exempt requests that run within the cap
        self._rate = Rate()
        self._overtime = Overtime()
        self._quota = Quota()  # of processes that are ended because of stuck requests

    def __repr__(self) -> str:
        return f"<Replica {self.running}/{self.rules.cap} running, {len(self.waiting)} waiting>"

    # What can be asked at any time.

    @property
    def in_flight(self) -> int:
        """Requests waiting plus requests running, without exempt ones."""
        return len(self.waiting) + len(self.taken) + self.running - self._exempt_within

    def next_expiry(self) -> float:
        """When a waiting request reaches its wait limit; infinity if none will."""
        limit = self.rules.wait_limit
        return min(self.waiting.next_expiry(limit), self.exempt.next_expiry(limit))

    def overdue_at(self, request: int) -> float:
        """When a request that was just sent reaches `request_timeout`; infinity if it does not."""
        return self._overtime.overdue_at(request)

    def next_overdue(self) -> float:
        """When there is something to do about requests that run for too long; or sooner."""
        due = self._overtime.due(self.rules.grace)
        return min(due, self._quota.next) if self._with_stuck() else due

    def retry_after(self, now: float) -> int:
        """Seconds, 1 to 60, until a queue as long as this one has drained at today's rate."""
        return self._rate.seconds_for(len(self.waiting) + 1, now)

    def runs(self, age: int, request: int) -> bool:
        """Whether this process was sent this request, and has not reported it."""
        process = self.processes.get(age)
        return process is not None and request in process.requests

    def waits(self, request: int) -> bool:
        """Whether this request waits to be sent."""
        return request in self.waiting or request in self.exempt

    # Events from clients.

    def ready(
        self, request: int, now: float, patience: float = math.inf, exempt: bool = False
    ) -> list[Action]:
        """A request has arrived whole. Admit or refuse it; start it if a slot is free.

        `patience` is its own wait limit, in seconds.
        """
        if self.given_up:
            return [Refuse(request, Why.STOPPING)]
        if exempt:
            return self._ready_exempt(request, Wait(now, now + patience, True), now)
        if self._is_full():
            return [Refuse(request, Why.FULL)]
        self.waiting.append(request, Wait(now, now + patience))
        return self._start(now)

    def spare(self, request: int, now: float, patience: float = math.inf) -> list[Action]:
        """Admit a request in a dry run that `ready` has just refused because of the bound."""
        self._spared += 1
        self.waiting.append(request, Wait(now, now + patience))
        return self._start(now)

    def _ready_exempt(self, request: int, wait: Wait, now: float) -> list[Action]:
        if len(self.exempt) >= EXEMPT_QUEUE:
            return [Refuse(request, Why.CROWDED)]
        self.clear_deck()
        self.exempt.append(request, wait)
        return self._start(now)

    def gone(self, request: int) -> bool:
        """The client of a waiting request left: it will not be run. False if a slot has it."""
        if request in self.offered:
            self.clear_deck()
        if request in self.taken:
            return False
        self.waiting.remove(request)
        self.exempt.remove(request)
        return True

    # Events from processes.

    def expected(self, age: int, slots: int) -> None:
        """A process of the dispatcher before us has not registered again: so many may be busy."""
        self._forget(age)
        self._remember(Process(age, slots, owed=slots, registered=False))

    def registered(self, age: int, slots: int, owed: int = 0, extra: int = 0) -> list[Action]:
        """A process has its app loaded. Its credits come one by one, with `freed`."""
        self._forget(age)
        self._remember(Process(age, slots, owed=owed, extra=extra))
        return self._changed()

    def freed(self, age: int, now: float) -> list[Action]:
        """A slot that ran nothing of ours has come to wait: one credit, and one a slot at most."""
        process = self.processes.get(age)
        if process is None or (process.is_complete and not process.owed):
            return []
        process.free += 1
        if process.owed:
            self._owe(process, process.owed - 1)
        self.roster.see_whether_ready()
        return self._start(now)

    def owes(self, age: int, slots: int, now: float) -> list[Action]:
        """No more slots than that are `owed`: others have ended, and will give no credit."""
        process = self.processes.get(age)
        if process is None:
            return []
        self._owe(process, min(process.owed, slots))
        return self._start(now)

    def done(self, age: int, request: int, now: float, took: int = 0) -> list[Action] | None:
        """A slot has finished this request and waits for the next: one credit. Or it has taken
        the next one off the deck.

        None if that process does not run it: it was said twice, or is another process's. Or if
        nothing of the kind was on the deck.
        """
        process = self.processes.get(age)
        if process is None or request not in process.requests:
            return None
        if took and not (took in self.offered or took in self.taken):
            return None
        self._end(process, request)
        if took:
            self._begin(now, process, took, self._take_off(took))
            self._rate.count(now)
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
        self._put_back([(r, wait) for r, wait in process.requests.items() if r in unread])
        return lost + self._changed() + self._start(now)

    # Events from the master, and from the clock.

    def ruled(self, rules: Rules, live: Iterable[int], now: float, first: int = 0) -> list[Action]:
        """The master's word: the rules, and the ages of its processes, and of the `first` one
        since a reload."""
        self.rules = rules
        self.roster.told(rules.processes, live, first)
        return self._changed() + self._start(now)

    def stop(self) -> None:
        """The replica stops: what is in flight goes on, and processes stay until `drain`."""
        self.clear_deck()
        self.roster.stopping = True

    def resume(self, now: float) -> list[Action]:
        """It was a pause: what is in flight goes on, and processes leave as ever."""
        self.roster.stopping = self.roster.drained = self.given_up = False
        return self._changed() + self._start(now)

    def drain(self) -> list[Action]:
        """Nothing waits, and nothing can become ready any more: all processes may go."""
        self.roster.drained = True
        return self._changed()

    def tick(self, now: float) -> list[Action]:
        """Refuse what has waited long enough, see to what runs for longer than
        `request_timeout`, and start what a change of processes allows.

        Two changes make room and start nothing: one that was `expected` registers with fewer busy
        slots than that; and in a stop one that is blocked is ended because of stuck requests, so
        that an older one is usable again.
        """
        if self.next_expiry() <= now:
            self.clear_deck()
        limit = self.rules.wait_limit
        late = self.exempt.expired(now, limit) + self.waiting.expired(now, limit)
        refused = (Refuse(request, Why.WAITED) for request in late)
        return [*refused, *self._see_to_overdue(now), *self._start(now)]

    def give_up(self) -> list[Action]:
        """The stop is about to end: refuse everything that still waits, and that comes."""
        self.clear_deck()
        self.given_up = True
        left = self.exempt.take_all() + self.waiting.take_all()
        return [Refuse(request, Why.STOPPING) for request in left]

    # The deck.

    def for_deck(self) -> list[int]:
        """Those that may be laid on the deck now, behind what lies there."""
        lie = len(self.offered)
        if lie >= min(DECK, len(self.waiting)) or not (lie or self._may_offer()):
            return []
        return list(islice(self.waiting, lie, DECK))

    def on_deck(self, request: int) -> None:
        """The first of `for_deck` lies there."""
        self.offered[request] = None

    def clear_deck(self) -> None:
        """Take back what lies on the deck, as if it had never been there."""
        if self.offered:
            self._take_back(DECK)

    def _take_back(self, most: int) -> bool:
        """Take back the first that lie on the deck, as if they had never been there; whether any
        still did. Those before them have been taken; if fewer than `most` did, so have the others.
        """
        left = self._recall(most)
        last = max(left) if len(left) == most else math.inf
        for request in [each for each in self.offered if each <= last]:
            del self.offered[request]
            if request not in left:
                self.taken[request] = self.waiting[request]
                self.waiting.remove(request)
        return bool(left)

    def untaken(self, requests: Collection[int], left: Collection[int], now: float) -> list[Action]:
        """Who took these, died before it said so, and before they were begun: they wait again.

        But not those whose clients have `left` meanwhile.
        """
        waits = [(request, self.taken.pop(request)) for request in requests]
        self._put_back([(request, wait) for request, wait in waits if request not in left])
        return self._start(now)

    def _may_offer(self) -> bool:
        """Whether whichever slot ends a request first is to have the one that waits longest."""
        processes = self.processes.values()
        return (
            self.running == self.rules.cap == sum(each.slots for each in processes)
            and len(self.roster.usable) == len(processes)
            and not (self.exempt or any(each.extra for each in processes))
        )

    def _take_off(self, request: int) -> Wait:
        wait = self.taken.pop(request, None)
        if wait is None:
            del self.offered[request]
            wait = self.waiting[request]
            self.waiting.remove(request)
        return wait

    # How it is decided.

    def _changed(self) -> list[Action]:
        self.clear_deck()
        return self.roster.changed()

    def _is_full(self) -> bool:
        """Whether one more is too many, in a replica that had refused all that were.

        In a dry run they are here, too. Each end of a request counts as one of that replica's,
        as long as it would have had any: it would have been as busy.
        """
        self._spared = min(self._spared, self.in_flight) if self.rules.dry_run else 0
        return self.in_flight - self._spared >= self.rules.bound

    def _start(self, now: float) -> list[Action]:
        """Send what waits while there are credits and the cap allows; what is exempt first."""
        started: list[Action] = []
        if not (self.waiting or self.exempt):
            return started
        while self.exempt and (process := self._least_busy_for_exempt()):
            started.append(self._begin(now, process, *self.exempt.take()))
        while self.waiting and (process := self._least_busy()):
            if self.offered and not self._take_back(1):  # nothing that its slot has missed
                continue
            started.append(self._begin(now, process, *self.waiting.take()))
            self._rate.count(now)
        return started

    def _begin(self, now: float, process: Process, request: int, wait: Wait) -> Send:
        process.requests[request] = wait
        process.free -= 1
        if self.rules.request_timeout is not None:
            overdue_at = now + self.rules.request_timeout
            self._overtime.start(request, process.age, overdue_at)
        self._starts += 1
        process.last_start = self._starts
        self._count(process, wait, 1)
        return Send(request, process.age)

    def _end(self, process: Process, request: int) -> Wait:
        wait = process.requests.pop(request)
        self._overtime.end(request)
        process.overdue.discard(request)
        process.stuck.discard(request)
        process.free += 1
        self._count(process, wait, -1)
        return wait

    def _count(self, process: Process, wait: Wait, change: int) -> None:
        if not wait.exempt:
            self.running += change
            return
        process.exempt += change
        if not process.extra:
            self.running += change
            self._exempt_within += change

    def _owe(self, process: Process, slots: int) -> None:
        before = process.running
        process.owed = slots
        self.running += process.running - before

    def _put_back(self, requests: list[tuple[int, Wait]]) -> None:
        self.clear_deck()
        self.waiting.put_back(each for each in requests if not each[1].exempt)
        self.exempt.put_back(each for each in requests if each[1].exempt)

    def _least_busy_for_exempt(self) -> Process | None:
        """One whose extra slot is free; or, as for any other request, one that has none."""
        extra = [p for p in self.roster.usable if p.exempt < p.extra and p.has_credit]
        return min(extra, key=_order) if extra else self._least_busy(extras=False)

    def _least_busy(self, extras: bool = True) -> Process | None:
        """The usable process with a credit that runs fewest; of equals, the longest unused.

        Without `extras` only of those that have no extra slot.
        """
        if self.running >= self.rules.cap:
            return None
        able = [
            p
            for p in self.roster.usable
            if p.free and p.has_credit and p.running < p.slots and (extras or not p.extra)
        ]
        return min(able, key=_order, default=None)

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
        self._quota.forget(now)
        for process in self._with_stuck():
            actions += self._end_stuck(process, now)
        return actions

    def _with_stuck(self) -> list[Process]:
        """Processes with stuck requests, the oldest first."""
        return sorted((p for p in self.processes.values() if p.stuck), key=attrgetter("age"))

    def _end_stuck(self, process: Process, now: float) -> list[Action]:
        """End a process with stuck requests, as far as may be now.

        It is killed, if it is silent, since then nobody can be asked; or when it runs nothing
        else. Until then it is dismissed, and finishes; as long as it has slots that work it
        has to wait until it can be spared.
        """
        at_once = process.is_silent or (process.is_idle and not process.free)
        actions: list[Action] = []
        if not process.dismissed:
            may_leave = at_once or self.roster.may_leave(process)
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

    def _undo_start(self, process: Process, request: int) -> None:
        self._put_back([(request, self._end(process, request))])

    def _remember(self, process: Process) -> None:
        self.processes[process.age] = process
        self.running += process.running

    def _forget(self, age: int) -> None:
        process = self.processes.pop(age, None)
        if process is not None:
            self.running -= process.running
            self._exempt_within -= 0 if process.extra else process.exempt
            for request in process.requests:
                self._overtime.end(request)
