"""The side of the dispatcher that faces clients: every connection, from accept to close.

What a connection does is decided by its state (connection.py). While its request comes it is in
the hands of arriving.py, while its last bytes leave in those of endings.py; here is what lies
between. Bytes stay in the kernel for the slot that will read them.

1. Nothing here waits, or trusts a client to do anything: every state but RUNNING has a
   deadline, and WAITING has that of the queue.
2. A connection is registered with epoll edge-triggered, at most once at a time, when there
   is first something to wait for. Its events set `touched`; while RUNNING they do no more.
3. Where a request ends is the business of the parser in the slot. An answer given here
   closes the connection, unless the request can have no body.
4. Descriptors are closed by `close`, which leaves epoll first: a registration outlives
   close() while a slot holds a duplicate.

It knows neither processes nor the rules of the queue: `Judge` is whom it asks.
"""

from __future__ import annotations

import math
import select
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Protocol

from .answers import OUT_OF_TIME, UNTAKEN, Answer
from .arriving import Arriving
from .channel import Address, Adopt, End, Report
from .connection import Connection, State, timeval
from .deadlines import Deadlines
from .endings import Endings
from .head import Head
from .listeners import ACCEPTS, Listener, Listeners
from .rest import NOW
from .rules import Serving

EDGE: int = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
LEFT: int = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
BACKLOG = 4096  # connections: as many as the kernel lets wait, by default (somaxconn)


class Judge(Protocol):
    """What the clients' side asks of the dispatcher."""

    def on_ready(self, conn: Connection, now: float) -> None: ...
    def on_gone(self, conn: Connection) -> bool: ...
    def on_answered(self, conn: Connection, answer: Answer, now: float) -> None: ...
    def on_cut_off(self, conn: Connection, now: float) -> None: ...
    def on_shortage(self, now: float) -> None: ...
    def probe(self, name: bytes) -> Answer: ...


class Clients:
    """All connections, and the listeners they come from."""

    def __init__(
        self, epoll: select.epoll, listeners: Iterable[Listener], serving: Serving, judge: Judge
    ) -> None:
        self.connections: dict[int, Connection] = {}
        self._limits = b"", b""
        self.listeners = Listeners(epoll, listeners)
        self._epoll = epoll
        self._judge = judge
        self._arriving = Arriving(self, serving)
        self._endings = Endings(self)
        self._stopping = False
        self._resumable = False
        self._last_call_at = math.inf
        self.called = False  # the last call is over
        self.answered: deque[Connection] = deque()  # here; `follow_up` looks at them
        self.serve(serving)

    def serve(self, serving: Serving) -> None:
        """Take over settings that may have changed; they hold for waits that go on, too."""
        self._serving = serving
        limits = timeval(serving.receive_timeout), timeval(serving.send_timeout)
        if limits != self._limits:
            self._limits = limits
            for conn in self.connections.values():
                conn.limit_waits(*limits)
        self._arriving.serve(serving)
        self._endings.serve(serving.send_timeout)

    # From a listener to a ready request.

    def on_listener(self, fd: int, now: float, most: int = ACCEPTS) -> bool:
        """Take new connections, up to a number; whether there may be more."""
        more = True
        for each in self.listeners.accept(fd, now, most):
            if each is None:
                more = False
            else:
                self._take(each)
                self._arriving.begin(each, now)
        if self.listeners.is_short:
            self._judge.on_shortage(now)
            self._arriving.shed()
        return more

    def adopt(self, adopt: Adopt, sock: socket.socket, client: Address, now: float) -> None:
        """Take on a connection that a slot was working on when our predecessor died."""
        conn = Connection(sock, client, adopt.server, sock.family == socket.AF_UNIX)
        conn.number, conn.ahead, conn.carry = adopt.number, adopt.ahead, adopt.carry
        self._take(conn)
        self._go_on(conn, now)

    def _take(self, conn: Connection) -> None:
        """The limits come first: whichever request of it a slot gets, it finds them."""
        conn.limit_waits(*self._limits)
        self.connections[conn.fd] = conn

    def on_event(self, conn: Connection, mask: int, now: float) -> None:
        """epoll has something to say about a connection."""
        conn.touched = True
        if mask & LEFT:
            conn.hung_up = True
        if conn.state == State.ARRIVING:
            self._arriving.on_event(conn, now)
        elif conn.state == State.WAITING:
            if conn.hung_up:
                self._leave_queue(conn)
        elif conn.state != State.RUNNING:
            self._endings.on_event(conn, now)

    def _leave_queue(self, conn: Connection) -> None:
        if self._judge.on_gone(conn):
            self.close(conn)
        else:  # a slot has it by now
            self.lend(conn)

    def on_ready(self, conn: Connection, now: float) -> None:
        """The request is ready: a probe is answered, anything else is judged."""
        head = conn.head
        conn.touched = head is None or conn.arrived != head.size + head.length
        if head and head.path in self._serving.probes and _is_probe(head):
            self._reply(conn, self._judge.probe(head.path), now)
            return
        self._untime(conn)
        conn.state = State.WAITING
        conn.ready_at = now
        self._judge.on_ready(conn, now)
        if conn.state == State.WAITING:
            if conn.hung_up:
                self._leave_queue(conn)
            else:
                conn.head = head and head.shortened()
                self.watch(conn)

    # Into a slot's hands and back.

    def lend(self, conn: Connection) -> None:
        """The request was sent to a process; until `give_back` the slot has the connection."""
        conn.state = State.RUNNING
        if conn.registered and conn.head is not None and self._still_comes(conn.head):
            self._unregister(conn)

    def _still_comes(self, head: Head) -> bool:
        """Whether the rest of the body would wake us for nothing while a slot reads it."""
        return head.chunked or head.expects or head.length > self._serving.request_buffer

    def take_back(self, conn: Connection) -> None:
        """No slot has begun the request, and its client has not left: it waits again."""
        conn.state = State.WAITING
        self.watch(conn)

    def give_back(self, conn: Connection, report: Report, now: float) -> None:
        """A slot has reported the request done, or its response complete."""
        if report.rest is None:
            self._after(conn, report, now)
        else:
            conn.report = report
            self._endings.send(conn, report.rest, now)

    def on_sent(self, conn: Connection, now: float) -> None:
        """The client has taken the rest of its response."""
        report, conn.report = conn.report, None
        assert report is not None
        self._after(conn, report, now)

    def _after(self, conn: Connection, report: Report, now: float) -> None:
        """Go on as the slot has said."""
        if report.end == End.UNTAKEN:
            ends = self._stopping and not self._resumable
            self.answer(conn, OUT_OF_TIME if ends else UNTAKEN, now)
        elif report.end == End.KEEP:
            conn.next_request(report.ahead, report.carry)
            self._go_on(conn, now)
        elif report.end == End.LINGER or (report.end == End.CLOSE and conn.unread()):
            self._endings.linger(conn, now)
        else:
            self.close(conn)

    def _go_on(self, conn: Connection, now: float) -> None:
        """The connection is between two requests; the next may be there already."""
        if self.called and not (conn.ahead or conn.unread()):
            self._endings.linger(conn, now)
            return
        self._arriving.await_next(conn, now)
        if conn.touched or conn.ahead:  # what came meanwhile has had its event, and woke nobody
            self._arriving.look(conn, now)
        else:
            self.watch(conn)

    # Answers without a slot, and ends.

    def conclude(self, conn: Connection, answer: Answer, now: float) -> None:
        """A process has given this answer in place of its slot, which goes on for a while."""
        self._judge.on_answered(conn, answer, now)
        self._endings.linger(conn, now)

    def answer(self, conn: Connection, answer: Answer, now: float) -> None:
        """Answer a request that no slot has run, or will go on to run."""
        self._judge.on_answered(conn, answer, now)
        self._reply(conn, answer, now)

    def _reply(self, conn: Connection, answer: Answer, now: float) -> None:
        head = conn.head or Head(0)
        ended = self._has_ended(conn, head)
        alive = ended and head.keeps_alive
        keep = alive and self._keeps(conn)
        try:
            if ended:
                self._arriving.take(conn, head.size)
            data = answer.encode(head.text, keep, head.method == b"HEAD")
            whole = conn.sock.send(data, NOW) == len(data)
        except OSError:  # it has left, or has no room for a few hundred bytes: it reads no answers
            self.close(conn)
            return
        is_last = ended and not (alive or conn.touched)  # nothing unread, and no more
        if not whole or is_last:
            self.close(conn)
            return
        self._untime(conn)
        if keep:
            conn.next_request(conn.ahead, conn.carry)
            self._arriving.await_next(conn, now)
            self.answered.append(conn)
        else:
            self._endings.linger(conn, now)

    def _has_ended(self, conn: Connection, head: Head) -> bool:
        """Whether the request has surely ended where its head did, and no slot has any of it."""
        if conn.state == State.RUNNING or not head.ends_request:
            return False
        return not (self._serving.limits.proxy and conn.number == 1)

    def _keeps(self, conn: Connection) -> bool:
        """Whether the connection goes on, if its client wants it to."""
        return bool(self._serving.keepalive) and not (self._stopping or conn.hung_up)

    def follow_up(self, now: float) -> None:
        """See what follows on connections on which an answer was given here.

        One answer a turn: many requests sent at once neither nest nor keep us from others.
        """
        for _ in range(len(self.answered)):
            conn = self.answered.popleft()
            if conn.state == State.ARRIVING and conn.head is None:
                self._go_on(conn, now)

    def close(self, conn: Connection) -> None:
        """Forget the connection. The one place where its descriptor is closed.

        It ends for the client, too, though a slot, or a child that the app forked, may hold a
        duplicate.
        """
        self._untime(conn)
        self._endings.forget(conn)
        if conn.registered:
            self._unregister(conn)
        conn.state = State.CLOSED
        del self.connections[conn.fd]
        with suppress(OSError):  # the client was faster
            conn.sock.shutdown(socket.SHUT_RDWR)
        conn.sock.close()

    @property
    def unsent(self) -> int:
        """Bytes of responses that slots have left to us, and clients have not taken yet."""
        return self._endings.unsent

    # Stopping.

    def stop(self, now: float, until: float, shared: bool, serving: bool) -> None:
        """Listen no more; until then, who has connected, or is about to, may send a request.

        Listeners that others have as well are closed at once: what connects later is theirs, and
        what lies in the backlog, too, if we do not go on `serving`.
        """
        self.pause(until, False)
        if shared and not serving:
            self.listeners.close()
        elif shared:
            self._close_listeners(now)
        else:
            self.listeners.refuse()

    def pause(self, until: float, resumable: bool = True) -> None:
        """Keep no connection any more; take none if this is not the end of listening."""
        self._stopping, self.called = True, False
        self._last_call_at = until
        self._resumable = resumable
        self.listeners.accept_if(not resumable)

    def resume(self) -> None:
        self._stopping = self.called = False
        self._last_call_at = math.inf

    def _close_listeners(self, now: float) -> None:
        """Take what the backlog holds before."""
        for fd in self.listeners.fds():
            for _ in range(BACKLOG // ACCEPTS):  # not for ever: clients may come faster than that
                if not self.on_listener(fd, now):
                    break
        self.listeners.close()

    def _last_call(self, now: float) -> None:
        """Close connections on which nothing has come; from now on no other is kept."""
        if not self._resumable:
            self._close_listeners(now)
        self.called = True
        self._last_call_at = math.inf
        for conn in list(self.connections.values()):
            if conn.state == State.ARRIVING and not (conn.arrived or conn.unread()):
                self.close(conn)

    def give_up(self, answer: Answer, now: float) -> None:
        """Answer requests of which a part has come."""
        for conn in list(self.connections.values()):
            if conn.state == State.ARRIVING and conn.arrived:
                self.answer(conn, answer, now)

    def pending(self) -> Iterator[Connection]:
        """Connections whose request is still to be answered."""
        return (c for c in self.connections.values() if c.state != State.LINGERING)

    # Time.

    def next_deadline(self) -> float:
        """When `tick` is needed next, or sooner."""
        return min(
            self._arriving.due(),
            self._endings.due(),
            self.listeners.paused_until,
            self._last_call_at,
        )

    def tick(self, now: float) -> None:
        """Do what is due."""
        self._arriving.tick(now)
        for conn in self._endings.tick(now):
            self._judge.on_cut_off(conn, now)
        self.listeners.tick(now)
        if self._last_call_at <= now:
            self._last_call(now)

    def time(self, conn: Connection, deadlines: Deadlines[Connection], now: float) -> None:
        """The one deadline of a connection's state, in place of the one before."""
        if conn.timer is not None and conn.timer is not deadlines:
            conn.timer.stop(conn)
        conn.timer = deadlines
        deadlines.start(conn, now)

    def _untime(self, conn: Connection) -> None:
        """The connection waits for nothing of the client's any more."""
        if conn.timer is not None:
            conn.timer.stop(conn)
            conn.timer = None
        self._arriving.forget(conn)

    def watch(self, conn: Connection, more: int = 0) -> None:
        """Have epoll tell what happens on the connection; no event is lost, one may come twice."""
        mask = EDGE | more
        if not conn.registered:
            self._epoll.register(conn.fd, mask)
        elif conn.registered != mask:
            self._epoll.modify(conn.fd, mask)
        conn.registered = mask

    def _unregister(self, conn: Connection) -> None:
        conn.registered = 0
        self._epoll.unregister(conn.fd)


def _is_probe(head: Head) -> bool:
    """What is not plain is left to gunicorn's parser, lest two readers see two requests."""
    return head.method in (b"GET", b"HEAD") and head.is_plain
