"""The side of the dispatcher that faces clients: from accept to a ready request, and to the end.

What a connection does is decided by its state (connection.py) and by what can be seen of
its next request with MSG_PEEK; its bytes stay in the kernel for the slot that will read
them. Only what is answered here is consumed here.

1. Nothing here waits, or trusts a client to do anything: every state but RUNNING has a
   deadline, and WAITING has that of the queue.
2. A connection is registered with epoll edge-triggered, at most once, when there is first
   something to wait for. While RUNNING its events only set `touched`.
3. Where a request ends is the business of the parser in the slot. An answer given here
   closes the connection, unless the request can have no body.
4. Descriptors are closed by `close`, which leaves epoll first: a registration outlives
   close() while a slot holds a duplicate.

It knows neither processes nor the rules of the queue: `Judge` is what it asks.
"""

from __future__ import annotations

import errno
import math
import select
import socket
from collections.abc import Iterable, Iterator
from typing import Protocol

from .answers import Answer, body_too_late, head_too_large, head_too_late
from .channel import Address, Adopt, End
from .connection import Connection, Listener, State
from .deadlines import Deadlines
from .head import Head, HeadTooLarge, read_head
from .rules import Serving

EDGE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_LEFT = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
_NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

ACCEPTS = 64  # connections taken in one turn, so that clients cannot keep the loop from the rest
GLANCE = 0.02  # seconds between two looks at a request that dribbles in
LOCAL_QUIET = 0.1  # seconds of silence after which a Unix client may be stuck on a full buffer
LINGER = 2.0  # seconds a client that has been answered may take to stop sending
LAST_CALL = 1.0  # seconds that an idle connection stays open after a stop began
ACCEPT_PAUSE = 0.1  # seconds without accept when descriptors have run out
CHUNKED_LOOK = 4 << 20  # bytes of a chunked body that are looked at in search of its end
PEEK = 1 << 14  # bytes looked at first; most heads and many bodies fit
ALL_MARKS = 256 << 20  # bytes of bodies that may be awaited in the kernel, all together


class Judge(Protocol):
    """What the clients' side asks of the dispatcher."""

    def on_ready(self, conn: Connection, now: float) -> None: ...
    def on_gone(self, conn: Connection) -> None: ...
    def on_answered(self, conn: Connection, answer: Answer, now: float) -> None: ...
    def probe(self, name: bytes) -> Answer: ...


class Clients:
    """All connections, and the listeners they come from."""

    def __init__(
        self, epoll: select.epoll, listeners: Iterable[Listener], serving: Serving, judge: Judge
    ) -> None:
        self.connections: dict[int, Connection] = {}
        self.listeners = {each.sock.fileno(): each for each in listeners}
        self.stopping_at: float | None = None
        self._epoll = epoll
        self._judge = judge
        self._buffer = bytearray(PEEK)
        self._marks = 0
        self._called = False
        self._paused_until = 0.0
        self._heads: Deadlines[Connection] = Deadlines(None)
        self._bodies: Deadlines[Connection] = Deadlines(None)
        self._idle: Deadlines[Connection] = Deadlines(None)
        self._glances: Deadlines[Connection] = Deadlines(GLANCE)
        self._quiet: Deadlines[Connection] = Deadlines(LOCAL_QUIET)
        self._lingering: Deadlines[Connection] = Deadlines(LINGER)
        self.serve(serving)
        for fd in self.listeners:
            epoll.register(fd, select.EPOLLIN)

    def serve(self, serving: Serving) -> None:
        """Take over settings that may have changed; they hold for waits that go on, too."""
        self.serving = serving
        self._heads.seconds = serving.header_timeout
        self._bodies.seconds = serving.receive_timeout / 4
        self._idle.seconds = serving.keepalive

    # From a listener to a ready request.

    def accept(self, fd: int, now: float) -> bool:
        """Take what the backlog holds, up to a number; whether there may be more."""
        listener = self.listeners[fd]
        for _ in range(ACCEPTS):
            try:
                sock, client = listener.sock.accept()
            except BlockingIOError:
                return False
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._pause_accepting(error, now)
                return False
            self.take(sock, client, listener.server, listener.local, now)
        return True

    def take(
        self, sock: socket.socket, client: Address, server: Address, local: bool, now: float
    ) -> Connection:
        """Take a connection on, and look whether its request is there already."""
        conn = Connection(sock, client, server, local)
        conn.limit_waits(self.serving.receive_timeout, self.serving.send_timeout)
        self.connections[conn.fd] = conn
        self._time(conn, self._heads, now)
        self._look(conn, now)
        return conn

    def on_event(self, conn: Connection, mask: int, now: float) -> None:
        """epoll has something to say about a connection."""
        if conn.state is State.RUNNING:
            conn.touched = True
            return
        if mask & _LEFT:
            conn.hung_up = True
        if conn.state is State.ARRIVING:
            self._on_arriving(conn, now)
        elif conn.state is State.LINGERING:
            self._drain(conn, now)
        elif conn.hung_up:
            self._judge.on_gone(conn)
            self.close(conn)

    def _on_arriving(self, conn: Connection, now: float) -> None:
        if conn.local and conn.head is not None:
            self._quiet.start(conn, now)
        if now - conn.looked_at >= self._pause_between_looks(conn):
            self._look(conn, now, woken=True)
        elif conn not in self._glances:
            self._glances.start(conn, now)

    def _pause_between_looks(self, conn: Connection) -> float:
        """Nothing at first; then so long that looking stays cheap, however much lies there."""
        if not conn.arrived or conn.mark:
            return 0.0
        return GLANCE * (1 + conn.arrived / PEEK)

    def _look(self, conn: Connection, now: float, woken: bool = False) -> None:
        """See how much of a request has come, and act on it.

        `woken` says that the kernel reported the socket readable. If it does so below the
        mark we set, it is short of memory, and waiting for more would never end.
        """
        try:
            data = self._peek(conn)
        except OSError:
            self.close(conn)
            return
        if data is None:
            self.close(conn)
        elif not data:
            self._expect(conn, now)
        elif self._has_arrived(conn, data, now) or (woken and conn.mark and not conn.hung_up):
            self._on_ready(conn, now)
        elif conn.state is State.ARRIVING:
            self._expect(conn, now)

    def _peek(self, conn: Connection) -> bytes | None:
        """What lies there, as much of it as may matter; None at the end of the stream."""
        if conn.head is not None and not conn.head.chunked:
            return self._measure(conn)
        while True:
            try:
                size = conn.sock.recv_into(self._buffer, 0, _PEEK)
            except BlockingIOError:
                size = 0
            else:
                if not size and not conn.ahead:
                    return None
                conn.hung_up = conn.hung_up or not size
            data = conn.ahead + memoryview(self._buffer)[:size]
            conn.arrived = len(data)
            if size < len(self._buffer) or not self._wants_more(conn, data):
                return data
            self._buffer = bytearray(4 * len(self._buffer))

    def _measure(self, conn: Connection) -> bytes | None:
        """With the head known, the number of bytes is enough."""
        conn.arrived = len(conn.ahead) + conn.unread()
        return b"-"

    def _wants_more(self, conn: Connection, data: bytes) -> bool:
        """Whether the peek buffer is too small for what it must show."""
        if conn.head is None:
            end = data.find(b"\r\n\r\n", 2)
            if end < 0:
                return len(data) <= self.serving.limits.head
        return conn.head is not None and len(data) < self._chunked_enough(conn.head)

    def _has_arrived(self, conn: Connection, data: bytes, now: float) -> bool:
        """Whether the request is ready; sees its head when that has come."""
        if conn.head is None:
            try:
                conn.head = read_head(data, self.serving.limits, conn.number == 1)
            except HeadTooLarge:
                conn.head = Head(len(data))
                self.answer(conn, head_too_large(self.serving.limits.head), now)
                return False
            if conn.head is None:
                return False
            if len(data) - len(conn.ahead) >= PEEK:
                conn.arrived = len(conn.ahead) + conn.unread()
        head = conn.head
        if not head.has_body or head.expects:
            return True
        if head.chunked:
            return data.endswith(b"0\r\n\r\n") or conn.arrived >= self._chunked_enough(head)
        return conn.arrived >= self._enough(head)

    def _enough(self, head: Head) -> int:
        """How many bytes make a request with a Content-Length ready."""
        return head.size + min(head.length or 0, self.serving.request_buffer)

    def _chunked_enough(self, head: Head) -> int:
        if not head.chunked:
            return 0
        return head.size + min(self.serving.request_buffer, CHUNKED_LOOK)

    def _expect(self, conn: Connection, now: float) -> None:
        """More has to come: see that we are woken for it, and when it is too late."""
        if conn.hung_up:
            self.close(conn)
            return
        conn.looked_at = now
        if conn.head is not None and conn.timer is not self._bodies:
            self._expect_body(conn, conn.head, now)
        elif conn.arrived and conn.timer is self._idle:
            self._time(conn, self._heads, now)
        self._register(conn)

    def _expect_body(self, conn: Connection, head: Head, now: float) -> None:
        conn.progress_at = now
        self._time(conn, self._bodies, now)
        if conn.local:
            self._quiet.start(conn, now)
        elif not head.chunked:
            mark = self._enough(head) - len(conn.ahead)
            if self._marks + mark > ALL_MARKS:
                self._on_ready(conn, now)
                return
            self._marks += mark
            conn.wake_at(mark)

    def _on_ready(self, conn: Connection, now: float) -> None:
        """The request is ready: a probe is answered, anything else is judged."""
        head = conn.head
        if head is not None and head.method in (b"GET", b"HEAD") and head.path in self.serving.probes:
            self._reply(conn, self._judge.probe(head.path), now)
            return
        self._untime(conn)
        conn.state = State.WAITING
        conn.ready_at = now
        self._judge.on_ready(conn, now)
        if conn.state is State.WAITING:
            if conn.hung_up:
                self._judge.on_gone(conn)
                self.close(conn)
            else:
                self._register(conn)

    # Into a slot's hands and back.

    def lend(self, conn: Connection) -> None:
        """The request was sent to a process; until `give_back` the slot has the connection."""
        conn.state = State.RUNNING
        conn.touched = False
        if conn.registered and conn.head is not None and self._still_comes(conn.head):
            self._epoll.unregister(conn.fd)
            conn.registered = False

    def _still_comes(self, head: Head) -> bool:
        """Whether the rest of the body would wake us for nothing while a slot reads it."""
        return head.chunked or head.expects or (head.length or 0) > self.serving.request_buffer

    def adopt(self, adopt: Adopt, sock: socket.socket, now: float) -> None:
        """Take on a connection that a slot was working on when our predecessor died."""
        conn = Connection(sock, adopt.client, adopt.server, sock.family == socket.AF_UNIX)
        conn.number, conn.ahead, conn.carry = adopt.number, adopt.ahead, adopt.carry
        self.connections[conn.fd] = conn
        if self._closing(now):
            self.linger(conn, now)
        else:
            self._await_next(conn, now)

    def give_back(
        self, conn: Connection, end: End, ahead: bytes, carry: bytes, now: float
    ) -> None:
        """A slot has reported the request done."""
        if end is End.KEEP and not self._closing(now):
            conn.next_request(ahead, carry)
            self._await_next(conn, now)
        elif end is End.KEEP or end is End.LINGER or (end is End.CLOSE and conn.unread()):
            self.linger(conn, now)
        else:
            self.close(conn)

    def _await_next(self, conn: Connection, now: float) -> None:
        conn.looked_at = 0.0
        self._time(conn, self._idle, now)
        if conn.touched or conn.ahead:
            self._look(conn, now)
        else:
            self._register(conn)

    def _closing(self, now: float) -> bool:
        """Whether kept-alive connections are closed rather than kept."""
        return self.stopping_at is not None and now >= self.stopping_at

    # Answers without a slot, and ends.

    def answer(self, conn: Connection, answer: Answer, now: float) -> None:
        """Answer a request that no slot has run, or will run."""
        self._judge.on_answered(conn, answer, now)
        self._reply(conn, answer, now)

    def _reply(self, conn: Connection, answer: Answer, now: float) -> None:
        head = conn.head or Head(0)
        keep = self._keeps(conn, head)
        bodiless = head.method == b"HEAD"
        try:
            if keep:
                self._consume(conn, head.size)
            else:
                conn.sock.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except OSError:
            self.close(conn)
            return
        self._say(conn, answer.encode(head.text, keep, bodiless))
        if keep:
            self._untime(conn)
            conn.next_request(conn.ahead, conn.carry)
            conn.touched = True
            self._await_next(conn, now)
        else:
            self.linger(conn, now)

    def _keeps(self, conn: Connection, head: Head) -> bool:
        """Whether the connection can go on: the request has surely ended where its head did."""
        if conn.state is State.RUNNING or conn.hung_up or not self.serving.keepalive:
            return False
        if head.has_body or not head.keeps_alive:
            return False
        return self.stopping_at is None and not (self.serving.limits.proxy and conn.number == 1)

    def _consume(self, conn: Connection, size: int) -> None:
        """Take exactly so many bytes off the connection."""
        ahead, conn.ahead = conn.ahead[:size], conn.ahead[size:]
        size -= len(ahead)
        while size:
            size -= conn.sock.recv_into(self._buffer, min(size, len(self._buffer)), socket.MSG_DONTWAIT)

    def _say(self, conn: Connection, data: bytes) -> None:
        """Send a few hundred bytes. A client with no room for them does not read its answers."""
        try:
            conn.sock.send(data, _NOW)
        except OSError:
            conn.hung_up = True

    def linger(self, conn: Connection, now: float) -> None:
        """End the connection without a reset, which would take the answer away from the client."""
        self._untime(conn)
        conn.state = State.LINGERING
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close(conn)
            return
        self._time(conn, self._lingering, now)
        self._register(conn)
        self._drain(conn, now)

    def _drain(self, conn: Connection, now: float) -> None:
        """Throw away what still comes; at the end of the stream, close."""
        for _ in range(ACCEPTS):
            try:
                if not conn.sock.recv_into(self._buffer, 0, socket.MSG_DONTWAIT):
                    self.close(conn)
                    return
            except BlockingIOError:
                return
            except OSError:
                self.close(conn)
                return
        self._glances.start(conn, now)

    def close(self, conn: Connection) -> None:
        """Forget the connection. The one place where its descriptor is closed."""
        self._untime(conn)
        if conn.registered:
            self._epoll.unregister(conn.fd)
        conn.state = State.CLOSED
        del self.connections[conn.fd]
        conn.sock.close()

    # Stopping.

    def stop(self, now: float) -> None:
        """Take what the backlog holds, listen no more, and give idle connections a last call."""
        for fd in list(self.listeners):
            while self.accept(fd, now):
                pass
            self._epoll.unregister(fd)
            self.listeners.pop(fd).sock.close()
        self.stopping_at = now + LAST_CALL

    def _last_call(self) -> None:
        """Close connections on which nothing has come."""
        for conn in list(self.connections.values()):
            if conn.state is State.ARRIVING and not conn.arrived:
                self.close(conn)

    def pending(self) -> Iterator[Connection]:
        """Connections whose request is still to be answered."""
        return (c for c in self.connections.values() if c.state is not State.LINGERING)

    # Time.

    def next_deadline(self) -> float:
        return min(
            self._heads.next(),
            self._bodies.next(),
            self._idle.next(),
            self._glances.next(),
            self._quiet.next(),
            self._lingering.next(),
            self._paused_until or math.inf,
            math.inf if self._called else self.stopping_at or math.inf,
        )

    def tick(self, now: float) -> None:
        """Do what is due."""
        for conn in self._glances.expired(now):
            self._on_glance(conn, now)
        for conn in self._quiet.expired(now):
            if conn.state is State.ARRIVING and conn.head is not None:
                self._on_ready(conn, now)
        for conn in self._heads.expired(now):
            self._on_head_late(conn, now)
        for conn in self._bodies.expired(now):
            self._on_body_slow(conn, now)
        for conn in self._idle.expired(now):
            self.close(conn)
        for conn in self._lingering.expired(now):
            self.close(conn)
        if self._paused_until and self._paused_until <= now:
            self._resume_accepting()
        if self._closing(now) and not self._called:
            self._called = True
            self._last_call()

    def _on_glance(self, conn: Connection, now: float) -> None:
        if conn.state is State.LINGERING:
            self._drain(conn, now)
        elif conn.state is State.ARRIVING:
            self._on_arriving(conn, now)

    def _on_head_late(self, conn: Connection, now: float) -> None:
        if conn.arrived:
            self.answer(conn, head_too_late(self.serving.header_timeout), now)
        else:
            self.close(conn)

    def _on_body_slow(self, conn: Connection, now: float) -> None:
        """A quarter of receive_timeout has passed; was there progress?"""
        before, conn.arrived = conn.arrived, len(conn.ahead) + conn.unread()
        if conn.arrived > before:
            conn.progress_at = now
        if now - conn.progress_at >= self.serving.receive_timeout:
            self.answer(conn, body_too_late(self.serving.receive_timeout), now)
        else:
            self._time(conn, self._bodies, now)

    # Small print.

    def _time(self, conn: Connection, deadlines: Deadlines[Connection], now: float) -> None:
        if conn.timer is not None and conn.timer is not deadlines:
            conn.timer.stop(conn)
        conn.timer = deadlines
        deadlines.start(conn, now)

    def _untime(self, conn: Connection) -> None:
        """The connection waits for nothing of the client's any more."""
        if conn.timer is not None:
            conn.timer.stop(conn)
            conn.timer = None
        if conn.mark:
            self._marks -= conn.mark
            conn.wake_at(1)
        self._glances.stop(conn)
        self._quiet.stop(conn)

    def _register(self, conn: Connection) -> None:
        if not conn.registered:
            conn.registered = True
            self._epoll.register(conn.fd, EDGE)

    def _pause_accepting(self, error: OSError, now: float) -> None:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            return
        if not self._paused_until:
            for fd in self.listeners:
                self._epoll.modify(fd, 0)
        self._paused_until = now + ACCEPT_PAUSE

    def _resume_accepting(self) -> None:
        self._paused_until = 0.0
        for fd in self.listeners:
            self._epoll.modify(fd, select.EPOLLIN)
