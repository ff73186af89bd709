"""Every request that was sent, and what became of it.

An entry is written by its client, a run (begun, ended, in which process) by the app, a death by
whoever watches the processes. rules.py says which of it is right.

    outcome     what the client saw
    answered    a whole response; `status` and `body` say which
    garbled     something that is no response
    cut         a response that ended before its end
    closed      the end of the connection, and not a byte of a response
    refused     no connection
    left        nothing: it left, or never read
    severed     nothing, or not all: its network was cut
    silence     nothing, for longer than anybody is to wait
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


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
    drain: float = 0.0


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
    births: list[float] = field(default_factory=list)  # of dispatchers
    lags: list[tuple[float, float]] = field(default_factory=list)  # when clients were late, by what
    bounds: set[int] = field(default_factory=set)  # all there were
    largest_cap: int = 0
    stopped_at: float = 0.0  # drain_delay is over; or the master was killed
    refuses_at: float = 0.0  # nobody listens any more, from about then on
    doubled_at: float = 0.0  # there were two masters, and so two queues, from then on
    quick: bool = False  # it was a stop that waits for nothing
    pauses: list[tuple[float, float]] = field(default_factory=list)  # from, to
    spared: list[float] = field(default_factory=list)  # a dispatcher died, and slots were free
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
            event, number, pid, at, *_ = line.split()
            key = int(number), int(pid)
            if event == "BEGUN":
                run = Run(key[1], float(at), None)
                self.runs[key[0]].append(run)
                open_runs[key].append(run)
            elif event == "ENDED" and open_runs[key]:
                run = open_runs[key].pop()
                of_number = self.runs[key[0]]
                of_number[of_number.index(run)] = run._replace(ended=float(at))

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
        lines += [
            (at, f"clients  were late by {late:.2f} s")
            for at, late in self.lags
            if first <= at <= last
        ]
        if entry.idle_since:
            lines.append((entry.idle_since, "client   has read the answer before this"))
        traits = ", ".join(sorted(entry.traits)) or "none"
        head = f"request {entry.number}: {entry.kind}, {entry.path}, traits: {traits}"
        told = f"    body: {entry.body[:200]!r}" if entry.body else "    no body"
        start = entry.connected_at or (lines[0][0] if lines else 0.0)
        return "\n".join(
            [head, told, *(f"    {at - start:+9.3f} {what}" for at, what in sorted(lines))]
        )
