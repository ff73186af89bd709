"""The promises about queue and processes, as plainly as they can be written: lists, sets, sums.

It is told every event that `Decisions` is told, and what that answered. It decides nothing:
it judges each action at the moment it is taken, then whether anything was left undone,
and `agree` compares all that can be seen from outside, and the invariants in decisions.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from replica_plugin.actions import Dismiss, Inspect, Kill, Lost, Refuse, Send, Why
from replica_plugin.decisions import EXEMPT_QUEUE, Decisions, Rules
from replica_plugin.overtime import CALM, SILENCE


@dataclass
class Known:
    """A process, as far as it has told."""

    age: int
    slots: int
    owed: int = 0
    registered: bool = True
    credits: int = 0
    sent: set[int] = field(default_factory=set)
    leaving: bool = False
    dismissed: bool = False
    blocked: bool = False
    stalled: bool = False
    last_sent: int = 0
    extra: int = 0
    exempt: set[int] = field(default_factory=set)  # of what was sent
    limits: dict[int, float] = field(default_factory=dict)  # when what was sent is overdue
    said: set[int] = field(default_factory=set)  # of which it said that they are
    noticed: dict[int, float] = field(default_factory=dict)  # when they were first seen to be late
    stuck: set[int] = field(default_factory=set)  # as of the last look at the clock
    inspected: set[int] = field(default_factory=set)
    killed: bool = False

    def end(self, request: int) -> None:
        self.sent.remove(request)
        self.exempt.discard(request)
        self.credits += 1
        self.limits.pop(request, None)
        self.noticed.pop(request, None)
        for some in (self.said, self.stuck, self.inspected):
            some.discard(request)

    def silent(self) -> bool:
        return bool(self.stuck - self.said)

    def idle(self) -> bool:
        return self.busy() == len(self.stuck)

    def useless(self) -> bool:
        return self.silent() or (self.idle() and not self.credits)

    def running(self) -> int:
        counted = self.sent - self.exempt if self.extra else self.sent
        return len(counted) + min(self.owed, self.slots)

    def busy(self) -> int:
        return len(self.sent) + self.owed

    def in_flight(self) -> int:
        return len(self.sent - self.exempt) + min(self.owed, self.slots)


class Model:
    def __init__(self, rules: Rules, was_ready: bool = False) -> None:
        self.rules = rules
        self.live: frozenset[int] = frozenset()
        self.first = 0  # since the last reload
        self.loaded = 0  # the newest that has ever registered
        self.waiting: list[int] = []
        self.exempt: list[int] = []  # those that wait
        self.exempts: set[int] = set()  # all there ever were
        self.offered: list[int] = []  # of those that wait: they lie on the deck
        self.said_last = False  # those that lie there are to end their connections
        self.taken: set[int] = set()  # off it, and nobody has said so yet
        self.ready_at: dict[int, float] = {}
        self.patience: dict[int, float] = {}
        self.processes: dict[int, Known] = {}
        self.stopping = False
        self.drained = False
        self.given_up = False
        self.was_ready = was_ready
        self.sends = 0
        self.spared = 0
        self.now = 0.0
        self.ends: list[float] = []  # when processes were ended because of stuck requests

    # Events, each with what was answered.

    def ready(self, request, now, patience, exempt, actions):
        self.now = now
        self.ready_at[request] = now
        self.patience[request] = patience
        if self.given_up:
            assert actions == [Refuse(request, Why.STOPPING)], "P7: nothing starts at the very end"
            self.exempts |= {request} if exempt else set()
            return
        if exempt:
            self.exempts.add(request)
            if len(self.exempt) >= EXEMPT_QUEUE:
                assert actions == [Refuse(request, Why.CROWDED)]
                return
            self.exempt.append(request)
            self._judge(actions)
            return
        if self.admitted() >= self.rules.bound:
            assert actions == [Refuse(request, Why.FULL)], "P4: refuse at the bound, and only that"
        else:
            self.waiting.append(request)
            self._judge(actions)

    def spare(self, request, now, patience, actions):
        assert self.rules.dry_run and self.admitted() >= self.rules.bound
        self.spared += 1
        self.waiting.append(request)
        self._judge(actions)

    def gone(self, request, actions):
        assert actions is (request not in self.taken), "P9: what no slot has taken is not run"
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.exempt:
            self.exempt.remove(request)

    def expected(self, age, slots, actions):
        assert actions is None
        self.processes[age] = Known(age, slots, owed=slots, registered=False)

    def registered(self, age, slots, owed, extra, actions):
        self.processes[age] = Known(age, slots, owed=owed, extra=extra)
        self.loaded = max(self.loaded, age)
        self._judge_who_leaves(actions)

    def freed(self, age, now, actions):
        self.now = now
        process = self.processes[age]
        process.credits += 1
        process.owed = max(0, process.owed - 1)
        self._see_readiness()
        self._judge(actions)

    def owes(self, age, slots, now, actions):
        self.now = now
        process = self.processes[age]
        process.owed = min(process.owed, slots)
        self._judge(actions)

    def done(self, age, request, now, took, actions):
        self.now = now
        process = self.processes[age]
        process.end(request)
        if took in self.taken:
            self.taken.remove(took)
            self._begin(process, took)
        elif took:
            self.offered.remove(took)
            self.waiting.remove(took)
            self._begin(process, took)
        self._judge(actions)

    def offered_next(self, request):
        """A request is about to be laid on the deck."""
        assert request == self.waiting[len(self.offered)], "P3: behind those that lie there"
        if not self.offered:
            assert self.running() == self.cap, "P1: a slot that is free was not sent it"
            self.said_last = self.stopping
        self.offered.append(request)

    def recalled(self, left, rest):
        """What was on the deck, and is neither taken back nor there any more, has been taken."""
        self.taken |= set(self.offered) - set(left) - set(rest)
        self.waiting = [each for each in self.waiting if each not in self.taken]
        self.offered = list(rest)

    def untaken(self, requests, left, now, actions):
        self.now = now
        self.taken -= set(requests)
        self._wait_again(set(requests) - set(left))
        self._judge(actions)

    def overdue(self, age, request, actions):
        assert actions is True
        self.processes[age].said.add(request)

    def unsent(self, age, request, now, actions):
        self.processes[age].blocked = True
        self.returned(age, request, now, actions)

    def sendable(self, age, now, actions):
        self.now = now
        self.processes[age].blocked = False
        self._judge(actions)

    def stalled(self, age, actions):
        assert actions is None
        self.processes[age].stalled = True

    def turning(self, age, now, actions):
        self.now = now
        self.processes[age].stalled = False
        self._judge(actions)

    def returned(self, age, request, now, actions):
        self.now = now
        self.processes[age].end(request)
        self._wait_again({request})
        self._judge(actions)

    def leaving(self, age, actions):
        self.processes[age].leaving = True
        self._judge_who_leaves(actions)

    def died(self, age, unread, now, actions):
        self.now = now
        dead = self.processes.pop(age)
        lost = {each.request: each.overdue for each in actions if isinstance(each, Lost)}
        assert lost.keys() == dead.sent - unread, "P6: lost are those it had begun to read"
        for request, overdue in lost.items():
            late = dead.limits.get(request, math.inf) <= now
            assert overdue == (dead.killed and late), "P11: 504 for what was overdue, else 502"
        self._wait_again(dead.sent & unread)
        self._judge([each for each in actions if not isinstance(each, Lost)])

    def ruled(self, rules, live, now, first, actions):
        self.now = now
        self.rules = rules
        self.live = frozenset(live)
        self.first = first
        self._judge(actions)

    def stop(self, actions):
        assert actions is None
        self.stopping = True

    def resume(self, now, actions):
        self.stopping = self.drained = self.given_up = False
        self._judge(actions)

    def drain(self, actions):
        self.drained = True
        self._judge_who_leaves(actions)

    def tick(self, now, actions):
        self.now = now
        due = [each for each in self.exempt + self.waiting if self._expiry(each) <= now]
        refused = [Refuse(each, Why.WAITED) for each in due]
        assert actions[: len(due)] == refused, "P10: refused on time"
        self.waiting = [each for each in self.waiting if each not in due]
        self.exempt = [each for each in self.exempt if each not in due]
        self._see_what_is_stuck()
        self._judge(actions[len(due) :])
        for process in self.processes.values():
            self._judge_what_is_left_of(process)

    def give_up(self, actions):
        self.given_up = True
        assert actions == [Refuse(each, Why.STOPPING) for each in self.exempt + self.waiting]
        self.waiting, self.exempt = [], []

    def admitted(self):
        """How many a replica would have in flight that had refused what was spared."""
        in_flight = self.in_flight()
        self.spared = min(self.spared, in_flight) if self.rules.dry_run else 0
        return in_flight - self.spared

    def _wait_again(self, requests):
        self.waiting = sorted([*self.waiting, *(requests - self.exempts)])
        self.exempt = sorted([*self.exempt, *(requests & self.exempts)])

    # Judgement.

    def _judge(self, actions):
        self._judge_who_leaves([each for each in actions if not isinstance(each, Send)])
        for action in actions:
            if isinstance(action, Send):
                self._judge_send(action)
        assert not (self.waiting and self.able()), "P1: a request waits beside a slot"
        assert not (self.exempt and self.able_for_exempt()), "an exempt one waits beside a slot"

    def _judge_who_leaves(self, actions):
        for action in actions:
            if isinstance(action, Inspect):
                self._judge_inspection(action)
            elif isinstance(action, Kill):
                self._judge_killing(action)
            else:
                assert isinstance(action, Dismiss), f"nobody asked for {action}"
                self._judge_dismissal(action)
        for process in self.present():
            assert not self.drained, f"P7: {process} was not dismissed in the end"
            replaced = self._is_replaced(process)
            assert self.stopping or not replaced, "P7: one that is replaced leaves"
        self._see_readiness()

    def _see_readiness(self):
        whole = [p for p in self.usable() if p.credits + p.busy() >= p.slots + p.extra]
        self.was_ready = self.was_ready or len(whole) >= self.rules.processes > 0

    def _judge_send(self, send):
        exempt = send.request in self.exempts
        queue = self.exempt if exempt else self.waiting
        assert send.request in queue, "P9: only what waits is sent"
        assert send.request == queue[0], "P3: the longest waiting one begins"
        assert exempt or not (self.exempt and self.able_for_exempt()), "exempt ones begin first"
        able = self.able_for_exempt() if exempt else self.able()
        process = self.processes[send.age]
        assert process in able, "only a usable process with a credit is sent anything"
        fewest = min(each.running() for each in able)
        assert process.running() == fewest, "P1: the process that runs fewest takes it"
        rested = min(each.last_sent for each in able if each.running() == fewest)
        assert process.last_sent == rested, "of equals, the longest unused takes it"
        assert send.request not in self.offered, "it lies where a slot may take it, too"
        queue.remove(send.request)
        self._begin(process, send.request)

    def _begin(self, process, request):
        process.sent.add(request)
        if request in self.exempts:
            process.exempt.add(request)
        if self.rules.request_timeout is not None:
            process.limits[request] = self.now + self.rules.request_timeout
        process.credits -= 1
        slots = process.slots + process.extra
        assert process.busy() + process.credits <= slots, "P2: never more than its slots"
        assert process.running() <= process.slots, "P2: and of those that count no more than t"
        self.sends += 1
        process.last_sent = self.sends

    def _judge_dismissal(self, dismiss):
        process = self.processes[dismiss.age]
        assert process.registered and not process.dismissed, "dismissed once"
        asked = process.leaving or self.drained or self._is_replaced(process)
        assert asked or process.stuck, "P7: nobody leaves unasked"
        if process.stuck and not self._may_leave(process):
            assert process.useless(), "P7: as long as it has slots that work it is spared"
        elif self.stopping:
            assert self.drained, "P7: in a stop processes stay until nothing is left"
        elif len(self.present()) <= self.rules.processes:  # one less is one too few
            assert not self.loading(), "P7: not below p while a successor loads"
            assert not self.cannot_load(), "P7: not below p while none can load"
            assert len(self.live) <= self.rules.processes, "P7: not while nobody would be forked"
            assert len(self.present()) == self.rules.processes, "P7: one at a time"
        if not (self._may_leave(process) and asked):
            assert self._may_end_another(), "P11: not more often than is promised"
            self.ends.append(self.now)
        process.dismissed = True

    def _may_leave(self, process):
        if self.stopping:
            return self.drained
        enough = len(self.present()) >= self.rules.processes >= len(self.live)
        spared = enough and not self.loading() and not self.cannot_load()
        return spared or self._is_replaced(process)

    def _is_replaced(self, process):
        newer = [each for each in self.present() if each.age > process.age]
        return len(newer) >= self.rules.processes

    def _may_end_another(self):
        lately = [at for at in self.ends if at > self.now - CALM]
        return len(lately) < max(1, self.rules.processes)

    # Requests that run for too long.

    def _see_what_is_stuck(self):
        left = self.rules.grace - self._silence()
        for process in self.processes.values():
            for request in self._late(process):
                if process.noticed.setdefault(request, self.now) + left <= self.now:
                    process.stuck.add(request)

    def _silence(self):
        return min(SILENCE, self.rules.grace / 2)

    def _late(self, process):
        silence = self._silence()
        return {r for r, overdue_at in process.limits.items() if overdue_at + silence <= self.now}

    def _unheard(self, process):
        return self._late(process) - process.said

    def _judge_inspection(self, inspect):
        process = self.processes[inspect.age]
        due = self._unheard(process) - process.inspected
        assert due, "P11: it has said all it has to say, or there is time yet"
        process.inspected.add(min(due, key=process.limits.__getitem__))

    def _judge_killing(self, kill):
        process = self.processes[kill.age]
        assert process.stuck and process.dismissed and not process.killed
        assert process.useless() or process.idle(), "P11: what else it runs goes on"
        process.killed = True

    def _judge_what_is_left_of(self, process):
        assert self._unheard(process) <= process.inspected | process.stuck, "P11: seen in time"
        if process.stuck and not process.killed:
            may = process.dismissed or self._may_end_another()
            can = process.useless() or process.dismissed or self._may_leave(process)
            assert not (may and can) or (process.dismissed and not process.idle()), (
                "P11: a process with a stuck request is ended"
            )

    # What follows from the state.

    def running(self):
        return sum(each.running() for each in self.processes.values())

    def present(self):
        return [each for each in self.processes.values() if each.registered and not each.dismissed]

    def usable(self):
        newest = sorted(self.present(), key=lambda each: -each.age)
        return newest[: self.rules.processes]

    @property
    def cap(self):
        return self.rules.processes * self.rules.threads

    def in_flight(self):
        return (
            len(self.waiting)
            + len(self.taken)
            + sum(each.in_flight() for each in self.processes.values())
        )

    def credited(self):
        willing = [p for p in self.usable() if not p.blocked and not p.stalled]
        return [each for each in willing if each.credits]

    def able(self):
        """Who may be sent a request that counts."""
        free = self.running() < self.cap
        return [each for each in self.credited() if free and each.running() < each.slots]

    def able_for_exempt(self):
        extra = [each for each in self.credited() if each.extra and not each.exempt]
        return extra or [each for each in self.able() if not each.extra]

    def loading(self):
        """Processes that the master has, and that have not registered with us."""
        registered = {each.age for each in self.processes.values() if each.registered}
        return self.live - registered

    def cannot_load(self):
        return self.loaded < self.first

    def _expiry(self, request):
        timeout = math.inf if self.rules.queue_timeout is None else self.rules.queue_timeout
        return self.ready_at[request] + min(timeout, self.patience[request])

    # Comparison.

    def agree(self, decisions: Decisions) -> None:
        seen = decisions.processes
        assert list(decisions.waiting) == self.waiting == sorted(self.waiting)
        assert list(decisions.exempt) == self.exempt == sorted(self.exempt)
        assert seen.keys() == self.processes.keys()
        for age, process in self.processes.items():
            assert seen[age].requests.keys() == process.sent
            assert seen[age].free == process.credits >= 0
            assert seen[age].running == process.running() <= process.slots
            assert seen[age].dismissed == process.dismissed
        assert decisions.running == self.running(), "the count has drifted"
        sent = [request for each in seen.values() for request in each.requests]
        assert len(sent) == len(set(sent)) and not decisions.waiting.keys() & set(sent)
        assert not decisions.exempt.keys() & set(sent)
        assert decisions.in_flight == self.in_flight()
        assert len(decisions.roster.usable) == len(self.usable())
        assert decisions.roster.booting == bool(self.loading())
        assert decisions.roster.cannot_load == self.cannot_load()
        assert decisions.roster.is_healthy == bool(self.processes or self.loading())
        ready = self.was_ready and bool(self.usable()) and not self.stopping
        assert decisions.roster.is_ready == ready
        assert list(decisions.offered) == self.offered == self.waiting[: len(self.offered)]
        assert decisions.taken.keys() == self.taken
        if self.offered:
            assert self.said_last == self.stopping, "P7: answered with `Connection: close`"
            assert not self.exempt, "an exempt one would have to come first"
            assert len(self.usable()) == len(self.processes), "P7: one that is to leave may take it"
            assert not any(each.extra for each in self.processes.values())
            assert self.cap == sum(each.slots for each in self.processes.values()), "P2: so few run"
        expiries = map(self._expiry, self.waiting + self.exempt)
        assert decisions.next_expiry() == min(expiries, default=math.inf)
