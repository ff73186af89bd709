"""Every request that was sent, what became of it, and the rules by which that is right.

An entry is written by its client, a run (begun, ended, in which process) by the app, a death by
whoever watches the processes. At the end each entry must satisfy the LAWS, all of them, and have
one of the outcomes that RULES allow, for one of the reasons given there.

    outcome     what the client saw
    answered    a whole response; `status` and `body` say which
    cut         a response that ended before its end
    closed      the end of the connection, and not a byte of a response
    refused     no connection
    left        nothing: it left, or never read
    severed     nothing, or not all: its network was cut
    silence     nothing, for longer than anybody is to wait
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from chaos.app import right_body

MOMENT = 0.25
"""Seconds by which clocks of several processes may see the same thing at different times."""


@dataclass(frozen=True)
class Times:
    """The settings of every server of a run, in seconds."""

    queue: float = 4.0
    request: float = 2.0
    grace: float = 3.0
    header: float = 3.0
    receive: float = 3.0
    send: float = 3.0
    keepalive: float = 2.0
    graceful: float = 30.0


class Run(NamedTuple):
    """A request in the app."""

    pid: int
    began: float
    ended: float | None


class Death(NamedTuple):
    """The end of a process. `cause` is what we, or its app, did to it; empty if nothing."""

    role: str
    pid: int
    at: float
    cause: str


@dataclass
class Entry:
    """One request, as its client knows it. Times are monotonic; 0 is never."""

    number: int
    kind: str
    action: str = "nap"
    argument: str = "0"
    sent: bytes = b""  # the body
    traits: frozenset[str] = frozenset()
    connected_at: float = 0.0
    idle_since: float = 0.0  # the connection was, until it was sent
    began_at: float = 0.0  # to send it
    last_sent_at: float = 0.0  # some of it
    longest_pause: float = 0.0  # between two parts, for whatever reason
    sent_at: float = 0.0  # all of it
    ended_at: float = 0.0
    outcome: str = ""
    status: int = 0
    body: bytes = b""
    beyond: bytes = b""
    story: list[tuple[float, str]] = field(default_factory=list)

    def tell(self, what: str) -> None:
        self.story.append((time.monotonic(), what))

    def end(self, outcome: str, why: str = "") -> None:
        """Once: what comes first counts."""
        if not self.outcome:
            self.outcome = outcome
            self.ended_at = time.monotonic()
            self.tell(f"{outcome} {self.status or ''} {why}".strip())

    def note_pause(self) -> None:
        since = self.last_sent_at or self.connected_at
        self.longest_pause = max(self.longest_pause, time.monotonic() - since)

    @property
    def path(self) -> str:
        if self.kind == "exempt":
            return f"/exempt?{self.number}"
        return f"/{self.action}/{self.number}/{self.argument}"


@dataclass
class Ledger:
    """All of a run."""

    times: Times = field(default_factory=Times)
    entries: dict[int, Entry] = field(default_factory=dict)
    runs: dict[int, list[Run]] = field(default_factory=lambda: defaultdict(list))
    deaths: list[Death] = field(default_factory=list)
    bounds: set[int] = field(default_factory=set)  # all there were
    largest_cap: int = 0
    stopped_at: float = 0.0  # TERM to the master
    story: list[tuple[float, str]] = field(default_factory=list)  # what was done to the server

    def open(self, kind: str, action: str = "nap", argument: str = "0", **more: object) -> Entry:
        entry = Entry(len(self.entries) + 1, kind, action, argument, **more)  # type: ignore[arg-type]
        self.entries[entry.number] = entry
        return entry

    def tell(self, what: str) -> None:
        self.story.append((time.monotonic(), what))

    def read_runs(self, lines: Iterable[str]) -> None:
        """What the app has noted."""
        open_runs: dict[tuple[int, int], list[Run]] = defaultdict(list)
        for line in lines:
            event, number, pid, at, *_ = line.split(" ")
            key = int(number), int(pid)
            if event == "BEGUN":
                run = Run(key[1], float(at), None)
                self.runs[key[0]].append(run)
                open_runs[key].append(run)
            elif event == "ENDED" and open_runs[key]:
                run = open_runs[key].pop()
                of_number = self.runs[key[0]]
                of_number[of_number.index(run)] = run._replace(ended=float(at))

    def problems(self) -> list[str]:
        """Every entry that is not as it has to be, with its whole history."""
        judge = Judge(self)
        found = [
            f"{problem}\n{self.history(entry)}"
            for entry in self.entries.values()
            for problem in judge.problems(entry)
        ]
        unknown = self.runs.keys() - self.entries.keys()
        return found + [f"run unseen: request {number} was never sent" for number in unknown]

    def outcomes(self) -> Counter[str]:
        """How often each rule was the one."""
        judge = Judge(self)
        return Counter(judge.reason(entry) or "?" for entry in self.entries.values())

    def history(self, entry: Entry) -> str:
        """What the client, the app and everybody else did, in order."""
        lines = [(at, f"client   {what}") for at, what in entry.story]
        pids = set()
        for run in self.runs.get(entry.number, []):
            pids.add(run.pid)
            lines.append((run.began, f"process  {run.pid} has begun it"))
            if run.ended is not None:
                lines.append((run.ended, f"process  {run.pid} has ended it"))
        first, last = entry.connected_at - 1.0, (entry.ended_at or entry.connected_at) + 1.0
        lines += [(at, f"run      {what}") for at, what in self.story if first <= at <= last]
        lines += [
            (death.at, f"death    of {death.role} {death.pid}: {death.cause or 'its own'}")
            for death in self.deaths
            if first <= death.at <= last or death.pid in pids
        ]
        traits = ", ".join(sorted(entry.traits)) or "none"
        head = f"request {entry.number}: {entry.kind}, {entry.path}, traits: {traits}"
        told = f"    body: {entry.body[:200]!r}" if entry.body else "    no body"
        start = entry.connected_at or (lines[0][0] if lines else 0.0)
        return "\n".join(
            [head, told, *(f"    {at - start:+9.3f} {what}" for at, what in sorted(lines))]
        )


class Case:
    """An entry, and what is asked about it."""

    def __init__(self, judge: Judge, entry: Entry) -> None:
        self._judge = judge
        self._ledger = judge.ledger
        self.entry = entry
        self.times = judge.ledger.times
        self.runs = judge.ledger.runs.get(entry.number, [])
        self.text = entry.body.decode("latin-1")

    # The client.

    def has(self, *traits: str) -> bool:
        return not self.entry.traits.isdisjoint(traits)

    def says(self, text: str) -> bool:
        return text in self.text

    @property
    def lasted(self) -> float:
        """From the connection to the end."""
        return self.entry.ended_at - self.entry.connected_at

    @property
    def waited(self) -> float:
        """From the first byte to the end."""
        return self.entry.ended_at - (self.entry.began_at or self.entry.connected_at)

    def was_slow(self, limit: float) -> bool:
        """Whether the client stopped in the middle for so long; it may have had no CPU."""
        return max(self.entry.longest_pause, self.lasted) > limit - MOMENT and (
            self.has("slow head", "slow body", "severed")
            or self.entry.longest_pause > limit - MOMENT
        )

    @property
    def body_is_right(self) -> bool:
        entry = self.entry
        if entry.kind == "probe":
            return True
        return entry.body == right_body(entry.action, entry.number, entry.argument, entry.sent)

    # The app.

    @property
    def ran(self) -> bool:
        return bool(self.runs)

    @property
    def ran_whole(self) -> bool:
        return len(self.runs) == 1 and self.runs[0].ended is not None

    @property
    def is_overdue(self) -> bool:
        """It had the time to be so: it may have waited for the GIL, and not begun in the app."""
        began = self.runs[0].began if self.runs else self.entry.connected_at
        return self.entry.ended_at - began > self.times.request - MOMENT

    @property
    def has_overrun(self) -> bool:
        """It ran for longer than request_timeout, as the app saw it."""
        return any(
            (run.ended or self._judge.died_at(run.pid) or self.entry.ended_at) - run.began
            > self.times.request - MOMENT
            for run in self.runs
        )

    # Deaths.

    def _deaths(self, role: str) -> list[Death]:
        """While the connection was there; a death is seen late, and never early."""
        entry = self.entry
        first, last = entry.connected_at, entry.ended_at + MOMENT
        return [d for d in self._ledger.deaths if d.role == role and first <= d.at <= last]

    @property
    def process_died(self) -> bool:
        """The process that ran it died while it did, for a known cause; any, if it had not begun."""
        if not self.runs:
            return any(self._judge.cause(death) for death in self._deaths("process"))
        run = self.runs[0]
        return any(
            death.pid == run.pid and self._judge.cause(death) and run.ended is None
            for death in self._deaths("process")
        )

    @property
    def dispatcher_died(self) -> bool:
        return bool(self._deaths("dispatcher"))

    @property
    def was_running_then(self) -> bool:
        """Whether it ran, and was not done, when a dispatcher died."""
        return any(
            run.began <= death.at and (run.ended is None or run.ended > death.at + MOMENT)
            for run in self.runs
            for death in self._deaths("dispatcher")
        )

    # The replica.

    @property
    def was_full(self) -> bool:
        """As many others may have been in flight as the answer says."""
        found = re.search(r"\((\d+)\) admits", self.text)
        if not found or int(found[1]) not in self._ledger.bounds:
            return False
        unknown = self._ledger.largest_cap if self._judge.newborn(self.entry) else 0
        return self._judge.others(self.entry) + unknown >= int(found[1])

    @property
    def is_stopping(self) -> bool:
        stopped = self._ledger.stopped_at
        return bool(stopped) and self.entry.ended_at > stopped

    @property
    def came_after_stop(self) -> bool:
        stopped = self._ledger.stopped_at
        return bool(stopped) and self.entry.ended_at > stopped


class Law(NamedTuple):
    """What holds for every request; `problem` says what is wrong if it does not."""

    problem: str
    holds: Callable[[Case], bool]


class Rule(NamedTuple):
    """An outcome (a status, if answered) that is right, and when."""

    outcome: str
    why: str
    holds: Callable[[Case], bool]


SLOW_PROBE = 5.0  # seconds, on a machine that has no CPU to spare

LAWS = (
    Law("lost: nothing became of it", lambda c: bool(c.entry.outcome)),
    Law("run twice", lambda c: len(c.runs) <= 1),
    Law("answered twice", lambda c: not c.entry.beyond),
    Law(
        "a slow probe",
        lambda c: c.entry.kind != "probe" or c.waited < SLOW_PROBE or c.dispatcher_died,
    ),
    Law("never ended, though its process lives", lambda c: c._judge.all_ended(c.runs)),
)

RULES = (
    Rule("200", "the right body", lambda c: c.ran_whole and c.body_is_right),
    Rule("200", "a probe", lambda c: c.entry.kind == "probe"),
    Rule("503", "a probe: not ready", lambda c: c.entry.kind == "probe"),
    Rule("500", "the app failed", lambda c: c.entry.action == "fail" and c.ran_whole),
    # Refusals: it was not run.
    Rule("503", "full", lambda c: not c.ran and c.says("The replica is full") and c.was_full),
    Rule("503", "queue_timeout", lambda c: not c.ran and c.says("within queue_timeout") and c.waited > c.times.queue - MOMENT),
    Rule("503", "X-Queue-Timeout", lambda c: not c.ran and c.says("within X-Queue-Timeout") and c.has("impatient")),
    Rule("503", "exempt slots busy", lambda c: not c.ran and c.says("slots for exempt") and c.entry.kind == "exempt"),
    Rule("503", "stop", lambda c: c.says("shutting down") and c.is_stopping),
    Rule("408", "slow head", lambda c: not c.ran and c.says("header_timeout") and c.was_slow(c.times.header)),
    Rule("408", "slow body", lambda c: c.says("receive_timeout") and c.was_slow(c.times.receive)),
    Rule("431", "large head", lambda c: not c.ran and c.has("large head")),
    Rule("400", "malformed", lambda c: not c.ran and c.has("malformed")),
    # Its process was killed, or stuck.
    Rule("502", "process died", lambda c: c.says("working on this request died") and c.process_died),
    Rule("504", "overdue", lambda c: c.says("request_timeout") and c.is_overdue),
    Rule("cut", "process died", lambda c: c.process_died),
    Rule("cut", "overdue", lambda c: c.has_overrun),
    Rule("cut", "the app failed late", lambda c: c.entry.action == "late" and c.ran_whole),
    # Its client was slow.
    Rule("cut", "send_timeout", lambda c: c.has("takes nothing") and c.lasted > c.times.send - MOMENT),
    Rule("closed", "silent for header_timeout", lambda c: c.has("silent") and c.lasted > c.times.header - MOMENT),
    Rule("closed", "idle", lambda c: not c.ran and bool(c.entry.idle_since) and c.entry.began_at - c.entry.idle_since > c.times.keepalive - MOMENT),
    Rule("closed", "half-closed, and had to wait", lambda c: not c.ran and c.has("half-closed")),
    # The dispatcher died.
    Rule("closed", "waited, or came in part, when the dispatcher died", lambda c: not c.ran and c.dispatcher_died),
    Rule("closed", "dispatcher died, then the process", lambda c: c.was_running_then and (c.process_died or c.has_overrun)),
    Rule("closed", "about to be told 504 when the dispatcher died", lambda c: c.has_overrun and c.dispatcher_died),
    Rule("cut", "being sent when the dispatcher died", lambda c: c.ran_whole and c.dispatcher_died),
    # The stop.
    Rule("closed", "silent when it stopped", lambda c: not c.ran and c.is_stopping and (c.has("silent") or bool(c.entry.idle_since))),
    Rule("refused", "it had stopped", lambda c: not c.ran and c.came_after_stop),
    # The client's own doing.
    Rule("left", "the client left", lambda c: c.has("leaves")),
    Rule("severed", "its network was cut", lambda c: c.has("severed")),
)  # fmt: skip


class Judge:
    """The ledger, sorted for questions."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._deaths = {d.pid: d for d in ledger.deaths if d.role == "process"}
        counted = [e for e in ledger.entries.values() if e.kind not in ("probe", "exempt")]
        self._begins = sorted(e.began_at for e in counted if e.began_at)
        self._ends = sorted(self._last_of(e) for e in counted if e.began_at)
        self._stuck = {
            run.pid
            for number, runs in ledger.runs.items()
            for run in runs
            if run.ended is None
            and (died := self.died_at(run.pid))
            and died - run.began > ledger.times.request
        }

    def problems(self, entry: Entry) -> list[str]:
        case = Case(self, entry)
        broken = [law.problem for law in LAWS if not law.holds(case)]
        if not broken and self.reason(entry) is None:
            broken = [f"no rule allows: {_outcome(entry)}"]
        return broken

    def reason(self, entry: Entry) -> str | None:
        """The first rule that allows what became of it."""
        case, outcome = Case(self, entry), _outcome(entry)
        for rule in RULES:
            if rule.outcome == outcome and rule.holds(case):
                return f"{rule.outcome}: {rule.why}"
        return None

    def died_at(self, pid: int) -> float:
        death = self._deaths.get(pid)
        return death.at if death else 0.0

    def cause(self, death: Death) -> str:
        """Why a process died: what was done to it, or that it was stuck."""
        return death.cause or ("stuck" if death.pid in self._stuck else "")

    def all_ended(self, runs: list[Run]) -> bool:
        return all(run.ended is not None or self.died_at(run.pid) for run in runs)

    def others(self, entry: Entry) -> int:
        """How many requests besides this one may have been in flight at a moment of its wait."""
        begun = bisect_right(self._begins, entry.ended_at)
        return begun - bisect_left(self._ends, entry.began_at) - 1

    def newborn(self, entry: Entry) -> bool:
        """Whether a dispatcher died not long before, whose successor takes slots for busy."""
        return any(
            death.role == "dispatcher" and entry.began_at - 3.0 < death.at < entry.ended_at
            for death in self.ledger.deaths
        )

    def _last_of(self, entry: Entry) -> float:
        """When it was in flight no more, at the latest."""
        ends = [entry.ended_at]
        for run in self.ledger.runs.get(entry.number, []):
            ends.append(run.ended or self.died_at(run.pid) or float("inf"))
        if entry.outcome in ("left", "severed") and len(ends) == 1:
            ends.append(entry.ended_at + self.ledger.times.queue)  # it may have waited on
        return max(ends)


def _outcome(entry: Entry) -> str:
    return str(entry.status) if entry.outcome == "answered" else entry.outcome
