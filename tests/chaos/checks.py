"""What must be so of the server itself, all the time and in the end."""

from __future__ import annotations

import os
import re
import select
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from server import Server, all_pids, environ_of, wait_for

from chaos.app import Limits
from chaos.ledger import Death, Ledger
from chaos.rules import BIRTH, MOMENT
from replica_plugin.decisions import Rules
from replica_plugin.pages import MasterPage, ReplicaPage
from replica_plugin.rules import decode_wishes

GLANCE = 0.02  # seconds between two looks of the watcher
BELATED = 2.0  # seconds for which limits that were lowered may still be those from before
DRAINING = 30.0  # and for which requests may be in flight that a larger bound has let in
MEMORY = 12 << 10  # KiB by which a process may have grown


class Watcher:
    """A thread that sees processes die, and tells the app what may be.

    The app is told the largest cap that has been on the master's page lately, or is about to be.
    """

    def __init__(self, server: Server, ledger: Ledger, folder: Path, limits: Limits) -> None:
        self.causes: dict[int, str] = {}  # pid to what was done to it
        self._exceeded: list[tuple[float, str]] = []
        self.masters = 1  # each of which may have as much as the settings say
        self._server = server
        self._ledger = ledger
        self._events = open(folder / "events")
        self._limits = limits
        self._page = MasterPage(self._open_page("replica-master"))
        self._replica_page = ReplicaPage(self._open_page("replica-numbers"))
        self._publishing = threading.Lock()
        self._announced: Rules | None = None
        self._seen: list[tuple[float, Rules]] = []  # when last
        self._roles: dict[int, tuple[str, int]] = {}  # pidfd to role and pid
        self._known: set[int] = {0}
        self._running: dict[int, set[str]] = defaultdict(set)
        self._poll = select.poll()
        self._ended = threading.Event()
        self.rules = self._read() or Rules()
        self._watch("master", server.process.pid)
        self._thread = threading.Thread(target=self._run, name="watcher")
        self._thread.start()

    def announce(self, rules: Rules) -> None:
        """These are about to be on the page; the app knows when this returns."""
        assert self._thread.is_alive(), "the watcher has failed"
        with self._publishing:
            self._announced = rules
            self._publish(self.rules, time.monotonic())

    def await_announced(self) -> None:
        """Wait until they are."""
        wanted = self._announced
        assert wanted is not None

        def shown() -> bool:
            now = self.rules
            return (now.processes, now.threads, now.bound) == (
                wanted.processes, wanted.threads, wanted.bound,
            )  # fmt: skip

        wait_for(shown, f"the master has taken {wanted}")
        self._announced = None

    def busy(self) -> list[int]:
        """Processes that run something, as far as was seen."""
        return sorted(pid for pid, numbers in list(self._running.items()) if numbers)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
        self._ledger.deaths = [
            death._replace(cause=self.causes.get(death.pid, "")) for death in self._ledger.deaths
        ]

    def unasked(self) -> list[str]:
        """Deaths of helpers to which nothing was done, before the stop."""
        stopped = self._ledger.stopped_at or float("inf")
        return [
            f"the {death.role} (pid {death.pid}) died of itself"
            for death in self._ledger.deaths
            if death.role != "process" and not death.cause and death.at < stopped
        ]

    def exceeded(self) -> list[str]:
        """What the app found. A new dispatcher counts slots as busy that may not be."""
        births = self._ledger.births
        return [
            problem
            for at, problem in self._exceeded
            if ": bound:" not in problem
            or not any(at - BIRTH < birth < at + MOMENT for birth in births)
        ]

    def _run(self) -> None:
        while not self._ended.wait(GLANCE):
            self._look()

    def _look(self) -> None:
        for line in self._events.readlines():
            self._on_event(line)
        living = self._replica_page.find_living()
        if living is not None:
            os.close(living[1])
            self._watch("dispatcher", living[0])
        rules = self._read()
        if rules is not None:
            self._watch("supervisor", self._supervisor)
            with self._publishing:
                if rules.processes:  # in a pause what has come is finished as before
                    self.rules = rules
                self._publish(self.rules, time.monotonic())
        for fd, _ in self._poll.poll(0):
            self._on_death(fd)

    def _on_event(self, line: str) -> None:
        event, number, pid, at, more = line.split(" ", 4)
        if event == "BEGUN":
            self._running[int(pid)].add(number)
        elif event == "ENDED":
            self._running[int(pid)].discard(number)
        elif event == "LOADED":
            self._watch("process", int(pid))
        elif event == "FATAL":
            self.causes[int(pid)] = f"{more.strip()} in request {number}"
        elif event == "EXCEEDED":
            problem = f"exceeded, seen by request {number}: {more.strip()}"
            self._exceeded.append((float(at), problem))

    def _watch(self, role: str, pid: int) -> None:
        if pid in self._known:
            return
        self._known.add(pid)
        if role == "dispatcher":
            self._ledger.births.append(time.monotonic())
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ledger.deaths.append(Death(role, pid, time.monotonic(), ""))
            return
        self._roles[pidfd] = role, pid
        self._poll.register(pidfd, select.POLLIN)

    def _on_death(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        os.close(pidfd)
        role, pid = self._roles.pop(pidfd)
        self._running.pop(pid, None)
        self._ledger.deaths.append(Death(role, pid, time.monotonic(), ""))

    def _open_page(self, name: str) -> int:
        """One of the pages that the master holds."""

        def found() -> int | None:
            for link in Path(f"/proc/{self._server.process.pid}/fd").iterdir():
                with suppress(OSError):
                    if f"memfd:{name}" in os.readlink(link):
                        return os.open(link, os.O_RDWR)
            return None

        return int(wait_for(found, f"the page {name}"))

    def _read(self) -> Rules | None:
        state = self._page.read()
        if state is None:
            return None
        wishes = decode_wishes(state)
        self._supervisor = wishes.supervisor
        return wishes.rules

    def _publish(self, rules: Rules, now: float) -> None:
        self._seen = [(at, r) for at, r in self._seen if r != rules and now - at < DRAINING]
        self._seen.append((now, rules))
        possible = [r for at, r in self._seen if now - at < BELATED]
        drained = [r for _, r in self._seen]
        if self._announced is not None:
            possible.append(self._announced)
            drained.append(self._announced)
        cap = max(r.cap for r in possible)
        self._ledger.bounds.update(r.bound for r in drained)
        self._ledger.largest_cap = max(self._ledger.largest_cap, cap)
        processes = max(r.processes for r in possible)
        bound = max(r.bound for r in drained)
        self._limits.write(self.masters * cap, self.masters * processes, bound)


class Usage(NamedTuple):
    """What one process holds."""

    descriptors: int
    threads: int
    memory: int  # KiB of its own

    @classmethod
    def of(cls, pid: int) -> Usage:
        status = Path(f"/proc/{pid}/status").read_text()
        return cls(
            len(os.listdir(f"/proc/{pid}/fd")),
            len(os.listdir(f"/proc/{pid}/task")),
            int(status.partition("RssAnon:")[2].split()[0]),
        )


def usage(server: Server) -> dict[str, list[Usage]]:
    """By role."""
    pids = {
        "master": [server.process.pid],
        "supervisor": [server.supervisor],
        "dispatcher": [server.dispatcher],
        "process": server.workers,
    }
    return {role: [Usage.of(pid) for pid in each] for role, each in pids.items()}


def growth(before: dict[str, list[Usage]], after: dict[str, list[Usage]]) -> list[str]:
    """What has not returned to where it began."""
    found = []
    for role, then in before.items():
        most = Usage(*(max(values) for values in zip(*then)))
        if len(after[role]) != len(then):
            found.append(f"{role}: {len(after[role])} of them, {len(then)} in the beginning")
        limit = most._replace(memory=most.memory + MEMORY)
        for now in after[role]:
            if any(value > may for value, may in zip(now, limit)):
                found.append(f"{role} has grown: {most}, now {now}")
    return found


def left(folder: Path) -> list[int]:
    """Processes that are there still, the app's children included."""
    mark = f"CHAOS={folder}\0".encode()
    return [pid for pid in all_pids() if mark in environ_of(pid)]


_ENDED = re.compile(r"Worker \(pid:(\d+)\) (was sent SIG(?!TERM)\w+|exited with code \d+)")


def unexplained(log: str, doomed: set[int]) -> list[str]:
    """Processes that did not end well, though they had no cause to, and could load the app."""
    could_not_load = re.findall(r"\[(\d+)\] \[ERROR\] The app cannot be loaded", log)
    known = {int(pid) for pid in could_not_load} | doomed
    return [
        f"process {pid} {how}, of itself"
        for pid, how in _ENDED.findall(log)
        if int(pid) not in known
    ]


def tracebacks(log: str) -> list[str]:
    """Tracebacks in the log that end in our code, but for those of an interrupt."""
    found = re.findall(r"(?m)^Traceback .*\n(?:(?: .*)?\n)*\S.*", log)
    return [f"in the log: {each}" for each in found if _is_ours(each)]


def _is_ours(traceback: str) -> bool:
    files = [line for line in traceback.split("\n") if line.startswith("  File ")]
    last = traceback.rpartition("\n")[2]
    return bool(files) and "/replica_plugin/" in files[-1] and "OverdueError" not in last
