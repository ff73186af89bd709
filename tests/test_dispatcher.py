"""In which order the dispatcher sees to what has happened since its last turn."""

from __future__ import annotations

import math
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from stage import PATIENCE

from replica_plugin import channel, doubts, processes
from replica_plugin.cells import Cells
from replica_plugin.channel import End, Job, Kind, Report
from replica_plugin.decisions import Rules
from replica_plugin.deck import take
from replica_plugin.dispatcher import MOMENT, SHORT, Dispatcher, Frame
from replica_plugin.journal import Journal
from replica_plugin.pages import MasterPage, ReplicaPage
from replica_plugin.rest import Rest
from replica_plugin.rules import Privileges, Serving, Stop, Wishes

LOGGING = {"loglevel": "error"}
TURNS = 5


class Replica:
    """A dispatcher in this process, of 1 x 1, bound 2; the test is its process and its clients."""

    def __init__(self, slots: int = 1) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        control, self._writing = channel.control_pair()
        self.page = ReplicaPage()
        nudge, master = os.eventfd(0, os.EFD_NONBLOCK), os.pidfd_open(os.getppid())
        wishes = Wishes(
            rules=Rules(threads=slots, bound=2), serving=Serving(), live=(1,), first=1,
            most_threads=slots,
            graceful_timeout=30.0, privileges=Privileges(os.getuid(), os.getgid(), False),
            logging=LOGGING,
        )  # fmt: skip
        pages = MasterPage(), self.page
        frame = Frame((self.listener,), control, *pages, nudge, master, os.getppid())
        self.dispatcher = Dispatcher(frame, wishes, Journal(LOGGING))
        self.process, theirs = channel.pair()
        offer = channel.Register(age=1, slots=slots, owed=0, leaving=False)
        self.cells = cells = Cells(slots)
        channel.send_register(
            self._writing, offer, theirs.fileno(), cells.fd, os.pidfd_open(os.getpid())
        )
        self.turn()
        assert self.receive() == channel.WELCOME
        for _ in range(slots):
            self.process.send(channel.FREE)
        self.turn()

    def turn(self) -> None:
        """Until all that was there is seen to."""
        for _ in range(TURNS):
            self.dispatcher._tick_at = 0.0  # do not wait
            self.dispatcher.turn()

    def receive(self) -> bytes:
        """What the process is told; nothing if there is nothing."""
        with suppress(BlockingIOError):
            data, fds = channel.receive_now(self.process)
            channel.close_all(fds)
            return data
        return b""

    def job(self) -> Job | None:
        data = self.receive()
        return channel.decode_job(data) if data else None

    def done(self, job: Job | None, took: Job | None = None) -> None:
        assert job is not None
        request = took.request if took else 0
        self.process.send(Report(Kind.DONE, job.request, End.CLOSE, took=request).encode())

    def untaken(self, job: Job | None) -> None:
        """There was no descriptor for it."""
        assert job is not None
        self.process.send(Report(Kind.RETURNED, job.request, End.UNTAKEN).encode())

    def take(self) -> Job | None:
        """What lies first on the deck."""
        taken = take(self.dispatcher._processes.deck.end)
        if taken is None:
            return None
        channel.close_all(taken[1])
        return taken[0]

    def connect(self) -> socket.socket:
        return socket.create_connection(self.listener.getsockname())

    def client(self) -> socket.socket:
        """One whose connection is known."""
        client = self.connect()
        self.turn()
        return client


@pytest.fixture
def replica(request: pytest.FixtureRequest) -> Iterator[Replica]:
    replica = Replica(getattr(request, "param", 1))
    yield replica
    for conn in list(replica.dispatcher._clients.connections.values()):
        conn.sock.close()
    for sock in (replica.listener, replica.process):
        sock.close()


def ask(client: socket.socket) -> None:
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")


def address(job: Job | None) -> object:
    return job and job.client


@pytest.mark.parametrize(
    ("graceful", "paused", "is_left"),
    [(True, False, False), (False, False, True), (True, True, True)],
)
def test_a_master_that_stops_leaves_a_shared_backlog_to_the_other_if_it_cannot_serve_it(
    replica, graceful, paused, is_left
):
    """Beside it another master has the same socket, after a USR2."""
    dispatcher, now = replica.dispatcher, time.monotonic()
    shared = replace(dispatcher._wishes, shared=True)
    with replica.listener.dup() as other, replica.connect():
        dispatcher._stopping.pause(paused, now)
        dispatcher._stopping.begin(Stop(graceful, now + 30), shared, now)
        poll = select.poll()  # select() knows no descriptor above 1023
        poll.register(other, select.POLLIN)
        assert bool(poll.poll(0)) == is_left


@pytest.mark.parametrize(
    ("beside", "served", "usable", "was_ready", "left", "listens"),
    [
        (False, False, 0, True, [], True),
        (False, False, 0, False, [], True),
        (True, False, 0, True, [], False),
        (True, False, 1, False, [], True),
        (True, False, 0, False, [(1, 1, 1)], True),
        (True, True, 0, True, [], False),
        (True, True, 0, True, [(1, 1, 1)], True),
        (True, True, 0, False, [(1, 1, 1)], False),
        (True, True, 1, True, [], True),
        (True, True, 1, False, [], False),
    ],
)
def test_a_dispatcher_beside_another_master_listens_once_its_own_processes_can_serve(
    replica, monkeypatch, beside, served, usable, was_ready, left, listens
):
    """Those that one has left to a dispatcher that has just been born may all be busy."""
    dispatcher = replica.dispatcher
    roster, listeners = dispatcher._decisions.roster, dispatcher._clients.listeners
    listeners.accept_if(False)
    roster.usable, roster.was_ready = roster.usable[:usable], was_ready
    monkeypatch.setattr(dispatcher._heritage, "rows", lambda: left)
    dispatcher._wishes = replace(dispatcher._wishes, beside=beside, served=served)
    dispatcher._listen_if_served()
    assert listeners.wanted == listens


def test_a_request_is_not_refused_while_a_report_lies_there(replica):
    first, second, third = (replica.client() for _ in range(3))
    ask(first)
    ask(second)
    replica.turn()
    job = replica.job()
    ask(third)
    replica.done(job)
    replica.turn()
    assert address(replica.job()) == second.getsockname()
    third.setblocking(False)
    with pytest.raises(BlockingIOError):
        third.recv(1)


def test_a_client_that_has_left_is_not_run_though_a_slot_became_free_before(replica):
    first, second = replica.client(), replica.client()
    ask(first)
    ask(second)
    replica.turn()
    replica.done(replica.job())
    second.close()
    replica.turn()
    assert replica.job() is None


def test_a_request_on_a_known_connection_comes_before_one_on_a_new_connection(replica):
    known = replica.client()
    new = replica.connect()
    ask(new)
    ask(known)
    replica.turn()
    job = replica.job()
    assert address(job) == known.getsockname()
    replica.done(job)
    replica.turn()
    assert address(replica.job()) == new.getsockname()


def test_a_client_that_sends_nothing_more_overtakes_nobody(replica):
    first, second = replica.client(), replica.client()
    ask(first)
    ask(second)
    second.shutdown(socket.SHUT_WR)
    replica.turn()
    assert address(replica.job()) == first.getsockname()


def test_the_page_says_ready_as_soon_as_readyz_does(replica):
    assert replica.dispatcher._decisions.roster.is_ready
    assert replica.page.read().was_ready


@pytest.fixture
def full(replica) -> tuple[Replica, Job, socket.socket]:
    """A replica whose slot is busy, with what, and a client that waits."""
    first, second = replica.client(), replica.client()
    ask(first)
    ask(second)
    replica.turn()
    job = replica.job()
    assert job is not None
    first.close()
    return replica, job, second


def is_unanswered(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        client.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    return False


def test_connections_leave_room_to_as_many_processes_as_the_master_wants(replica, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 1024))
    dispatcher, wishes = replica.dispatcher, replica.dispatcher._wishes
    for count, room in ((1, 952), (10, 880), (1, 952)):
        rules = replace(wishes.rules, processes=count)
        dispatcher._obey(replace(wishes, rules=rules), time.monotonic())
        assert sum(map(dispatcher._clients.listeners.has_room, range(1024))) == room


# Whether it was full.


class Late:
    """An epoll after which, once, something happens that it has not told."""

    def __init__(self, epoll: select.epoll, happens: Callable[[], None]) -> None:
        self._epoll = epoll
        self._happens: Callable[[], None] | None = happens

    def poll(self, seconds: float) -> list[tuple[int, int]]:
        events = self._epoll.poll(seconds)
        if self._happens is not None:
            self._happens()
            self._happens = None
        return events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


def test_what_is_reported_while_a_request_is_judged_is_heard_before_it_is_refused(full):
    replica, job, _ = full
    third = replica.client()
    ask(third)
    dispatcher = replica.dispatcher
    dispatcher._epoll = Late(dispatcher._epoll, lambda: replica.done(job))
    replica.turn()
    replica.done(replica.job())
    replica.turn()
    assert address(replica.job()) == third.getsockname()


def test_a_request_is_refused_at_once_when_no_slot_is_about_to_report(full):
    replica, _, _ = full
    third = replica.client()
    ask(third)
    replica.dispatcher.turn()
    assert third.recv(12) == b"HTTP/1.1 503"
    assert not replica.dispatcher._doubts.held


@pytest.fixture
def ending(full, monkeypatch) -> tuple[Replica, Job, socket.socket]:
    """A full replica whose slot is about to report, and a client that asks."""
    monkeypatch.setattr(doubts, "PATIENCE", PATIENCE)
    replica, job, _ = full
    replica.cells.begin(0, job.request)
    replica.cells.complete(0)
    third = replica.client()
    ask(third)
    replica.turn()
    return replica, job, third


def test_one_request_for_each_slot_that_is_about_to_report_is_not_refused_yet(ending):
    replica, job, third = ending
    fourth = replica.client()
    ask(fourth)
    replica.turn()
    assert is_unanswered(third)
    assert fourth.recv(12) == b"HTTP/1.1 503"
    replica.done(job)
    replica.cells.end(0)
    replica.turn()
    replica.done(replica.job())
    replica.turn()
    assert address(replica.job()) == third.getsockname()


def test_a_dry_run_counts_only_what_would_be_refused(ending):
    replica, job, third = ending
    decisions = replica.dispatcher._decisions
    decisions.rules = replace(decisions.rules, dry_run=True)
    replica.turn()
    assert replica.page.read().spared == 0
    fourth = replica.client()
    ask(fourth)
    replica.turn()
    assert replica.page.read().spared == 1
    replica.done(job)
    replica.cells.end(0)
    replica.turn()
    assert replica.page.read().spared == 1
    begun = []
    for _ in range(3):
        job = replica.job()
        begun.append(address(job))
        replica.done(job)
        replica.turn()
    assert {third.getsockname(), fourth.getsockname()} == set(begun[1:])


def test_a_slot_that_is_about_to_report_for_long_is_not_waited_for(ending, monkeypatch):
    replica, _, third = ending
    assert is_unanswered(third)
    third.setblocking(True)
    monkeypatch.setattr(doubts, "PATIENCE", 0.0)
    replica.turn()
    assert third.recv(12) == b"HTTP/1.1 503"
    assert not replica.dispatcher._doubts.held


def test_a_client_in_doubt_may_leave(ending):
    replica, _, third = ending
    known = len(replica.dispatcher._clients.connections)
    third.close()
    replica.turn()
    assert len(replica.dispatcher._clients.connections) == known - 1
    assert not replica.dispatcher._doubts.held


# The deck.


def test_what_waits_lies_on_the_deck_while_all_slots_are_busy(full):
    replica, job, client = full
    time.sleep(0.01)
    took = replica.take()
    assert address(took) == client.getsockname()
    assert 0.01 < took.waited < PATIENCE
    assert took.overdue_at == math.inf
    replica.done(job, took)
    replica.turn()
    assert replica.job() is None
    assert list(replica.dispatcher._decisions.processes[1].requests) == [took.request]
    replica.done(took)
    replica.turn()
    assert client.recv(1) == b""


def test_a_request_taken_off_the_deck_has_request_timeout_from_then_on(full):
    replica, job, _ = full
    wishes = replica.dispatcher._wishes
    rules = replace(wishes.rules, request_timeout=5.0)
    replica.dispatcher._obey(replace(wishes, rules=rules), time.monotonic())
    replica.turn()
    before = time.monotonic()
    took = replica.take()
    assert before + 5 <= took.overdue_at <= time.monotonic() + 5
    replica.done(job, took)
    replica.turn()
    assert replica.dispatcher._decisions.overdue_at(took.request) < time.monotonic() + 5


def test_a_process_is_known_to_leave_before_it_is_told(replica, monkeypatch):
    """It may have left, and end for long, when the dispatcher dies on the next line."""
    monkeypatch.setattr(processes, "send", lambda *_: tables.append(replica.page.read_table()))
    tables = []
    replica.process.send(channel.LEAVING)
    replica.turn()
    assert tables == [[(1, 0, os.getpid())]]


def test_what_lies_on_the_deck_of_a_client_that_leaves_is_taken_back(full):
    replica, job, client = full
    client.close()
    replica.turn()
    assert replica.take() is None
    replica.done(job)
    replica.turn()
    assert replica.job() is None


def test_a_slot_that_looked_too_early_is_sent_what_lies_on_the_deck(full):
    replica, job, client = full
    replica.done(job)
    replica.turn()
    assert address(replica.job()) == client.getsockname()
    assert replica.take() is None


def test_a_request_of_which_the_client_has_left_never_lies_on_the_deck(replica, monkeypatch):
    first, gone = replica.client(), replica.client()
    ask(first)
    replica.turn()
    offered: list[Job] = []
    monkeypatch.setattr(
        replica.dispatcher._processes.deck, "offer", lambda job, _: offered.append(job)
    )
    ask(gone)
    gone.close()
    replica.turn()
    assert not (offered or replica.dispatcher._decisions.waiting)
    first.close()


def test_the_end_of_a_burst_is_noticed_though_nothing_more_happens(replica):
    """Else the dispatcher would let others go first until the next heartbeat."""
    dispatcher = replica.dispatcher
    dispatcher._scheduling.is_busy = True
    dispatcher._tick_at = 0.0
    dispatcher.turn()
    assert dispatcher._tick_at <= time.monotonic() + MOMENT


def test_what_a_slot_has_taken_and_ended_since_is_heard_in_the_same_turn(full):
    """Else a slot that is free waits for as many turns as it has taken requests."""
    replica, job, _ = full
    took = replica.take()
    replica.done(job, took)
    replica.done(took)
    replica.dispatcher.turn()
    assert replica.dispatcher._decisions.running == 0


def test_what_comes_lies_on_the_deck_before_what_comes_next_is_looked_at(replica, monkeypatch):
    """A turn in which many have come is long, and a slot may look there meanwhile."""
    clients = [replica.client() for _ in range(3)]
    for client in clients:
        ask(client)
    seen, on_ready = [], replica.dispatcher._clients.on_ready

    def look(conn, now):
        on_ready(conn, now)
        seen.append(address(replica.take()))

    monkeypatch.setattr(replica.dispatcher._clients, "on_ready", look)
    replica.dispatcher.turn()
    _, second, _ = clients
    assert seen[1] == second.getsockname()
    for client in clients:
        client.close()


def test_a_client_whose_request_was_taken_when_it_left_keeps_its_slot(full):
    """The slot will find out; what it has reported by then is not lost."""
    replica, job, client = full
    replica.cells.take(0)
    took = replica.take()
    client.close()
    replica.turn()
    replica.done(job, took)
    replica.turn()
    assert replica.dispatcher._decisions.running == 1
    replica.done(took)
    replica.turn()
    assert replica.dispatcher._decisions.running == 0
    assert not replica.dispatcher._clients.connections


def test_what_was_taken_and_not_reported_waits_again_when_no_slot_can_have_it(full):
    """As after the death of who took it."""
    replica, _, client = full
    replica.cells.take(0)
    took = replica.take()
    decisions = replica.dispatcher._decisions
    decisions.clear_deck()
    replica.turn()
    assert list(decisions.taken) == [took.request]
    replica.cells.end(0)
    replica.turn()
    assert not decisions.taken
    again = replica.take()
    assert (again.request, again.client) == (took.request, client.getsockname())


def test_what_was_taken_for_a_client_that_left_does_not_wait_again(full):
    replica, job, client = full
    replica.cells.take(0)
    replica.take()
    client.close()
    replica.turn()
    replica.cells.end(0)
    replica.turn()
    assert not replica.dispatcher._decisions.taken
    replica.done(job)
    replica.turn()
    assert replica.job() is None
    assert not replica.dispatcher._clients.connections


def test_what_comes_back_from_a_hub_that_stands_still_is_not_sent_again_for_a_client_that_left(
    replica,
):
    client = replica.client()
    ask(client)
    replica.turn()
    job = replica.job()
    client.close()
    replica.turn()
    replica.process.send(Report(Kind.RETURNED, job.request).encode())
    replica.turn()
    assert replica.job() is None
    assert replica.dispatcher._decisions.running == 0
    assert not replica.dispatcher._clients.connections


def test_what_the_only_process_has_no_descriptor_for_is_answered_and_its_slot_is_free(replica):
    first, second = replica.client(), replica.client()
    ask(first)
    ask(second)
    replica.turn()
    untaken = replica.job()
    replica.untaken(untaken)
    replica.turn()
    assert first.recv(12) == b"HTTP/1.1 503"
    assert address(replica.job()) == second.getsockname()


@pytest.mark.parametrize("stopping", [False, True])
def test_what_one_process_has_no_descriptor_for_waits_for_another_and_it_is_sent_nothing(
    replica, stopping
):
    dispatcher = replica.dispatcher
    decisions, now = dispatcher._decisions, time.monotonic()
    rules = replace(decisions.rules, processes=2)
    dispatcher._obey(replace(dispatcher._wishes, rules=rules, live=(1, 2)), now)
    decisions.registered(2, 1)
    client = replica.client()
    ask(client)
    replica.turn()
    untaken = replica.job()
    if stopping:
        dispatcher._stopping.begin(Stop(True, now + PATIENCE), dispatcher._wishes, now)
    replica.untaken(untaken)
    replica.turn()
    assert list(decisions.waiting) == [untaken.request]
    assert replica.job() is None
    link = dispatcher._processes.links[1]
    dispatcher._processes.watch(link.short_until - 0.01)
    assert replica.job() is None
    dispatcher._processes.watch(link.short_until)
    assert address(replica.job()) == client.getsockname()


with_two_slots = pytest.mark.parametrize("replica", [2], indirect=True)
LATER = 60.0  # in place of what is over in no time


@pytest.fixture
def unhurried(monkeypatch):
    """A process is not tried again while a test looks."""
    monkeypatch.setattr("replica_plugin.dispatcher.MOMENT", LATER)


@with_two_slots
def test_what_a_process_has_no_descriptor_for_waits_for_the_end_of_what_it_has_begun(
    replica, unhurried
):
    """It is not sent again before, and soon after."""
    first, second = replica.client(), replica.client()
    ask(first)
    ask(second)
    replica.turn()
    begun, untaken = replica.job(), replica.job()
    replica.cells.begin(0, begun.request)
    replica.untaken(untaken)
    replica.turn()
    assert list(replica.dispatcher._decisions.waiting) == [untaken.request]
    assert replica.job() is None
    replica.done(begun)
    replica.cells.end(0)
    replica.turn()
    link = replica.dispatcher._processes.links[1]
    assert replica.dispatcher._next_deadline() == link.short_until <= time.monotonic() + LATER
    replica.dispatcher._processes.watch(link.short_until)
    assert address(replica.job()) == second.getsockname()


@pytest.mark.parametrize("replica", [3], indirect=True)
def test_a_process_at_its_limit_is_tried_after_the_first_end_though_others_follow(
    replica, unhurried
):
    decisions = replica.dispatcher._decisions
    decisions.rules = replace(decisions.rules, bound=3)
    clients = [replica.client() for _ in range(3)]
    for client in clients:
        ask(client)
    replica.turn()
    begun, untaken = [replica.job(), replica.job()], replica.job()
    for index, job in enumerate(begun):
        replica.cells.begin(index, job.request)
    replica.untaken(untaken)
    replica.turn()
    replica.done(begun[0])
    replica.turn()
    link = replica.dispatcher._processes.links[1]
    tried_at = link.short_until
    replica.done(begun[1])
    replica.turn()
    assert link.done_at < link.short_until == tried_at


@with_two_slots
def test_what_a_process_had_no_descriptor_for_before_another_ended_waits_for_a_moment(
    replica, unhurried
):
    """The end was reported first. But it is no reason to wait for ever: the app may have it."""
    client = replica.client()
    ask(replica.client())
    ask(client)
    replica.turn()
    begun, untaken = replica.job(), replica.job()
    replica.done(begun)
    replica.untaken(untaken)
    replica.turn()
    link = replica.dispatcher._processes.links[1]
    assert link.short_until == link.done_at + LATER
    replica.dispatcher._processes.watch(link.short_until)
    link.done_at -= SHORT
    replica.untaken(replica.job())
    replica.turn()
    assert client.recv(12) == b"HTTP/1.1 503"


@with_two_slots
def test_what_a_process_without_any_descriptor_has_not_begun_is_answered_at_once(replica):
    """What others have been sent is no reason to wait: they may not have begun it, either."""
    clients = replica.client(), replica.client()
    for client in clients:
        ask(client)
    replica.turn()
    for job in (replica.job(), replica.job()):
        replica.untaken(job)
    replica.turn()
    assert [client.recv(12) for client in clients] == [b"HTTP/1.1 503"] * 2


@with_two_slots
def test_what_has_no_descriptor_once_a_stop_has_given_up_does_not_wait(replica):
    clients = replica.client(), replica.client()
    for client in clients:
        ask(client)
    replica.turn()
    begun, untaken = replica.job(), replica.job()
    replica.cells.begin(0, begun.request)
    replica.dispatcher._decisions.give_up()
    replica.untaken(untaken)
    replica.turn()
    assert clients[1].recv(12) == b"HTTP/1.1 503"


@pytest.mark.parametrize("answered", [False, True])
def test_a_rest_that_was_lost_is_told_if_somebody_waits_for_it(replica, answered, monkeypatch):
    told: list[float] = []
    monkeypatch.setattr(replica.dispatcher._journal, "rest_lost", told.append)
    ask(replica.client())
    replica.turn()
    job = replica.job()
    rest = Rest.of(b"rest")
    if answered:
        del replica.dispatcher.requests[job.request]
    replica.process.send(Report(Kind.REST, job.request, rest=rest).encode())
    rest.close()
    replica.turn()
    assert len(told) == 1 - answered


def test_what_a_dead_process_had_not_begun_is_not_sent_again_for_a_client_that_left(replica):
    client = replica.client()
    ask(client)
    replica.turn()
    assert replica.job()
    client.close()
    replica.turn()
    processes = replica.dispatcher._processes
    processes._on_death(processes.links[1], time.monotonic())
    assert not replica.dispatcher._decisions.waiting
    assert not replica.dispatcher._clients.connections


def test_a_process_that_says_it_took_what_nobody_offered_is_killed(full, monkeypatch):
    replica, job, _ = full
    killed = []
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda pidfd, number: killed.append(number))
    replica.done(job, job)
    replica.turn()
    assert killed == [signal.SIGKILL]


def test_a_deck_that_a_process_has_shut_is_done_without(full):
    replica, job, client = full
    replica.dispatcher._processes.deck.end.shutdown(socket.SHUT_RDWR)
    replica.done(job)
    replica.turn()
    assert address(replica.job()) == client.getsockname()
    third = replica.client()
    ask(third)
    replica.turn()
    assert list(replica.dispatcher._decisions.waiting)
    assert not replica.dispatcher._decisions.offered


def test_what_follows_an_answer_of_the_dispatchers_is_timed_soon(replica):
    """A request that is seen then may have a deadline at once, and no event of its own."""
    wishes = replica.dispatcher._wishes
    probes = replace(wishes.serving, probes=(b"/-/healthz",))
    replica.dispatcher._obey(replace(wishes, serving=probes), time.monotonic())
    with replica.client() as client:
        probe = b"GET /-/healthz HTTP/1.1\r\nHost: a\r\n\r\n"
        client.send(probe * 2 + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        replica.dispatcher.turn()  # sees to the event: the first answer, and the second
        assert replica.dispatcher._clients.answered
        replica.dispatcher._tick_at = time.monotonic() + PATIENCE  # a tick has just been
        replica.dispatcher.turn()
        assert replica.job() is not None
        assert replica.dispatcher._tick_at <= time.monotonic() + MOMENT


def test_an_event_of_a_closed_pidfd_says_nothing_of_the_supervisor_that_has_its_number(
    replica,
):
    """1. A nudge and the old supervisor's death come together.  2. The nudge closes that one's
    pidfd, and the new one's has its number.  3. The death is of that number."""
    guard = replica.dispatcher._guard
    assert guard.told(os.getpid())
    number = guard._pidfd
    replica.dispatcher._on_other(number, time.monotonic(), 1)
    assert number in guard
