"""Whatever processes say, with whatever descriptors: it ends no dispatcher and breaks no cap.

A whole `Dispatcher` in this process, with real clients, one registered process, which says what
hypothesis makes up, and others that offer themselves. What must hold, after each turn:

1. Nothing raises.
2. Never more runs than p*t.
3. In the end, when all processes are dead, all clients are answered or cut off, and no descriptor
   is left.

More of it: `pytest --hypothesis-profile=long tests/test_fuzz_processes.py`.
"""

from __future__ import annotations

import fcntl
import gc
import json
import math
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from replica_plugin.cells import Cells
from replica_plugin.channel import (
    End,
    Kind,
    Register,
    _decode_register,
    close_all,
    control_pair,
    decode_report,
    decode_stall,
    pair,
    send,
)
from replica_plugin.connection import Connection, State
from replica_plugin.decisions import Rules
from replica_plugin.deck import take
from replica_plugin.dispatcher import Dispatcher, Frame
from replica_plugin.pages import MasterPage, ReplicaPage
from replica_plugin.processes import Link
from replica_plugin.rest import Rest
from replica_plugin.rules import Privileges, Serving, Wishes

CLIENTS = 6
LONG = 1000.0  # longer than every deadline
REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
WISHES = Wishes(
    Rules(1, 2, request_timeout=60.0), Serving(), (1,), 1, 2, 30, Privileges(0, 0, False), {}
)


class Quiet:
    """A journal."""

    def next_deadline(self) -> float:
        return math.inf

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: None


class Replica:
    """A dispatcher, a process of two slots, and clients."""

    def __init__(self, child: int) -> None:
        gc.collect()  # what an example before this has left is not to be closed in this one
        self.control, self.writing = control_pair()
        self._nudge = os.eventfd(0, os.EFD_NONBLOCK)
        self._master = os.pidfd_open(os.getpid())
        self._pages = MasterPage(), ReplicaPage()
        self._pages[0].write(WISHES.encode())
        frame = Frame((), self.control, *self._pages, self._nudge, self._master, os.getpid())
        self.dispatcher = Dispatcher(frame, WISHES, Quiet())
        self.before = len(os.listdir("/proc/self/fd"))
        self.says, theirs = pair()
        cells = Cells(2)
        self.cells = Cells(2, os.dup(cells.fd))
        self.link = Link(1, child, 2, 0, theirs, cells, os.pidfd_open(child))
        self.dispatcher._processes._know(self.link)
        self.dispatcher.on_registered(self.link, False, False)
        self.clients = [self._connect() for _ in range(CLIENTS)]
        self.turn()

    def _connect(self) -> socket.socket:
        ours, client = socket.socketpair()
        client.setblocking(False)
        client.send(REQUEST)
        clients, now = self.dispatcher._clients, time.monotonic()
        conn = Connection(ours, "", "", True)
        clients.connections[conn.fd] = conn
        clients._arriving.begin(conn, now)
        return client

    def requests(self) -> list[int]:
        return list(self.dispatcher.requests)

    def say(self, on: socket.socket, message: bytes, fds: list[int]) -> None:
        with suppress(OSError):
            send(on, message, *fds)
        for fd in fds:
            os.close(fd)
        self.turn()

    def turn(self, later: float = 0.0) -> None:
        """What the dispatcher's loop does, without a wait."""
        dispatcher, now = self.dispatcher, time.monotonic() + later
        dispatcher._on_events(dispatcher._epoll.poll(0), now)
        dispatcher._tick(now)
        dispatcher._fill_deck()
        assert 0 <= dispatcher._decisions.running <= WISHES.rules.cap

    def end(self) -> None:
        """Time passes, all processes are dead, all clients leave: nothing is left."""
        self.turn(LONG)
        dispatcher, now = self.dispatcher, time.monotonic() + LONG
        for link in list(dispatcher._processes.links.values()):
            dispatcher._processes._on_death(link, now)
        assert dispatcher._decisions.running == 0
        for client in self.clients:
            client.close()
        for _ in range(3):
            self.turn(LONG)
        assert not (dispatcher._decisions.taken or dispatcher._decisions.offered)
        waits = (State.WAITING, State.ARRIVING)
        for conn in list(dispatcher._clients.connections.values()):
            assert conn.state in (*waits, State.LINGERING, State.SENDING)
            dispatcher._clients.close(conn)
        self.says.close()
        os.close(self.cells.fd)
        self.cells.close()
        assert len(os.listdir("/proc/self/fd")) == self.before

    def close(self) -> None:
        processes = self.dispatcher._processes
        for fd in (self._nudge, self._master, processes._own_pidfd, *(p.fd for p in self._pages)):
            os.close(fd)
        deck = processes.deck
        for each in (self.control, self.writing, self.dispatcher._epoll, deck.end, deck._front):
            each.close()


# Descriptors of all kinds; each is closed by whoever sends it.


def memory(size: int, seals: int, grown: int = 0) -> int:
    fd = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING)
    os.write(fd, b"r" * size)
    os.ftruncate(fd, size + grown)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def rest() -> int:
    return Rest.of(b"r" * 1000).fd


def a_socket(kind: int, listens: bool = False) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        if listens:
            sock.listen()
        return os.dup(sock.fileno())


def of_pair(kind: int) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    theirs.close()
    return ours.detach()


def client() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        theirs.sendall(REQUEST)
        theirs.shutdown(socket.SHUT_WR)
        return server.accept()[0].detach()


ALL_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
MAKERS: list[Callable[[], int]] = [
    rest,
    client,
    lambda: memory(100, 0),
    lambda: memory(100, ALL_SEALS, grown=(1 << 63) - 200),
    lambda: memory(100, fcntl.F_SEAL_SHRINK),
    lambda: Cells(2).fd,
    lambda: os.open("/dev/null", os.O_RDONLY),
    lambda: os.eventfd(1),
    lambda: os.pidfd_open(os.getpid()),
    lambda: os.pidfd_open(os.getppid()),
    lambda: of_pair(socket.SOCK_STREAM),
    lambda: of_pair(socket.SOCK_DGRAM),
    lambda: of_pair(socket.SOCK_SEQPACKET),
    lambda: a_socket(socket.SOCK_STREAM, listens=True),
    lambda: a_socket(socket.SOCK_STREAM),
    lambda: a_socket(socket.SOCK_DGRAM),
    lambda: select.epoll().fileno() and os.dup(0),
]
DESCRIPTORS = st.lists(st.sampled_from(MAKERS), max_size=3)

# Messages.

BYTES = st.binary(max_size=60)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=5,
)
OFFER = vars(Register(2, 2, 0, False))
ADOPT = {"number": 2, "server": "", "ahead": "", "carry": ""}


Message = Callable[[list[int]], bytes]


@st.composite
def reports(draw: st.DrawFn) -> Message:
    """A message about some of the requests that are known."""
    request, took = draw(st.integers(0, CLIENTS)), draw(st.none() | st.integers(0, CLIENTS))
    kind = draw(st.just(Kind.DONE) | st.just(Kind.REST) | st.integers(0, Kind.OWED + 1))
    end = draw(st.integers(0, 5))
    ahead, carry = draw(BYTES), draw(BYTES | JSON.map(lambda value: json.dumps(value).encode()))
    size = draw(st.just(len(ahead)) | st.integers(0, 2**32 - 1))
    return lambda known: (
        report(kind, end, known[request], size, 0 if took is None else known[took]) + ahead + carry
    )


def report(kind: int, end: int = 0, request: int = 0, size: int = 0, took: int = 0) -> bytes:
    return struct.pack("=BBQIQ", kind, end, request, size, took)


OTHER = BYTES.map(lambda data: lambda known: data)


def fields(whole: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Some of the fields are made up, some are missing."""
    odd = st.dictionaries(st.sampled_from(sorted(whole)), JSON, max_size=2)
    gone = st.sets(st.sampled_from(sorted(whole)), max_size=1)
    return st.builds(
        lambda odd, gone: json.dumps(
            {key: value for key, value in {**whole, **odd}.items() if key not in gone}
        ).encode(),
        odd,
        gone,
    )


CONTROL = st.one_of(
    BYTES,
    fields(OFFER).map(lambda text: b"R" + text),
    fields(ADOPT).map(lambda text: b"A" + text),
    JSON.map(lambda value: b"R" + json.dumps(value).encode()),
)
ADOPTED = b"A" + json.dumps(ADOPT).encode()
HANDED_BACK = st.tuples(st.just(ADOPTED), st.sampled_from(MAKERS).map(lambda each: [each]))
OFFERS = st.just([lambda: of_pair(socket.SOCK_SEQPACKET), MAKERS[5], MAKERS[8]])


@pytest.fixture(scope="module")
def child() -> Iterator[int]:
    gc.collect()
    gc.freeze()
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    gc.unfreeze()
    process.kill()
    process.wait()


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the dispatcher would have killed; this process, among others."""
    killed: list[int] = []
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda pidfd, number: killed.append(number))
    return killed


def first(known: list[int]) -> bytes:
    return report(Kind.REST, End.KEEP, known[0])


@settings(deadline=None)
@given(
    messages=st.lists(
        st.tuples(reports() | reports() | OTHER, DESCRIPTORS, st.integers(0, 2)), max_size=8
    )
)
@example(messages=[(first, [MAKERS[3]], 0)] * 4)
@pytest.mark.usefixtures("killed")
def test_whatever_a_process_reports_and_takes_the_dispatcher_goes_on(child, messages):
    replica = Replica(child)
    for _ in range(2):
        replica.say(replica.says, report(Kind.FREE), [])
    for message, makers, takes in messages:
        for _ in range(takes):
            _, fds = take(replica.dispatcher._processes.deck.end) or (None, [])
            close_all(fds)
        known = [*replica.requests(), *range(CLIENTS + 1)]
        replica.say(replica.says, message(known), [make() for make in makers])
    replica.end()
    replica.close()


@settings(deadline=None)
@given(messages=st.lists(st.tuples(CONTROL, DESCRIPTORS | OFFERS) | HANDED_BACK, max_size=8))
@pytest.mark.usefixtures("killed")
def test_whatever_comes_on_the_control_socket_the_dispatcher_goes_on(child, messages):
    replica = Replica(child)
    for message, makers in messages:
        replica.say(replica.writing, message, [make() for make in makers])
    assert replica.dispatcher._processes.links[1] is replica.link
    replica.end()
    replica.close()


@settings(deadline=None)
@given(
    BYTES | JSON.map(lambda value: json.dumps(value).encode()) | fields({"share": 1, "place": ""})
)
def test_whatever_a_process_says_of_its_hub_is_a_stall_or_nothing(data):
    stall = decode_stall(data)
    assert stall is None or (len(stall.place) <= 200 and stall.place.isprintable())


@pytest.mark.parametrize("kind", [Kind.DONE, Kind.OVERDUE, Kind.RETURNED, Kind.REST])
@pytest.mark.usefixtures("killed")
def test_of_a_request_that_is_not_its_own_a_process_can_say_nothing(child, kind):
    replica = Replica(child)
    waiting = replica.requests()
    replica.say(replica.says, report(kind, 0, waiting[0]), [])
    assert replica.requests() == waiting
    assert list(replica.dispatcher._decisions.waiting) == waiting
    replica.end()
    replica.close()


@pytest.mark.usefixtures("killed")
def test_a_rest_is_sent_once_and_its_request_runs_until_it_is_done(child):
    replica = Replica(child)
    replica.say(replica.says, report(Kind.FREE), [])
    decisions, (client, *_), (request, *others) = (
        replica.dispatcher._decisions,
        replica.clients,
        replica.requests(),
    )
    for _ in range(2):
        replica.say(replica.says, report(Kind.REST, End.KEEP, request), [rest()])
        assert decisions.runs(1, request)
    assert client.recv(2000) == b"r" * 1000
    client.send(REQUEST)
    replica.turn()
    assert replica.requests()[:-1] == others
    replica.say(replica.says, report(Kind.DONE, End.ABORT, request), [])
    assert not decisions.runs(1, request)
    assert decisions.runs(1, others[0])
    replica.end()
    replica.close()


@pytest.mark.parametrize("odd", [{"slots": 0}, {"extra": 2}, {"extra": -1}, {"age": -1}])
def test_an_offer_beyond_what_a_process_can_have_is_none(odd):
    with pytest.raises(ValueError, match="a process without slots"):
        _decode_register({**OFFER, **odd})


def test_a_descriptor_comes_with_rest_only_and_a_rest_without_one_ends_the_connection():
    fd = rest()
    with pytest.raises(ValueError, match="a descriptor too many"):
        decode_report(report(Kind.DONE, End.KEEP, 1), [fd])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert decode_report(report(Kind.REST, End.KEEP, 1), []).end == End.ABORT
