"""The dispatcher: the one process that owns listeners, connections and the queue.

    clients.py -> ready -> decisions.py -> send -> processes.py -> a slot, and back

It runs no user code, and joins three parts that do not know each other: clients (sockets
and bytes), decisions (plain values) and processes (channels). Each turn of its loop takes
first what the master wants, so that a stop comes before requests that came after it; then clients
that wait no longer, so that they are not run; then what processes say, so that no request is
refused while a slot is free, and those for which there was a doubt about that (doubts.py); then
what has come from clients, from new ones last; and, every few milliseconds, what is due. At its
end it lays on the deck (deck.py) what slots may take.

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
from dataclasses import dataclass, replace

from . import answers
from .actions import Action, Dismiss, Inspect, Kill, Lost, Refuse, Send, Why
from .channel import Address, Adopt, End, Job, Kind, Report, decode_stall
from .clients import LEFT, Clients
from .connection import Connection, State
from .decisions import Decisions
from .doubts import Doubts
from .guard import Guard
from .head import Head
from .heritage import Heritage, is_dead
from .journal import Journal
from .listeners import ACCEPTS, Listener
from .pages import MasterPage, Numbers, ReplicaPage
from .processes import Link, Processes
from .ready_file import ReadyFile
from .rules import Stop, Wishes, decode_wishes
from .scheduling import Scheduling
from .stopping import Stopping

TURN = 1.0  # seconds the loop sleeps at most: the heartbeat
SHORT = 1.0  # seconds a process that is out of descriptors is sent nothing, unless one is done
MOMENT = 0.005  # seconds after an event at which the clock is looked at, at the latest


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
    may_choose: bool = False  # how it is scheduled


class Dispatcher:
    """One life of the dispatcher."""

    def __init__(self, frame: Frame, wishes: Wishes, journal: Journal) -> None:
        self._frame = frame
        self._wishes = wishes
        self._journal = journal
        self._epoll = select.epoll()
        self.requests: dict[int, Connection] = {}
        self._next = itertools.count(time.monotonic_ns() // 1000)  # never a number used before
        self._processes = Processes(self._epoll, frame.control, self)
        rules = replace(wishes.rules, processes=max(1, wishes.rules.processes))
        self._decisions = Decisions(rules, self._processes.deck.recall)
        listeners = [Listener(sock) for sock in frame.listeners]
        self._clients = Clients(self._epoll, listeners, wishes.serving, self)
        self._clients.listeners.accept_if(False)  # `_obey` says when
        self._stopping = Stopping(self._clients, self._decisions, self._processes, self)
        self._heritage = Heritage(self._epoll, frame.replica_page, frame.master_pid)
        self._guard = Guard(self._epoll, frame.master_pid)
        self._doubts = Doubts(self._processes)
        self._ready_file = ReadyFile(frame.master_pid, journal.error)
        self._nudged = (frame.nudge, select.EPOLLIN)  # as epoll says it
        self._scheduling = Scheduling(frame.may_choose)
        self._tick_at = 0.0
        before = frame.replica_page.read()
        self._spared = before.spared
        self._decisions.roster.was_ready = bool(before.was_ready)
        for age, slots, _ in self._heritage.rows():
            self._decisions.expected(age, slots)
        for fd in (frame.nudge, frame.master_pidfd):
            self._epoll.register(fd, select.EPOLLIN)
        self._obey(wishes, time.monotonic())

    def run(self) -> None:
        """Serve until a stop is done."""
        while not self._stopping.ended:
            self.turn()
        if is_dead(self._frame.master_pidfd):
            self._processes.kill_all()
        self._ready_file.show(self._wishes.ready_file, False, time.monotonic())
        self._frame.replica_page.write(self._numbers(math.inf))

    def turn(self) -> None:
        """Wait for what happens, and see to it; and, MOMENT later at most, to what is due.

        So what there is to do by the clock, deadlines, numbers, ready file, costs nothing for
        each request, and whatever an event has to start a deadline for is late by a MOMENT. What
        follows an answer of ours (`follow_up`) is such an event, of which epoll says nothing.
        """
        pause = 0.0 if self._clients.answered else self._tick_at - time.monotonic()
        events = self._epoll.poll(max(0.0, pause))
        now = time.monotonic()
        if events or self._doubts.held:
            self._scheduling.events += len(events)
            self._on_events(events, now)
            self._tick_at = min(self._tick_at, now + MOMENT)
        if self._clients.answered:
            self._clients.follow_up(now)
            self._tick_at = min(self._tick_at, now + MOMENT)
        if self._tick_at <= now:
            self._tick(now)
            soon = self._decisions.taken or self._doubts.held or self._scheduling.is_busy
            turn = MOMENT if soon else TURN
            self._tick_at = min(now + turn, self._next_deadline())
        if self._decisions.waiting:
            self._fill_deck()

    def _on_events(self, events: list[tuple[int, int]], now: float) -> None:
        if self._nudged in events:
            self._on_nudge(now)
        connections, channels = self._clients.connections, self._processes.by_channel
        arrivals, reports, others = [], [], []
        for fd, mask in events:
            conn = connections.get(fd)
            if conn is None:
                link = channels.get(fd)
                if link is None:
                    others.append(fd)
                else:
                    reports.append((link, mask))
            elif mask & LEFT and conn.state == State.WAITING:
                self._clients.on_event(conn, mask, now)
            else:
                arrivals.append((conn, mask))
        for link, mask in reports:
            self._processes.on_channel(link, mask, now)
        if self._doubts.held:
            self._judge_again(now)
        for conn, mask in arrivals:
            self._clients.on_event(conn, mask, now)
        for fd in others:
            self._on_other(fd, now, len(events))

    def _judge_again(self, now: float) -> None:
        for conn in self._doubts.take_all():
            if conn.state == State.WAITING:  # it has not left
                self.on_ready(conn, now)

    def _on_other(self, fd: int, now: float, events: int) -> None:
        if fd in self._clients.listeners:
            self._clients.on_listener(fd, now, min(ACCEPTS, events))
        elif fd == self._frame.master_pidfd:
            self._on_master_death(now)
        elif fd in self._guard and is_dead(fd):  # not an event of the number's last owner
            self._guard.died()
            self._tell_unguarded()
        elif fd in self._heritage:
            age = self._heritage.died(fd)
            self.perform(self._decisions.died(age, (), now), now)
        else:
            self._processes.on_event(fd, now)

    def _next_deadline(self) -> float:
        return min(
            self._clients.next_deadline(),
            self._processes.next_deadline(),
            self._decisions.next_expiry(),
            self._decisions.next_overdue(),
            self._journal.next_deadline(),
            self._stopping.due(),
        )

    def _tick(self, now: float) -> None:
        """Do what is due, and tell the replica's page how things stand."""
        self._scheduling.tick(now)
        self._processes.watch(now)
        if self._decisions.taken:
            self._see_who_took(now)
        self._clients.tick(now)
        self._journal.tick(now)
        self.perform(self._decisions.tick(now), now)
        self._stopping.tick(self._wishes.live, now)
        self._ready_file.show(self._wishes.ready_file, self._decisions.roster.is_ready, now)
        self._frame.replica_page.write(self._numbers(now))

    def _numbers(self, now: float) -> Numbers:
        decisions = self._decisions
        return Numbers(
            now,
            decisions.roster.was_ready,
            len(decisions.roster.usable),
            self._processes.slots,
            len(decisions.waiting),
            decisions.in_flight - len(decisions.waiting),
            decisions.rules.bound,
            len(self._clients.connections),
            self._clients.unsent,
            self._spared,
            self._clients.listeners.is_short,
        )

    # What the clients' side asks (clients.Judge).

    def on_ready(self, conn: Connection, now: float) -> None:
        conn.request = next(self._next)
        self.requests[conn.request] = conn
        head = conn.head or Head(0)
        exempt = head.path in self._wishes.serving.exempt and head.is_plain
        self.perform(self._decisions.ready(conn.request, now, head.patience, exempt), now)
        if self._decisions.waiting and not conn.hung_up:  # else it is about to leave the queue
            self._fill_deck()  # a slot may be there before this turn is over

    def on_gone(self, conn: Connection) -> bool:
        gone = self._decisions.gone(conn.request)
        if gone:
            self.requests.pop(conn.request, None)  # it is not there while it is in doubt
        return gone

    def on_answered(self, conn: Connection, answer: answers.Answer, now: float) -> None:
        self._journal.answered(conn, answer, now)

    def on_cut_off(self, conn: Connection, now: float) -> None:
        self._journal.cut_off(now)

    def on_shortage(self, now: float) -> None:
        self._journal.shortage(now)

    def probe(self, name: bytes) -> answers.Answer:
        roster = self._decisions.roster
        if name.endswith(b"readyz"):
            return answers.probe(roster.is_ready, "ready", "not ready")
        return answers.probe(roster.is_healthy, "healthy", "there is no process")

    # What the processes' side tells (processes.Office).

    def on_registered(self, link: Link, owed: int, leaving: bool) -> None:
        now = time.monotonic()
        self._heritage.back(link.age)
        self.perform(self._decisions.registered(link.age, link.slots, owed, link.extra), now)
        if leaving:
            self.perform(self._decisions.leaving(link.age), now)
        self._write_table()

    def on_report(self, link: Link, report: Report, now: float) -> None:
        if report.kind == Kind.FREE:
            self.perform(self._decisions.freed(link.age, now), now)
            self._tick_at = now  # the page says that we are ready as soon as readyz does
            self._listen_if_served()
        elif report.kind == Kind.DONE:
            self._on_done(link, report, now)
        elif report.kind == Kind.REST:
            self._on_rest(link, report, now)
        elif report.kind == Kind.LEAVING:
            self.perform(self._decisions.leaving(link.age), now)
        elif report.kind == Kind.RETURNED:
            self._on_returned(link, report, now)
        elif report.kind == Kind.STALLED:
            self._on_explained(link, report)
        elif report.kind == Kind.TURNING:
            self._processes.watch(now)
        elif report.kind == Kind.OWED:
            self.perform(self._decisions.owes(link.age, report.request, now), now)
            self._write_table()
        else:
            self._on_overdue(link, report, now)

    def _on_done(self, link: Link, report: Report, now: float) -> None:
        """The credit goes to the queue's head before the connection that gave it is looked at."""
        actions = self._decisions.done(link.age, report.request, now, report.took)
        if report.took:
            self._on_took(link, report.took, actions is not None)
        conn = self.requests.pop(report.request, None) if actions is not None else None
        if actions:
            self.perform(actions, now)
        if conn is not None:
            self._clients.give_back(conn, report, now)
        if report.kind == Kind.DONE:
            link.done_at = now
            if link.short_until < math.inf:
                # The slot is about to let go of its client's.
                link.short_until = min(link.short_until, now + MOMENT)
        if link.dismissed:
            self._write_table()

    def _on_rest(self, link: Link, report: Report, now: float) -> None:
        """A response is complete, and what its slot still does is not its client's concern."""
        runs = self._decisions.runs(link.age, report.request)
        conn = self.requests.pop(report.request, None) if runs else None
        if report.rest is None and conn is not None:
            self._journal.rest_lost(now)
        if report.rest is None or not self._clients.listeners.has_room(report.rest.fd):
            self._clients.listeners.is_short = True
        if conn is not None:
            self._clients.give_back(conn, report, now)
        elif report.rest is not None:  # of another's request, or one that we have answered
            report.rest.close()
        self._frame.replica_page.write(self._numbers(now))  # where slots see how much room is left

    def _on_took(self, link: Link, request: int, known: bool) -> None:
        """With its report a slot has said what it has taken off the deck."""
        if not known:
            self._processes.on_nonsense(link)
            return
        link.busy += 1
        self._clients.lend(self.requests[request])
        self._write_load()

    def _see_who_took(self, now: float) -> None:
        """What has left the deck some process has, and is about to say so; or it has died."""
        taken = list(self._decisions.taken)
        if not self._processes.hear_all(now):
            return
        missing = [request for request in taken if request in self._decisions.taken]
        left = [request for request in missing if self.requests[request].hung_up]
        self.perform(self._decisions.untaken(missing, left, now), now)
        for request in left:
            self._clients.close(self.requests.pop(request))
        self._take_back(missing)

    def _take_back(self, requests: Iterable[int]) -> None:
        """Of what no slot has begun, what was not sent again at once waits."""
        for request in filter(self._decisions.waits, requests):
            self._clients.take_back(self.requests[request])

    def _on_returned(self, link: Link, report: Report, now: float) -> None:
        """No slot has begun it. For one that is UNTAKEN its process has no descriptor: it waits,
        and until there is one nothing goes to this process, which might always be least busy.
        """
        request, untaken = report.request, report.end == End.UNTAKEN
        conn = self.requests.get(request)
        if untaken:
            self._journal.untaken(link.pid, now)
        if conn is not None and conn.hung_up:  # nobody waits for it
            self._on_done(link, report._replace(end=End.ABORT), now)
        elif untaken and (conn is None or not self._may_be_taken(link, now)):
            self._on_done(link, report, now)
        elif conn is not None and self._decisions.runs(link.age, request):
            if untaken:
                soon = link.done_at + MOMENT  # or what ends next says when
                link.short_until = soon if soon > now else now + SHORT
            undo = self._decisions.unsent if untaken else self._decisions.returned
            self.perform(undo(link.age, request, now), now)
            self._take_back([request])

    def _may_be_taken(self, link: Link, now: float) -> bool:
        """Whether what this process had no descriptor for may find one: in another process that has
        not just said the same; or in any that works, or did a moment ago, since it gets one back.

        What was only sent is no work, since all of it may come back, and go round for ever.
        """
        usable = [p for p in self._decisions.roster.usable if not p.stalled]
        another = any(p.age != link.age and not p.blocked for p in usable)
        links = self._processes.links
        return not self._decisions.given_up and (
            another or any(_works(links[p.age], now) for p in usable)
        )

    def _on_explained(self, link: Link, report: Report) -> None:
        stall = decode_stall(report.carry)
        if stall is not None:
            self._journal.stalled(link.pid, self.requests.get(report.request), stall)

    def on_stall(self, link: Link, now: float) -> None:
        if link.stalled:
            self._decisions.stalled(link.age)
        else:
            self.perform(self._decisions.turning(link.age, now), now)

    def _on_overdue(self, link: Link, report: Report, now: float) -> None:
        """The process has answered, if it could (overdue.py); what is left is the connection."""
        known = self._decisions.overdue(link.age, report.request)
        conn = self.requests.get(report.request) if known else None
        self._journal.overdue(conn, link.pid, report.carry.decode("utf-8", "replace"))
        if conn is not None and report.kind == Kind.OVERDUE:
            del self.requests[conn.request]
            self._clients.conclude(conn, self._too_late, now)

    @property
    def _too_late(self) -> answers.Answer:
        return answers.overdue(self._decisions.rules.request_timeout)

    def on_sendable(self, link: Link, now: float) -> None:
        self.perform(self._decisions.sendable(link.age, now), now)

    def on_undeliverable(self, error: OSError) -> None:
        self._journal.undeliverable(error, time.monotonic())

    def may_have(self, slots: int) -> bool:
        """What the master says last, of which the nudge may still be on its way."""
        if slots > self._wishes.most_threads:
            self._read_page(time.monotonic())
        return slots <= self._wishes.most_threads

    def on_nonsense(self, link: Link) -> None:
        self._journal.error(
            "Process %d is deaf, or says what no process of ours says: killing it", link.pid
        )

    def on_death(self, link: Link, now: float) -> None:
        begun = link.cells.begun()
        process = self._decisions.processes.get(link.age)
        ours = process.requests.keys() & self.requests.keys() if process else set()
        unread = {r for r in ours - begun.keys() if not self.requests[r].hung_up}
        for action in self._decisions.died(link.age, unread, now):
            if isinstance(action, Lost):
                self._on_lost(action, begun.get(action.request, False), now)
            else:
                self.perform([action], now)
        self._take_back(unread)
        self._write_table()

    def _on_lost(self, lost: Lost, answering: bool, now: float) -> None:
        conn = self.requests.get(lost.request)
        if conn is None:  # answered already, in place of the slot
            return
        del self.requests[lost.request]
        if answering:
            self._clients.close(conn)
        else:
            self._clients.answer(conn, self._too_late if lost.overdue else answers.LOST, now)

    def on_adopt(self, adopt: Adopt, sock: socket.socket, client: Address, now: float) -> None:
        """A slot has finished with a connection that our predecessor sent it."""
        if self._clients.listeners.has_room(sock.fileno()):
            self._clients.adopt(adopt, sock, client, now)
        else:
            sock.close()

    def on_control_end(self) -> None:
        """While the master lives, which holds it: some process has shut it."""
        if self._stopping.stop is None and not is_dead(self._frame.master_pidfd):
            self._journal.error(
                "A process has shut the control socket: the replica serves on with the processes "
                "it has, but no other can register until gunicorn is restarted"
            )

    # What the decisions say.

    def perform(self, actions: list[Action], now: float) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._send(action, now)
            elif isinstance(action, Refuse):
                self._refuse(action, now)
            elif isinstance(action, Dismiss):
                self._dismiss(action.age)
            elif isinstance(action, Inspect):
                self._processes.inspect(action.age)
            elif isinstance(action, Kill):
                self._kill(action.age)

    def _send(self, action: Send, now: float) -> None:
        conn = self.requests[action.request]
        waited = now - conn.ready_at
        job = self._job(conn, waited, self._decisions.overdue_at(action.request), 0.0)
        self._write_load()
        if self._processes.send(action.age, job, conn.fd):
            self._clients.lend(conn)
        else:
            self.perform(self._decisions.unsent(action.age, action.request, now), now)

    def _job(self, conn: Connection, waited: float, overdue_at: float, ready_at: float) -> Job:
        return Job(
            conn.request,
            conn.number,
            conn.client,
            conn.server,
            conn.ahead,
            conn.carry,
            self._decisions.roster.stopping,
            waited,
            overdue_at,
            self._decisions.rules.request_timeout,
            ready_at,
        )

    def _fill_deck(self) -> None:
        """Lay there what the next slots may take for themselves, and tell them on the page."""
        for request in self._decisions.for_deck():
            conn = self.requests[request]
            job = self._job(conn, 0.0, math.inf, conn.ready_at)
            if not self._processes.deck.offer(job, conn.fd):
                return
            self._decisions.on_deck(request)
            self._write_load()

    def _write_load(self) -> None:
        waiting = len(self._decisions.waiting)
        self._frame.replica_page.write_load(waiting, self._decisions.in_flight - waiting)

    def _refuse(self, action: Refuse, now: float) -> None:
        conn = self.requests.pop(action.request)
        if action.why is Why.FULL and self._doubts.hold(conn, now):
            return
        if action.why is Why.FULL and self._decisions.rules.dry_run:
            self._spare(conn, now)
            return
        answer = answers.refusal(
            action.why,
            self._decisions.rules,
            self._wishes.serving.overload_status,
            self._decisions.retry_after(now),
            conn.head.patience if conn.head else math.inf,
        )
        self._clients.answer(conn, answer, now)

    def _spare(self, conn: Connection, now: float) -> None:
        self._spared += 1
        self._journal.spared(self._decisions.rules.bound, now)
        self.requests[conn.request] = conn
        patience = conn.head.patience if conn.head else math.inf
        self.perform(self._decisions.spare(conn.request, now, patience), now)

    def _dismiss(self, age: int) -> None:
        process = self._decisions.processes[age]
        if process.stuck and not process.killed:
            self._journal.error(
                "Process %d has a stuck request: it finishes what else it runs, and is replaced",
                self._processes.links[age].pid,
            )
        self._write_table()  # before it can have left, which is sooner than we may go on
        self._processes.dismiss(age)

    def _kill(self, age: int) -> None:
        """The process cannot be asked, or has not found an end."""
        link, process = self._processes.links[age], self._decisions.processes[age]
        if process.is_silent:
            self._journal.error(
                "Process %d does not answer, and has a stuck request: killing it. "
                "It may be stopped, or in a call that keeps the GIL. Its stacks:\n%s",
                link.pid, link.cells.stacks().rstrip("\n") or "(not known)",
            )  # fmt: skip
        else:
            self._journal.error("Process %d runs only stuck requests: killing it", link.pid)
        self._processes.kill(age)

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
        self._clients.listeners.leave_room(wishes.rules.processes)
        pausing = not wishes.rules.processes
        rules = self._decisions.rules if pausing else wishes.rules
        self._decisions.roster.draining = wishes.draining
        self.perform(self._decisions.ruled(rules, wishes.live, now, wishes.first), now)
        self._stopping.pause(pausing, now)
        self._listen_if_served()
        if wishes.supervisor and not self._guard.told(wishes.supervisor):
            self._tell_unguarded()
        if wishes.stop is not None and wishes.stop != self._stopping.stop:
            self._stopping.begin(wishes.stop, wishes, now)

    def _listen_if_served(self) -> None:
        """Beside another master connections are its until we are ready, too; or, as long as it is
        not, until one of our processes can serve. So can those that the dispatcher before us has
        left, though all of them may be busy."""
        roster, listeners = self._decisions.roster, self._clients.listeners
        serves = bool(roster.usable or self._heritage.rows())
        enough = serves and (roster.was_ready or not self._wishes.served)
        waits = self._wishes.beside and not enough
        if not (listeners.wanted or roster.stopping or waits):
            listeners.accept_if(True)

    def _tell_unguarded(self) -> None:
        if self._stopping.stop is None:
            self._journal.error(
                "The supervisor (pid %d) is gone: the replica serves on, but a dispatcher that "
                "dies or hangs is not replaced until the master has started another",
                self._guard.pid,
            )

    def _on_master_death(self, now: float) -> None:
        """Without a master nothing is restarted: finish what is in flight, and end."""
        self._epoll.unregister(self._frame.master_pidfd)
        if self._stopping.stop is None:
            self._journal.warning("The master is gone: finishing what is in flight, then leaving")
            stop = Stop(True, now + self._wishes.graceful_timeout)
            self._stopping.begin(stop, self._wishes, now)

    def _write_table(self) -> None:
        links = self._processes.links.values()
        rows = [(link.age, self._most_busy(link), link.pid) for link in links]
        self._frame.replica_page.write_table(rows + self._heritage.rows())

    def _most_busy(self, link: Link) -> int:
        """How many of its slots may be busy when we have died. One that is dismissed begins nothing
        more; and if all it has left to do is to end, it never registers again."""
        process = self._decisions.processes[link.age]
        return min(link.slots, process.running) if process.dismissed else link.slots


def _works(link: Link, now: float) -> bool:
    return now - link.done_at < SHORT or bool(link.cells.begun())
