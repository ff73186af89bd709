"""Clients, all in one thread: an open-loop generator of requests, and closed-loop ones.

1. What a request took counts from when it was due, not from when it could be sent: a generator that
   is held up would else hide the wait it is there to measure.
2. Each request knows when it was due and when all that the thread can do for it was done: connect
   and send, as far as the kernel takes it. Results carry how late that was.
3. Until the next request is due the thread sleeps in select(), whose timeout is in microseconds
   (that of epoll_wait() is in milliseconds), and for the last SPIN seconds asks without sleeping.
4. Where it may, the thread runs before all else (SCHED_FIFO). It needs a few percent of a CPU, but
   at once.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic

from .numbers import percentile

SPIN = 0.0001
PORTS = 20000  # connections from one address
PAUSE = 0.005  # of a closed-loop client that got no answer
Address = tuple[str, int]


@dataclass(slots=True, eq=False)
class Request:
    """One request and what became of it; status 0: no answer; `refused`: no connection either."""

    path: str
    due: float
    sent: float = 0.0
    done: float = 0.0
    status: int = 0
    refused: bool = False
    body: bytes = b""

    @property
    def took(self) -> float:
        return self.done - self.due

    @property
    def pid(self) -> int:
        return int(self.body.split()[0])

    @property
    def began(self) -> float:
        return float(self.body.split()[1])

    @property
    def overslept(self) -> float:
        return float(self.body.split()[2])


@dataclass(slots=True, eq=False)
class Connection:
    sock: socket.socket
    request: Request | None = None
    unsent: bytes = b""
    received: bytearray = field(default_factory=bytearray)
    used: bool = False  # it has brought an answer before


class Clients:
    """Connections to one server. With `linger`, they are closed so long after their last answer."""

    def __init__(self, address: Address, keep: bool = False, linger: float = 0.0) -> None:
        self._address, self._keep, self._linger = address, keep, linger
        self._epoll = select.epoll()
        self._all: dict[int, Connection] = {}
        self._idle: list[Connection] = []
        self._lingering: deque[tuple[float, socket.socket]] = deque()
        self._ended: list[Request] = []
        self._end = b" HTTP/1.1\r\nHost: benchmark\r\n%s\r\n" % (
            b"" if keep else b"Connection: close\r\n"
        )

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._all.values():
            connection.sock.close()
        for _at, sock in self._lingering:
            sock.close()
        self._epoll.close()

    @property
    def outstanding(self) -> int:
        return len(self._all) - len(self._idle)

    def send(self, path: str, due: float) -> Request:
        request = Request(path, due)
        self._send(request, self._idle.pop() if self._idle else None)
        request.sent = monotonic()
        return request

    def serve(self, until: float) -> list[Request]:
        """Wait for answers; return when there are some, or none and it is time."""
        while not self._ended:
            left = until - monotonic()
            if left <= 0:
                break
            if left > SPIN:
                select.select([self._epoll], [], [], left - SPIN)
            for number, _ in self._epoll.poll(0):
                self._advance(self._all[number])
            while self._lingering and self._lingering[0][0] <= monotonic():
                self._lingering.popleft()[1].close()
        ended, self._ended = self._ended, []
        return ended

    def _send(self, request: Request, connection: Connection | None) -> None:
        if connection is None:
            sock = socket.socket()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if len(self._all) >= PORTS:
                sock.bind((f"127.0.0.{2 + len(self._all) // PORTS}", 0))
            request.refused = sock.connect_ex(self._address) == errno.ECONNREFUSED
            connection = self._all[sock.fileno()] = Connection(sock)
            self._epoll.register(sock, select.EPOLLIN | select.EPOLLOUT)
        connection.request = request
        connection.unsent = b"GET " + request.path.encode() + self._end
        self._flush(connection)

    def _flush(self, connection: Connection) -> None:
        request = connection.request
        assert request is not None
        try:
            count = connection.sock.send(connection.unsent)
        except BlockingIOError:
            return
        except OSError as error:
            request.refused |= isinstance(error, ConnectionRefusedError)
            self._lost(connection)
            return
        connection.unsent = connection.unsent[count:]
        if not connection.unsent and not connection.used:
            self._epoll.modify(connection.sock, select.EPOLLIN)

    def _advance(self, connection: Connection) -> None:
        if connection.unsent:
            self._flush(connection)
            return
        try:
            data = connection.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost(connection)
            return
        connection.received += data
        if connection.request is not None:
            self._read(connection, connection.request)

    def _read(self, connection: Connection, request: Request) -> None:
        head, found, body = bytes(connection.received).partition(b"\r\n\r\n")
        fields = head.lower()
        length = fields.partition(b"content-length:")[2].partition(b"\r\n")[0]
        if not found or len(body) < int(length):
            return
        request.done = monotonic()
        request.status, request.body = int(head[9:12]), body
        connection.request = None
        connection.received.clear()
        connection.used = True
        self._ended.append(request)
        closing = b"connection: close" in fields or head.startswith(b"HTTP/1.0")
        if self._keep and not closing:
            self._idle.append(connection)
        else:
            self._close(connection)

    def _lost(self, connection: Connection) -> None:
        """The server closed it: one that was idle may go, and what it was just sent goes again."""
        request, again = connection.request, connection.used and not connection.received
        if request is None:
            self._idle.remove(connection)
        self._close(connection)
        if request is not None and again:
            self._send(request, None)
        elif request is not None:
            request.done = monotonic()
            self._ended.append(request)

    def _close(self, connection: Connection) -> None:
        del self._all[connection.sock.fileno()]
        self._epoll.unregister(connection.sock)
        if self._linger:
            self._lingering.append((monotonic() + self._linger, connection.sock))
        else:
            connection.sock.close()


@contextmanager
def before_all_else() -> Iterator[None]:
    """Run this thread at once whenever it can go on, and collect no garbage meanwhile."""
    gc.disable()
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        if os.sched_getscheduler(0) & os.SCHED_FIFO:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        gc.enable()


def open_loop(
    address: Address,
    arrivals: Sequence[tuple[float, str]],
    keep: bool = False,
    patience: float = 10,
) -> list[Request]:
    """Send these paths at these times, whatever becomes of them; wait so long for the last."""
    requests = []
    with Clients(address, keep) as clients, before_all_else():
        start = monotonic() + 0.05
        for offset, path in arrivals:
            while clients.serve(start + offset):
                pass
            requests.append(clients.send(path, start + offset))
        end = monotonic() + patience
        while clients.outstanding and clients.serve(end):
            pass
    return requests


def closed_loop(
    address: Address,
    count: int,
    path: str,
    seconds: float,
    *,
    linger: float = 0.0,
    after: float = 0.0,
    action: Callable[[], None] = lambda: None,
    until_refused: bool = False,
    patience: float = 10.0,
) -> list[Request]:
    """So many clients, each of which sends the next request when it has its answer.

    After so long, once, `action` is called. No more is sent when the time is over or, if so wanted,
    when no connection can be made any more. What has no answer after `patience` has the status 0.
    """
    requests: list[Request] = []
    start = monotonic()
    end = start + seconds
    due = [start] * count
    with Clients(address, linger=linger) as clients:
        while (now := monotonic()) < end:
            if after and now >= start + after:
                action()
                after = 0.0
            while due and due[0] <= now:
                requests.append(clients.send(path, due.pop(0)))
            wake = min(start + after if after else end, due[0] if due else end)
            for request in clients.serve(wake):
                due.append(request.done + (0 if request.status else PAUSE))
                if until_refused and request.refused:
                    end = 0.0
            due.sort()
        end = monotonic() + patience
        while clients.outstanding and clients.serve(end):
            pass
    for request in requests:
        request.done = request.done or monotonic()
    return requests


def burst(clients: Clients, count: int, path: str, patience: float = 20) -> list[Request]:
    """So many requests at once; wait for all of them."""
    due = monotonic()
    requests = [clients.send(path, due) for _ in range(count)]
    while not all(each.done for each in requests) and clients.serve(due + patience):
        pass
    return requests


def lateness(requests: Sequence[Request]) -> dict[str, float]:
    """How late requests were sent, in microseconds."""
    late = [(each.sent - each.due) * 1e6 for each in requests]
    return {
        "sent late, p50": percentile(late, 50),
        "sent late, p99": percentile(late, 99),
        "sent late, max": max(late),
    }
