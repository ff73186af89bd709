"""Which outcome of a request is right: LAWS, all of which hold, and RULES, of which one does."""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

from chaos.app import right_body
from chaos.ledger import Death, Entry, Ledger, Run

MOMENT = float(os.environ.get("CHAOS_MOMENT", "0.25"))
"""Seconds by which several processes may see the same thing at different times."""
SLOW_PROBE = 5.0
"""Seconds in which a probe is answered, on a machine that has no CPU to spare."""
BIRTH = 3.0
"""Seconds in which a new dispatcher may take slots for busy that are not."""
PAUSED = 1.0
"""Seconds after a pause in which clients may see that it has closed their connections."""
RESTART = 5.0
"""Seconds within which a request begins after a dispatcher died, on a machine that is busy."""


class Judge:
    """The ledger, sorted for questions."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._deaths = {d.pid: d for d in ledger.deaths if d.role == "process"}
        self._counted = counted = [
            e for e in ledger.entries.values() if e.kind not in ("probe", "exempt")
        ]
        self._begins = sorted(e.began_at for e in counted if e.began_at)
        self._ends = sorted(self._last_of(e) for e in counted if e.began_at)
        self._holders = [
            run
            for number, runs in ledger.runs.items()
            if number in ledger.entries and ledger.entries[number].action in ("grip", "spin")
            for run in runs
        ]
        self._stuck = {
            run.pid
            for runs in ledger.runs.values()
            for run in runs
            if run.ended is None
            and (died := self.died_at(run.pid))
            and died - run.began > ledger.times.request
        }
        self._moments: dict[int, list[float]] = defaultdict(list)
        for runs in ledger.runs.values():
            for each in runs:
                self._moments[each.pid] += [at for at in (each.began, each.ended) if at]
        self.waits = self._find_waits()

    def problems(self) -> list[str]:
        """Every entry that is not as it has to be, with its whole history."""
        entries, runs = self.ledger.entries, self.ledger.runs
        found = [
            f"{problem}\n{self.ledger.history(entry)}"
            for entry in entries.values()
            for problem in self.problems_of(entry)
        ]
        unknown = sorted(runs.keys() - entries.keys())
        found += [f"run unseen: request {number} was never sent" for number in unknown]
        late = [seconds for seconds in self.restarts() if seconds > RESTART]
        return found + [f"the first request after a dispatcher began {s:.1f} s late" for s in late]

    def restarts(self) -> list[float]:
        """What the first request that was sent after the death of a dispatcher had to wait.

        Of those that have begun; slots were free.
        """
        begun = sorted(
            (entry.sent_at, runs[0].began)
            for entry in self._counted
            if entry.sent_at and (runs := self.ledger.runs.get(entry.number))
        )
        waits = []
        for died in self.ledger.spared:
            after = begun[bisect_right(begun, (died, 0.0)) :]
            waits += [began - sent for sent, began in after[:1]]
        return waits

    def outcomes(self) -> Counter[str]:
        """How often each rule was the one."""
        return Counter(self.reason(entry) or "?" for entry in self.ledger.entries.values())

    def problems_of(self, entry: Entry) -> list[str]:
        case = Case(self, entry)
        broken = [law.problem for law in LAWS if not law.holds(case)]
        if not broken and self.reason(entry) is None:
            broken = [f"no rule allows: {case.outcome}"]
        return broken

    def reason(self, entry: Entry) -> str | None:
        """The first rule that allows what became of it."""
        case = Case(self, entry)
        for rule in RULES:
            if rule.outcome == case.outcome and all(holds(case) for holds in rule.conditions):
                return f"{rule.outcome}: {rule.why}"
        return None

    def died_at(self, pid: int) -> float:
        """0 if it lives."""
        death = self._deaths.get(pid)
        return death.at if death else 0.0

    def has_cause(self, death: Death) -> bool:
        """Whether something was done to a process, or it was stuck."""
        return bool(death.cause) or death.pid in self._stuck

    def doomed(self) -> set[int]:
        """Processes that had a cause to die."""
        return {death.pid for death in self._deaths.values() if self.has_cause(death)}

    def was_held(self, run: Run, entry: Entry) -> bool:
        """Whether its process was kept from running it by a request that keeps the GIL, or hub."""
        return any(
            other.pid == run.pid
            and other.began <= run.began
            and entry.connected_at < (other.ended or self.died_at(other.pid) or entry.ended_at)
            for other in self._holders
        )

    def others(self, entry: Entry) -> int:
        """How many requests besides this one may have been in flight at a moment of its wait."""
        begun = bisect_right(self._begins, entry.ended_at)
        return begun - bisect_left(self._ends, entry.began_at) - 1

    def _find_waits(self) -> dict[int, Run]:
        """Requests of which it can be said whether another has begun before its turn."""
        found = {}
        for entry in self._counted:
            runs = self.ledger.runs.get(entry.number, [])
            if len(runs) == 1 and entry.sent_at and self._is_clear(entry, runs[0]):
                found[entry.number] = runs[0]
        return found

    def _is_clear(self, entry: Entry, run: Run) -> bool:
        """Whether it waited for long, and nothing happened meanwhile that hides the order."""
        if run.began - entry.sent_at < 2 * MOMENT or "severed" in entry.traits:
            return False
        if 0 < self.ledger.doubled_at < run.began:
            return False
        hiding = [d.at for d in self.ledger.deaths] + self.ledger.births
        hiding += [at for at, _ in self.ledger.lags]
        hiding += [at for at, what in self.ledger.story if what.startswith("SIG")]
        first, last = entry.sent_at - MOMENT, run.began + MOMENT
        if any(first < at < last for at in hiding) or self.was_held(run, entry):
            return False
        return self._is_alert(run.pid, entry.sent_at, run.began - MOMENT)

    def _is_alert(self, pid: int, first: float, last: float) -> bool:
        """Whether the process did anything then: what it was sent waits while its hub is kept."""
        return any(first < at < last for at in self._moments[pid])

    def overtaken(self, entry: Entry) -> bool:
        """Whether one that was ready surely later has begun surely earlier."""
        own = self.waits.get(entry.number)
        return own is not None and any(
            other.began_at > entry.sent_at + MOMENT and runs[0].began < own.began - MOMENT
            for other in self._counted
            if (runs := self.ledger.runs.get(other.number))
        )

    def _last_of(self, entry: Entry) -> float:
        """When it was in flight no more, at the latest."""
        runs = self.ledger.runs.get(entry.number, [])
        ends = [run.ended or self.died_at(run.pid) or float("inf") for run in runs]
        if entry.outcome in ("left", "severed") and not runs:
            ends.append(entry.ended_at + self.ledger.times.queue)  # it may have waited on
        return max([entry.ended_at, *ends])


class Case:
    """An entry, and what else the ledger has about it."""

    def __init__(self, judge: Judge, entry: Entry) -> None:
        self.judge = judge
        self.ledger = judge.ledger
        self.entry = entry
        self.times = judge.ledger.times
        self.runs: list[Run] = judge.ledger.runs.get(entry.number, [])
        self.text = entry.body.decode("latin-1")

    @property
    def outcome(self) -> str:
        """In the words of ledger.py; the status, if it was answered."""
        entry = self.entry
        return str(entry.status) if entry.outcome == "answered" else entry.outcome

    @property
    def lasted(self) -> float:
        """From the connection to the end."""
        return self.entry.ended_at - self.entry.connected_at

    @property
    def waited(self) -> float:
        """From the first byte to the end."""
        return self.entry.ended_at - (self.entry.began_at or self.entry.connected_at)

    def deaths(self, role: str) -> list[Death]:
        """While the connection was there, and the request before this one was answered.

        A death is seen late, and never early.
        """
        idle_since = self.entry.idle_since
        first = idle_since - MOMENT if idle_since else self.entry.connected_at
        last = self.entry.ended_at + MOMENT
        return [d for d in self.ledger.deaths if d.role == role and first <= d.at <= last]

    @property
    def lag(self) -> float:
        """By how much its client may have been late, for lack of CPU."""
        first = (self.entry.idle_since or self.entry.connected_at) - BIRTH
        return sum(late for at, late in self.ledger.lags if first < at < self.entry.ended_at)

    @cached_property
    def dispatcher_deaths(self) -> list[Death]:
        return self.deaths("dispatcher")


Condition = Callable[[Case], bool]


def trait(*names: str) -> Condition:
    """What the client set out to be."""
    return lambda case: not case.entry.traits.isdisjoint(names)


def kind(name: str) -> Condition:
    return lambda case: case.entry.kind == name


def action(name: str) -> Condition:
    """What the app was asked to do."""
    return lambda case: case.entry.action == name


def says(text: str) -> Condition:
    """What the answer says."""
    return lambda case: text in case.text


# The app.


def not_run(case: Case) -> bool:
    return not case.runs


def ran_whole(case: Case) -> bool:
    return len(case.runs) == 1 and case.runs[0].ended is not None


def right(case: Case) -> bool:
    """Whether the body is what the app answers to this request."""
    entry = case.entry
    return entry.body == right_body(entry.action, entry.number, entry.argument, entry.sent)


def late(case: Case) -> bool:
    """Whether request_timeout may have passed; it may have waited for the GIL for as long."""
    if not case.runs or case.judge.was_held(case.runs[0], case.entry):
        return case.waited > case.times.request - MOMENT
    return case.entry.ended_at - case.runs[0].began > case.times.request - MOMENT


def overran(case: Case) -> bool:
    """Whether it ran for longer than request_timeout, as the app saw it, or was sent for longer;
    or had waited for the GIL for as long."""
    if case.runs and case.judge.was_held(case.runs[0], case.entry):
        return case.waited > case.times.request - MOMENT
    sent = case.entry.ended_at if case.entry.action == "large" else 0.0
    return any(
        max(run.ended or case.judge.died_at(run.pid) or case.entry.ended_at, sent) - run.began
        > case.times.request - MOMENT
        for run in case.runs
    )


# Deaths.


def process_died(case: Case) -> bool:
    """The process that ran it, for a known cause, meanwhile; any process, if it had not begun."""
    causes = [death for death in case.deaths("process") if case.judge.has_cause(death)]
    return any(not case.runs or _ran_it_until(death, case) for death in causes)


def _ran_it_until(death: Death, case: Case) -> bool:
    """The app is done before the slot is, which may have much to send."""
    sending = float("inf") if case.entry.action == "large" else MOMENT
    return any(
        run.pid == death.pid and (run.ended is None or death.at < run.ended + sending)
        for run in case.runs
    )


def dispatcher_died(case: Case) -> bool:
    return bool(case.dispatcher_deaths)


def dispatcher_died_first(case: Case) -> bool:
    """While the request ran, and was not done."""
    return any(
        run.began <= death.at and (run.ended is None or run.ended > death.at + MOMENT)
        for run in case.runs
        for death in case.dispatcher_deaths
    )


# The client.


def slow_for(limit: str) -> Condition:
    """It stopped for so long; be it that it had no CPU."""

    def holds(case: Case) -> bool:
        least = getattr(case.times, limit) - MOMENT
        meant = trait("slow head", "slow body", "silent", "takes nothing", "severed")(case)
        return case.entry.longest_pause > least or (meant and case.lasted > least)

    return holds


def waited_in_queue(case: Case) -> bool:
    return case.waited > case.times.queue - MOMENT


def kept(case: Case) -> bool:
    """On a connection that had been used before."""
    return bool(case.entry.idle_since)


def idled(case: Case) -> bool:
    """For as long as a connection is kept; the client may have read the answer before late."""
    idle = case.entry.began_at - case.entry.idle_since
    return idle + case.lag > case.times.keepalive - MOMENT


# The replica.


def full(case: Case) -> bool:
    """As many others may have been in flight as the answer says."""
    found = re.search(r"The replica is full: .* \((\d+)\) admits", case.text)
    if not found or int(found[1]) not in case.ledger.bounds:
        return False
    return case.judge.others(case.entry) + _taken_for_busy(case) >= int(found[1])


def _taken_for_busy(case: Case) -> int:
    born = case.entry.began_at - BIRTH
    newborn = any(born < birth < case.entry.ended_at for birth in case.ledger.births)
    return case.ledger.largest_cap if newborn else 0


def stopping(case: Case) -> bool:
    return 0 < case.ledger.stopped_at < case.entry.ended_at


def pausing(case: Case) -> bool:
    """In a pause, or right after it."""
    ended = case.entry.ended_at
    return any(began < ended < end + PAUSED for began, end in case.ledger.pauses)


def not_listening(case: Case) -> bool:
    return 0 < case.ledger.refuses_at < case.entry.ended_at


def quick(case: Case) -> bool:
    return case.ledger.quick and stopping(case)


# The table.


class Law(NamedTuple):
    """What holds for every request; `problem` says what is wrong if it does not."""

    problem: str
    holds: Condition


class Rule:
    """An outcome that is right, if all these conditions hold."""

    def __init__(self, outcome: str, why: str, *conditions: Condition) -> None:
        self.outcome = outcome
        self.why = why
        self.conditions = conditions


def _has_outcome(case: Case) -> bool:
    return bool(case.entry.outcome)


def _ran_once(case: Case) -> bool:
    return len(case.runs) <= 1


def _answered_once(case: Case) -> bool:
    return not case.entry.beyond


def _ended(case: Case) -> bool:
    return all(run.ended is not None or case.judge.died_at(run.pid) for run in case.runs)


def _in_turn(case: Case) -> bool:
    return not case.judge.overtaken(case.entry)


def _prompt(case: Case) -> bool:
    return case.entry.kind != "probe" or case.waited < SLOW_PROBE or dispatcher_died(case)


LAWS = (
    Law("lost: nobody knows what became of it", _has_outcome),
    Law("run twice", _ran_once),
    Law("answered twice", _answered_once),
    Law("never ended, though its process lives", _ended),
    Law("a slow probe", _prompt),
    Law("overtaken by one that was ready later", _in_turn),
)

RULES = (
    Rule("200", "the right body", ran_whole, right),
    Rule("500", "the app failed", ran_whole, action("fail")),
    Rule("200", "a probe", kind("probe"), not_run),
    Rule("503", "a probe: not ready", kind("probe"), not_run),
    # Refused.
    Rule("503", "full", not_run, full),
    Rule("503", "queue_timeout", not_run, says("within queue_timeout"), waited_in_queue),
    Rule("503", "X-Queue-Timeout", not_run, says("within X-Queue-Timeout"), trait("impatient")),
    Rule("503", "exempt slots busy", not_run, says("slots for exempt"), kind("exempt")),
    Rule("503", "stop", says("shutting down"), stopping),
    Rule("431", "large head", not_run, trait("large head")),
    Rule("400", "malformed", not_run, trait("malformed")),
    # Its client was slow.
    Rule("408", "slow head", not_run, says("header_timeout"), slow_for("header")),
    Rule("408", "slow body", says("receive_timeout"), slow_for("receive")),
    Rule("cut", "send_timeout", trait("takes nothing"), slow_for("send")),
    Rule("closed", "silent", not_run, trait("silent"), slow_for("header")),
    Rule("closed", "idle", not_run, kept, idled),
    Rule("closed", "half-closed, and had to wait", not_run, trait("half-closed")),
    # Its process died, or it was stuck.
    Rule("502", "process died", says("working on this request died"), process_died),
    Rule("504", "overdue", says("request_timeout"), late),
    Rule("cut", "process died", process_died),
    Rule("closed", "process died, about to answer", ran_whole, process_died),
    Rule("cut", "overdue", overran),
    Rule("cut", "the app failed late", ran_whole, action("late")),
    # The dispatcher died.
    Rule("closed", "dispatcher died: waited, or came in part", not_run, dispatcher_died),
    Rule("closed", "dispatcher died, then the process", dispatcher_died_first, process_died),
    Rule("cut", "dispatcher died while it sent the rest", ran_whole, dispatcher_died),
    # The stop.
    Rule("closed", "stop: silent", not_run, stopping, trait("silent")),
    Rule("closed", "stop: idle", not_run, stopping, kept),
    Rule("503", "pause: no process left", not_run, says("shutting down"), pausing, process_died),
    Rule("closed", "pause: silent", not_run, pausing, trait("silent")),
    Rule("closed", "pause: idle", not_run, pausing, kept),
    Rule("refused", "stop", not_run, not_listening),
    Rule("closed", "quick stop", quick),
    Rule("cut", "quick stop", quick),
    Rule("500", "quick stop", quick),  # SystemExit, in the app's own thread (gunicorn's)
    # The client's own doing.
    Rule("left", "the client left", trait("leaves")),
    Rule("severed", "its network was cut", trait("severed")),
)
