"""The dispatcher's side of clients, with turns that see only some of the events."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from server import wait_for

from replica_plugin import arrival
from replica_plugin.answers import OUT_OF_TIME, Answer
from replica_plugin.channel import Adopt, End, Kind, Report
from replica_plugin.clients import Clients
from replica_plugin.connection import Connection, State, timeval
from replica_plugin.head import HEAD_KEPT
from replica_plugin.rest import Rest
from replica_plugin.rules import Serving

LAST_CALL = 1.0
REQUEST = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSING = b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"


class Judge:
    """Lets every request wait."""

    def __init__(self) -> None:
        self.ready: list[Connection] = []

    def on_ready(self, conn: Connection, now: float) -> None:
        self.ready.append(conn)

    def on_answered(self, conn: Connection, answer: Answer, now: float) -> None:
        pass

    def probe(self, name: bytes) -> Answer:
        return Answer(200, name.decode())


class Idle:
    """A connection between two requests, whose events nobody has looked at."""

    def __init__(self, sock: socket.socket, client: socket.socket) -> None:
        self.judge = Judge()
        self.epoll = select.epoll()
        self.clients = Clients(self.epoll, [], Serving(keepalive=2.0), self.judge)
        self.client = client
        self.clients.adopt(Adopt(2, "", b"", b""), sock, "", now=0.0)
        (self.conn,) = self.clients.connections.values()

    def turn(self, now: float) -> int:
        """One turn of the dispatcher's loop; how many events it had."""
        events = self.epoll.poll(0)
        for _, mask in events:
            self.clients.on_event(self.conn, mask, now)
        self.clients.tick(now)
        return len(events)

    def close(self) -> None:
        if self.conn.state != State.CLOSED:
            self.clients.close(self.conn)
        self.client.close()
        self.epoll.close()


@pytest.fixture
def idle() -> Iterator[Idle]:
    idle = Idle(*socket.socketpair())
    yield idle
    idle.close()


@pytest.fixture
def idle_over_tcp() -> Iterator[Idle]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        idle = Idle(server.accept()[0], client)
    yield idle
    idle.close()


def test_a_request_that_came_unseen_before_keepalive_ended_is_served(idle):
    idle.client.sendall(REQUEST)
    idle.clients.tick(2.0)
    assert idle.judge.ready == [idle.conn]


def test_a_request_that_came_unseen_before_the_last_call_of_a_stop_is_served(idle):
    idle.clients.stop(0.0, LAST_CALL, shared=False, serving=True)
    idle.client.sendall(REQUEST)
    idle.clients.tick(LAST_CALL)
    idle.clients.on_event(idle.conn, select.EPOLLIN, LAST_CALL)
    assert idle.judge.ready == [idle.conn]


def test_a_request_that_its_slot_may_not_answer_any_more_is_told_so_at_the_end_of_a_stop(idle):
    idle.client.sendall(REQUEST)
    idle.clients.on_event(idle.conn, select.EPOLLIN, 0.0)
    idle.clients.lend(idle.conn)
    idle.clients.stop(0.0, LAST_CALL, shared=False, serving=True)
    idle.clients.give_back(idle.conn, Report(Kind.DONE, end=End.UNTAKEN), LAST_CALL)
    assert OUT_OF_TIME.text.encode() in idle.client.recv(1 << 16)


def test_of_a_long_head_a_waiting_request_keeps_a_part_and_its_answer_ends_the_connection(idle):
    head = b"GET / HTTP/1.1\r\n" + b"A: a\r\n" * 8000 + b"\r\n"
    idle.client.sendall(head)
    idle.clients.on_event(idle.conn, select.EPOLLIN, 0.0)
    assert idle.judge.ready == [idle.conn]
    assert (idle.conn.head.size, len(idle.conn.head.text)) == (len(head), HEAD_KEPT)
    idle.clients.answer(idle.conn, Answer(503, "full"), 0.0)
    assert idle.conn.state == State.LINGERING
    assert b"Connection: close" in idle.client.recv(1 << 16)


@pytest.mark.parametrize("field", [b"A: a", b"A : a"], ids=["probe", "not-plain"])
def test_of_a_long_head_a_part_is_kept_while_its_body_comes_and_how_all_of_it_reads(idle, field):
    idle.clients.serve(Serving(probes=(b"/ready",)))
    length = b"GET /ready HTTP/1.1\r\nContent-Length: 10\r\n"
    idle.client.sendall(length + b"A: a\r\n" * 8000 + field + b"\r\n\r\nhalf ")
    idle.clients.on_event(idle.conn, select.EPOLLIN, 0.0)
    assert (idle.conn.state, len(idle.conn.head.text)) == (State.ARRIVING, HEAD_KEPT)
    idle.client.sendall(b"whole")
    idle.clients.on_event(idle.conn, select.EPOLLIN, 0.05)
    assert idle.judge.ready == ([] if field == b"A: a" else [idle.conn])
    assert idle.judge.ready or idle.client.recv(1 << 16).endswith(b"/ready\n")


def test_nothing_is_kept_of_the_head_of_a_request_whose_response_is_being_sent(idle):
    idle.client.sendall(REQUEST)
    idle.clients.on_event(idle.conn, select.EPOLLIN, 0.0)
    idle.clients.lend(idle.conn)
    idle.clients.give_back(idle.conn, Report(Kind.DONE, rest=Rest.of(b"rest")), 0.0)
    assert (idle.conn.state, idle.conn.head) == (State.SENDING, None)


@pytest.mark.parametrize(
    ("sent", "later", "state"),
    [
        (REQUEST, b"", State.ARRIVING),
        (CLOSING, b"", State.CLOSED),
        (CLOSING + b"more", b"", State.LINGERING),
        (CLOSING, b"more", State.LINGERING),
        (CLOSING.replace(b"GET", b"POST", 1), b"", State.CLOSED),
        (CLOSING.replace(b"Host", b"Content-Length: 0\r\nHost", 1), b"", State.LINGERING),
    ],
    ids=["kept", "ends", "sent-more", "sends-more", "post", "framed"],
)
def test_an_answered_connection_lingers_only_if_something_unread_may_lie_there(
    idle, sent, later, state
):
    """A reset, which an end with something unread is, would take the answer away."""
    idle.client.sendall(sent)
    idle.clients.on_event(idle.conn, select.EPOLLIN, 0.0)
    if later:
        idle.client.sendall(later)
        idle.clients.on_event(idle.conn, select.EPOLLIN, 0.5)
    idle.clients.answer(idle.conn, Answer(503, "full"), 1.0)
    assert idle.conn.state == state
    assert idle.client.recv(1 << 16).endswith(b"full\n")


def test_an_idle_connection_is_closed_when_keepalive_ends(idle):
    idle.clients.tick(1.9)
    assert idle.conn.state == State.ARRIVING
    idle.clients.tick(2.0)
    assert idle.conn.state == State.CLOSED


def test_a_long_head_that_dribbles_is_looked_at_less_often_than_a_short_one(idle):
    idle.client.sendall(b"GET / HTTP/1.1\r\nA: " + b"a" * 60_000)
    idle.clients.on_event(idle.conn, select.EPOLLIN, 0.0)
    seen = [idle.conn.arrived]
    idle.client.sendall(b"a")
    idle.clients.on_event(idle.conn, select.EPOLLIN, 0.001)
    for now in (0.025, 0.05, 0.08):
        idle.clients.tick(now)
        seen.append(idle.conn.arrived - seen[0])
    assert seen[1:] == [0, 0, 1]


def test_a_chunked_body_for_which_no_room_is_left_is_told_of_once_when_it_is_silent(
    idle_over_tcp, monkeypatch
):
    idle = idle_over_tcp
    monkeypatch.setattr(arrival, "ALL_MARKS", 0)
    idle.client.sendall(CHUNKED + b"dbba0\r\n" + b"x" * 100_000)
    wait_for(lambda: idle.conn.unread() > 100_000, "all of it")
    events = [idle.turn(step / 10) for step in range(20)]
    assert sum(events) <= 3
    assert idle.judge.ready == []


def test_a_chunked_body_for_which_no_room_is_left_is_read_by_the_slot(idle_over_tcp, monkeypatch):
    idle = idle_over_tcp
    monkeypatch.setattr(arrival, "ALL_MARKS", 0)
    body = CHUNKED + b"dbba00\r\n" + b"x" * 14_400_000
    idle.client.setblocking(False)
    sent = 0

    def is_ready() -> bool:
        nonlocal sent
        with suppress(BlockingIOError):
            sent += idle.client.send(body[sent:])
        idle.turn(time.monotonic())
        return idle.judge.ready == [idle.conn]

    wait_for(is_ready, "a slot to be asked for")


def test_silence_within_a_head_is_not_held_against_its_body(idle_over_tcp, monkeypatch):
    """Before Linux 6.2 nobody can tell whether a silent client is stuck."""
    idle = idle_over_tcp
    monkeypatch.setattr(Connection, "is_stuck", lambda conn: True)
    came = 0
    for now, part in ((0.0, CHUNKED[:8]), (0.03, CHUNKED[8:] + b"fff\r\nhalf")):
        idle.client.sendall(part)
        came += len(part)
        wait_for(lambda came=came: idle.conn.unread() == came, "the part")
        idle.turn(now)
    for step in range(1, 10):
        idle.turn(step / 10)
    assert idle.judge.ready == []


class Endless:
    """Listeners of which each look says that there may be more."""

    is_short = False

    def accept(self, fd: int, now: float, most: int = 0) -> Iterator[Connection | None]:
        return iter(())

    def fds(self) -> list[int]:
        return [1]

    def close(self) -> None:
        pass

    def accept_if(self, may: bool) -> None:
        pass


@pytest.mark.parametrize("serving", [True, False])
def test_a_stop_does_not_take_from_shared_listeners_for_ever(serving, idle):
    idle.clients.listeners = Endless()
    idle.clients.stop(0.0, LAST_CALL, shared=True, serving=serving)


def test_new_limits_hold_for_what_slots_wait_for_on_connections_that_are_there(idle):
    def limits() -> list[bytes]:
        options = (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)
        return [idle.conn.sock.getsockopt(socket.SOL_SOCKET, each, 16) for each in options]

    idle.clients.serve(Serving(receive_timeout=3.0, send_timeout=4.5))
    assert limits() == [timeval(3.0), timeval(4.5)]
