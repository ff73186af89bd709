"""Whatever clients send, in whatever pieces: the dispatcher's side and the slot's, in one process.

A connection is taken by `Clients`, which reads it beside `Exchange`, a slot's gunicorn parser. Time
is made up, sockets are real. What must hold:

1. Nothing raises, and nothing is left.
2. A connection has a deadline, unless it waits in the queue or runs.
3. A request becomes ready once.
4. Requests come as gunicorn's parser, alone with the whole stream, sees them: same order, method,
   path, body and address of a PROXY line. What is answered without a slot is one of them, too, and
   without a body if another follows; or the parser would refuse it, but its head does not speak of
   a body.

More of it: `pytest --hypothesis-profile=long tests/test_fuzz_clients.py`.
"""

from __future__ import annotations

import math
import os
import select
import socket
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from gunicorn import http
from gunicorn.config import Config
from gunicorn.workers.base import Worker
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_head import PROXIED_V2, PROXY_V1, pieces

from replica_plugin.answers import Answer, probe
from replica_plugin.channel import Job
from replica_plugin.client_socket import ClientSocket
from replica_plugin.clients import Clients
from replica_plugin.connection import Connection, State, timeval
from replica_plugin.exchange import Exchange
from replica_plugin.head import Head, Limits
from replica_plugin.overdue import Watch
from replica_plugin.rules import Serving
from replica_plugin.settled import Settled

PROBE = b"/-/healthz"
LONG = 1000.0  # longer than every deadline
FULL = Answer(503, "full", 1)
get_parser = getattr(http, "get_parser", None) or http.RequestParser  # get_parser since 25


class Request(NamedTuple):
    """One request; without a body if that did not come whole, or nobody has looked."""

    method: str
    path: str
    body: bytes | None = None
    proxied: bool = False
    ran: bool = True
    speaks_of_a_body: bool = False


class Quiet:
    """A log."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: None


class Slot:
    """A process with a slot, whose app takes down what it is asked."""

    def __init__(self, proxy: bool) -> None:
        config = Config()
        config.set("proxy_protocol", proxy)
        self.cfg = Settled(config)
        self.log = Quiet()
        self.asked: list[Request] = []
        self._watch = Watch(1, None, lambda: None)

    def wsgi(self, environ: Any, start_response: Any) -> list[bytes]:
        path = environ["RAW_URI"].partition("?")[0]
        proxied = environ["REMOTE_ADDR"] == "10.0.0.1"
        asked = Request(environ["REQUEST_METHOD"], path, None, proxied)
        self.asked.append(asked)
        self.asked[-1] = asked._replace(body=environ["wsgi.input"].read())
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    def count_request(self) -> None:
        pass

    handle_error = Worker.handle_error

    def work(self, conn: Connection) -> Any:
        """Read and answer the request, as slot.py has it done; the report."""
        client = conn.client
        job = Job(1, conn.number, client, "", conn.ahead, conn.carry, False, 0.0, math.inf)
        run = _Run()
        sock = ClientSocket(
            conn.sock.family,
            socket.SOCK_STREAM,
            os.dup(conn.fd),
            claim=lambda: True,
            complete=lambda: None,
            room=lambda: 0,
        )
        with sock:
            return Exchange(self, job, sock, run).run()


class _Run:
    asked: Any = None
    is_answered = False
    tale = ""

    def window(self, call: Any) -> Any:
        return call()


class Dispatcher:
    """`Clients` with one connection, and a judge that runs or refuses what is ready."""

    def __init__(self, proxy: bool, tcp: bool, buffer: int, refuses: list[bool]) -> None:
        serving = Serving(
            Limits(proxy=proxy), probes=(PROBE,), request_buffer=buffer, keepalive=2.0
        )
        self.epoll = select.epoll()
        self.clients = Clients(self.epoll, [], serving, self)
        self.slot = Slot(proxy)
        self.seen: list[Request] = []
        self._refuses = refuses
        self._ready: list[Connection] = []
        self._keeping = False
        self._now = 1.0
        ours, self.client = _tcp() if tcp else socket.socketpair()
        self.client.setblocking(False)
        peer = ours.getpeername()
        self.conn = Connection(ours, peer, "", not tcp)
        self.clients.connections[self.conn.fd] = self.conn
        self.clients._arriving.begin(self.conn, self._now)

    # What it asks of its judge.

    def on_ready(self, conn: Connection, now: float) -> None:
        assert conn.state == State.WAITING and conn not in self._ready
        self._ready.append(conn)

    def on_gone(self, conn: Connection) -> None:
        self._ready.remove(conn)

    def on_answered(self, conn: Connection, answer: Answer, now: float) -> None:
        assert conn.state != State.CLOSED

    def on_cut_off(self, conn: Connection, now: float) -> None:
        pass

    def probe(self, name: bytes) -> Answer:
        self._without_a_slot()
        return probe(True, "fine", "")

    # What happens to it.

    def send(self, data: bytes, seconds: float) -> None:
        with suppress(OSError):  # it has been closed
            self.client.send(data)
        self.go_on(seconds)

    def leave(self) -> None:
        self.client.close()
        self.go_on(0.0)

    def go_on(self, seconds: float) -> None:
        """Let time pass, and everything happen that can."""
        self._now += seconds
        for _ in range(50):
            events = self.epoll.poll(0)
            for _, mask in events:
                if self.conn.state != State.CLOSED:
                    self.clients.on_event(self.conn, mask, self._now)
            self.clients.follow_up(self._now)
            self.clients.tick(self._now)
            self._check()
            more = self.clients.answered or self.clients.next_deadline() <= self._now
            if not (events or self._ready or more):
                break
            while self._ready:
                self._judge(self._ready.pop())
                self._check()
            self._drain()

    def _judge(self, conn: Connection) -> None:
        if self._refuses and self._refuses.pop():
            self._without_a_slot()
            self.clients.answer(conn, FULL, self._now)
            return
        conn.limit_waits(timeval(0.002), timeval(1.0))
        self.clients.lend(conn)
        before = len(self.slot.asked)
        report = self.slot.work(conn)
        self.seen += self.slot.asked[before:] or [Request("", "")]
        self.clients.give_back(conn, report, self._now)

    def _without_a_slot(self) -> None:
        head = self.conn.head or Head(0)
        framed = any(word in head.text.lower() for word in (b"content-length", b"encoding", b"\n "))
        asked = Request(
            head.method.decode(), head.path.decode(), ran=False, speaks_of_a_body=framed
        )
        self.seen.append(asked)

    def _drain(self) -> None:
        try:
            while self.client.recv(1 << 16):
                pass
        except OSError:
            pass

    def _check(self) -> None:
        for conn in self.clients.connections.values():
            timed = conn.timer is not None and conn in conn.timer
            assert timed is (conn.state not in (State.WAITING, State.RUNNING)), conn

    def close(self) -> None:
        self.client.close()
        self.epoll.close()


def _tcp() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return server.accept()[0], client


def oracle(data: bytes, proxy: bool) -> list[Request]:
    """The requests that gunicorn's parser, undisturbed, finds in a stream."""
    config = Config()
    config.set("proxy_protocol", proxy)
    found, proxied = [], False
    parser = get_parser(config, [data], ("127.0.0.1", 1))
    try:
        for request in parser:
            proxied = proxied or bool(request.proxy_protocol_info)
            found.append(Request(request.method, request.uri.partition("?")[0], None, proxied))
            found[-1] = found[-1]._replace(body=request.body.read())
            if request.should_close():
                break
    except Exception:  # malformed, or cut short
        pass
    return found


# What clients send.

STOLEN = b"GET /stolen HTTP/1.1\r\n\r\n"
"""What is in a body, and must not be run."""

WORDS = st.text("abcXYZ019-._~%", min_size=1, max_size=8)
METHODS = st.sampled_from(["GET", "GET", "HEAD", "POST", "PUT", "OPTIONS", "CONNECT"])
TARGETS = st.sampled_from([PROBE.decode()]) | WORDS.map(lambda word: f"/{word}?q")
FIELDS = st.sampled_from(
    [
        *("Host: a", "X-Queue-Timeout: 0.5", "Expect: 100-continue", "Connection: close"),
        *("Connection: keep-alive", "Accept: application/json", "X: \xe4", "A: b\r\n c"),
        *("Content-Length: 3", "Transfer-Encoding: chunked", "Content-Length : 3", "A: b\0"),
    ]
)


@st.composite
def whole(draw: st.DrawFn) -> bytes:
    """A request that is as it should be, for the most part."""
    fields = draw(st.lists(FIELDS, max_size=2))
    body = b""
    kind = draw(st.sampled_from(["", "", "length", "chunked"]))
    if kind == "length":
        body = draw(st.just(STOLEN) | st.binary(max_size=300))
        fields.append(f"Content-Length: {len(body)}")
    elif kind == "chunked":
        chunk = st.just(STOLEN) | st.binary(min_size=1, max_size=100)
        chunks = draw(st.lists(chunk, max_size=4))
        ends = draw(st.sampled_from([b"0\r\n\r\n", b"0;x\r\nT: t\r\n\r\n", b"0\r\n", b"x"]))
        body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + ends
        fields.append("Transfer-Encoding: chunked")
    version = draw(st.sampled_from(["1.1", "1.1", "1.0"]))
    line = f"{draw(METHODS)} {draw(TARGETS)} HTTP/{version}"
    return "\r\n".join([line, *fields, "", ""]).encode("latin-1") + body


PARTS = st.one_of(whole(), whole(), pieces, st.binary(max_size=40))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[bytes], list[float], bool]:
    """Parts of a stream, the seconds between them, and whether there is PROXY protocol."""
    proxy = draw(st.booleans())
    start = draw(st.sampled_from([PROXY_V1, PROXIED_V2, b""])) if proxy else b""
    data = start + b"".join(draw(st.lists(PARTS, min_size=1, max_size=5)))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    parts = [data[a:b] for a, b in pairwise([0, *cuts, len(data)]) if b > a]
    pauses = st.sampled_from([0.0, 0.0, 0.01, 0.05, 0.2, 1.0, 9.0, 40.0])
    return parts, [draw(pauses) for _ in parts], proxy


LENGTH = b"POST /a HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(STOLEN), STOLEN)
PROXIED = PROXY_V1 + b"GET /a HTTP/1.1\r\n\r\n" * 2
CHUNKED = b"POST %s HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" % PROBE + STOLEN


@settings(deadline=None)
@given(
    conversation=conversations(),
    buffer=st.sampled_from([0, 10, 1 << 20]),
    refuses=st.lists(st.booleans(), max_size=6),
    leaves=st.booleans(),
)
@example(conversation=([LENGTH], [0.0], False), buffer=0, refuses=[True], leaves=True)
@example(conversation=([CHUNKED], [0.0], False), buffer=0, refuses=[], leaves=True)
@example(conversation=([PROXIED], [0.0], True), buffer=0, refuses=[True], leaves=True)
@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
def test_what_clients_send_is_read_as_by_gunicorn_alone(tcp, conversation, buffer, refuses, leaves):
    parts, pauses, proxy = conversation
    dispatcher = Dispatcher(proxy, tcp, buffer, list(refuses))
    for part, seconds in zip(parts, pauses):
        dispatcher.send(part, seconds)
    dispatcher.go_on(1.0)
    if leaves:
        dispatcher.leave()
    dispatcher.go_on(LONG)
    dispatcher.go_on(LONG)
    expected = oracle(b"".join(parts), proxy)
    assert _agree(dispatcher.seen, expected), (dispatcher.seen, expected)
    assert dispatcher.clients.connections == {}
    assert dispatcher.conn.state == State.CLOSED
    dispatcher.close()


def _agree(seen: list[Request], expected: list[Request]) -> bool:
    for one, other in zip(seen, expected):
        if one[:2] != other[:2]:
            return not one.method and not one.ran  # answered before anything was known of it
        if one.ran and one.proxied is not other.proxied:
            return False
        if one.ran and None not in (one.body, other.body) and one.body != other.body:
            return False
    rest = seen[len(expected) :]
    if rest and not (rest[0].ran or rest[0].speaks_of_a_body):
        return True  # the parser would refuse it; but all agree where it ends
    return not any(each.ran and each.method for each in rest)
