"""The dispatcher: the one process that owns listeners, connections and the queue.

    clients.py -> ready -> decisions.py -> send -> processes.py -> a slot, and back

It runs no user code, and joins three parts that do not know each other: clients (sockets
and bytes), decisions (plain values) and processes (channels). Each turn of its loop takes
events of clients first, so that a client that has left is not run; then those of processes
and listeners; then what is due.

It reads the master's page when nudged, tells the replica's page at least once a second that
it lives, and ends when a stop is done. Were it to die at any instant, the supervisor starts
another one; what that must know lies in the pages and in the processes.
"""

from __future__ import annotations

import itertools
import math
import os
import select
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from . import answers
from .channel import Adopt, Job, Kind, Report
from .clients import Clients
from .connection import Connection
from .decisions import Action, Decisions, Dismiss, Lost, Refuse, Send, Spare
from .head import Head
from .heritage import Heritage
from .journal import Journal
from .listeners import Listener
from .pages import MasterPage, Numbers, ReplicaPage
from .processes import Link, Processes
from .rules import Stop, Wishes, decode_wishes

TURN = 1.0  # seconds the loop sleeps at most: the heartbeat


@dataclass(frozen=True)
class Frame:
    """What every dispatcher of this replica is born with."""

    listeners: tuple[socket.socket, ...]
    control: socket.socket
    master_page: MasterPage
    replica_page: ReplicaPage
    nudge: int  # eventfd, written by the master after its page
    master_pidfd: int
    master_pid: int


class Dispatcher:
    """One life of the dispatcher."""

    def __init__(self, frame: Frame, wishes: Wishes, journal: Journal) -> None:
        self._frame = frame
        self._wishes = wishes
        self._journal = journal
        self._epoll = select.epoll()
        self._decisions = Decisions(wishes.rules)
        self._requests: dict[int, Connection] = {}
        self._next = itertools.count(time.monotonic_ns() // 1000)  # never a number used before
        self._processes = Processes(self._epoll, frame.control, self)
        listeners = [Listener(sock) for sock in frame.listeners]
        self._clients = Clients(self._epoll, listeners, wishes.serving, self)
        self._stop: Stop | None = None
        self._heritage = Heritage(self._epoll, frame.replica_page, frame.master_pid)
        self._ended = False
        self._spared = frame.replica_page.read().spared
        self._decisions.was_ready = self._heritage.was_ready
        for age, slots, _ in self._heritage.rows():
            self._decisions.expected(age, slots)
        for fd in (frame.nudge, frame.master_pidfd):
            self._epoll.register(fd, select.EPOLLIN)
        self._obey(wishes, time.monotonic())

    def run(self) -> None:
        """Serve until a stop is done."""
        while not self._ended:
            due = self._next_deadline()
            wait = min(TURN, max(0.0, due - time.monotonic()))
            events = self._epoll.poll(wait)
            now = time.monotonic()
            self._on_events(events, now)
            self._tick(due <= now, now)
            self._frame.replica_page.write(self._numbers(now))

    def _on_events(self, events: Iterable[tuple[int, int]], now: float) -> None:
        others = []
        connections = self._clients.connections
        for fd, mask in events:
            conn = connections.get(fd)
            if conn is not None:
                self._clients.on_event(conn, mask, now)
            else:
                others.append((fd, mask))
        for fd, mask in others:
            if fd in self._clients.listeners:
                self._clients.on_listener(fd, now)
            elif fd == self._frame.nudge:
                self._on_nudge(now)
            elif fd == self._frame.master_pidfd:
                self._on_master_death(now)
            elif fd in self._heritage:
                age = self._heritage.died(fd)
                self._perform(self._decisions.died(age, (), now), now)
            else:
                self._processes.on_event(fd, mask, now)

    def _next_deadline(self) -> float:
        return min(
            self._clients.next_deadline(),
            self._decisions.next_expiry(),
            self._journal.next_deadline(),
            self._next_of_stop(),
        )

    def _tick(self, due: bool, now: float) -> None:
        if due:
            self._clients.tick(now)
            self._journal.tick(now)
        self._perform(self._decisions.tick(now), now)
        if self._stop is not None and self._stop.graceful:
            self._go_on_stopping(self._stop, now)

    def _numbers(self, now: float) -> Numbers:
        decisions = self._decisions
        return Numbers(
            now,
            decisions.was_ready,
            decisions.usable,
            self._processes.slots,
            len(decisions.waiting),
            decisions.in_flight - len(decisions.waiting),
            decisions.rules.bound,
            len(self._clients.connections),
            self._clients.unsent,
            self._spared,
        )

    # What the clients' side asks (clients.Judge).

    def on_ready(self, conn: Connection, now: float) -> None:
        conn.request = next(self._next)
        self._requests[conn.request] = conn
        head = conn.head or Head(0)
        exempt = head.path in self._wishes.serving.exempt and head.is_plain
        self._perform(self._decisions.ready(conn.request, now, head.patience, exempt), now)

    def on_gone(self, conn: Connection) -> None:
        del self._requests[conn.request]
        self._decisions.gone(conn.request)

    def on_answered(self, conn: Connection, answer: answers.Answer, now: float) -> None:
        self._journal.answered(conn, answer, now)

    def on_cut_off(self, conn: Connection, now: float) -> None:
        self._journal.cut_off(now)

    def on_shortage(self, now: float) -> None:
        self._journal.shortage(now)

    def probe(self, name: bytes) -> answers.Answer:
        if name.endswith(b"readyz"):
            return answers.probe(self._decisions.is_ready, "ready", "not ready")
        healthy = self._decisions.is_healthy
        return answers.probe(healthy, "healthy", "no process is usable or booting")

    # What the processes' side tells (processes.Office).

    def on_registered(self, link: Link, again: bool, leaving: bool) -> None:
        now = time.monotonic()
        self._heritage.back(link.age)
        owed = link.slots + link.extra if again else 0
        self._perform(self._decisions.registered(link.age, link.slots, owed, link.extra), now)
        if leaving:
            self._perform(self._decisions.leaving(link.age), now)
        self._write_table()

    def on_report(self, link: Link, report: Report, now: float) -> None:
        if report.kind is Kind.FREE:
            self._perform(self._decisions.freed(link.age, now), now)
        elif report.kind is Kind.LEAVING:
            self._perform(self._decisions.leaving(link.age), now)
        else:
            self._on_done(link, report, now)

    def _on_done(self, link: Link, report: Report, now: float) -> None:
        """The credit goes to the queue's head before the connection that gave it is looked at."""
        if not self._decisions.runs(link.age, report.request):
            if report.rest is not None:
                report.rest.close()
            return  # said twice, or of another process's request
        conn = self._requests.pop(report.request)
        self._perform(self._decisions.done(link.age, report.request, now), now)
        self._clients.give_back(conn, report, now)

    def on_sendable(self, link: Link, now: float) -> None:
        self._perform(self._decisions.sendable(link.age, now), now)

    def on_nonsense(self, link: Link) -> None:
        self._journal.error("Process %d says what no process of ours says: killing it", link.pid)

    def on_death(self, link: Link, now: float) -> None:
        begun = link.cells.begun()
        process = self._decisions.processes.get(link.age)
        unread = set(process.requests) - begun.keys() if process else set()
        for action in self._decisions.died(link.age, unread, now):
            if isinstance(action, Lost):
                self._on_lost(action.request, begun[action.request], now)
            else:
                self._perform([action], now)
        for request in filter(self._decisions.waits, unread):
            self._clients.take_back(self._requests[request])
        self._write_table()

    def _on_lost(self, request: int, answering: bool, now: float) -> None:
        conn = self._requests.pop(request)
        if answering:
            self._clients.close(conn)
        else:
            self._clients.answer(conn, answers.LOST, now)

    def on_adopt(self, adopt: Adopt, sock: socket.socket, now: float) -> None:
        """A slot has finished with a connection that our predecessor sent it."""
        self._clients.adopt(adopt, sock, now)

    # What the decisions say.

    def _perform(self, actions: list[Action], now: float) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._send(action, now)
            elif isinstance(action, Refuse):
                self._refuse(action, now)
            elif isinstance(action, Spare):
                self._spare(now)
            elif isinstance(action, Dismiss):
                self._processes.dismiss(action.age)

    def _send(self, action: Send, now: float) -> None:
        conn = self._requests[action.request]
        job = Job(
            action.request,
            conn.number,
            conn.client,
            conn.server,
            conn.ahead,
            conn.carry,
            self._stop is not None,
            now - conn.ready_at,
        )
        if self._processes.send(action.age, job, conn.fd):
            self._clients.lend(conn)
        else:
            self._perform(self._decisions.unsent(action.age, action.request, now), now)

    def _refuse(self, action: Refuse, now: float) -> None:
        conn = self._requests.pop(action.request)
        answer = answers.refusal(
            action.why,
            self._decisions.rules,
            self._wishes.serving.overload_status,
            self._decisions.retry_after(now),
            conn.head.patience if conn.head else math.inf,
        )
        self._clients.answer(conn, answer, now)

    def _spare(self, now: float) -> None:
        self._spared += 1
        self._journal.spared(self._decisions.rules.bound, now)

    # What the master wants.

    def _on_nudge(self, now: float) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._frame.nudge)
        self._read_page(now)

    def _read_page(self, now: float) -> None:
        state = self._frame.master_page.read()
        if state is not None:
            self._obey(decode_wishes(state), now)

    def _obey(self, wishes: Wishes, now: float) -> None:
        if wishes.reopen != self._wishes.reopen:
            self._journal.reopen()
        if wishes.logging != self._wishes.logging:
            self._journal.setup(wishes.logging)
        self._wishes = wishes
        self._clients.serve(wishes.serving)
        self._perform(self._decisions.ruled(wishes.rules, wishes.live, now), now)
        if wishes.stop is not None and wishes.stop != self._stop:
            self._begin_stop(wishes.stop, now)

    def _on_master_death(self, now: float) -> None:
        """Without a master nothing is restarted: finish what is in flight, and end."""
        self._epoll.unregister(self._frame.master_pidfd)
        if self._stop is None:
            self._journal.warning("The master is gone: finishing what is in flight, then leaving")
            self._begin_stop(Stop(True, now + self._wishes.graceful_timeout), now)

    # A stop.

    def _begin_stop(self, stop: Stop, now: float) -> None:
        if self._stop is None:
            self._decisions.stop()
            self._clients.stop(now)
        self._stop = stop
        if not stop.graceful:
            self._ended = True

    def _give_up_at(self, stop: Stop) -> float:
        """When what still waits is refused: a second before the end, or a quarter if less."""
        return stop.deadline - min(1.0, self._wishes.graceful_timeout / 4)

    def _next_of_stop(self) -> float:
        if self._stop is None or not (self._decisions.waiting or self._decisions.exempt):
            return math.inf
        return self._give_up_at(self._stop)

    def _go_on_stopping(self, stop: Stop, now: float) -> None:
        if now >= self._give_up_at(stop):
            self._perform(self._decisions.give_up(), now)
        if not self._decisions.drained and not any(self._clients.pending()):
            self._perform(self._decisions.drain(), now)
        gone = not self._clients.connections and not self._processes.links
        self._ended = self._ended or (gone and self._decisions.drained) or now > stop.deadline + 1

    def _write_table(self) -> None:
        rows = [(link.age, link.slots, link.pid) for link in self._processes.links.values()]
        self._frame.replica_page.write_table(rows + self._heritage.rows())
