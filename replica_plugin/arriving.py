"""Connections on which a request is to come: when they are looked at, and when it is too late.

Each has one deadline: for its head, for the progress of its body, or for being idle. Beside it
a connection may be due for a glance (a request that dribbles in is not looked at with every
byte), or be suspected to be stuck: the client is silent, perhaps since nobody takes what it has
sent, and a buffer is full.

How much has come is for arrival.py to see; what follows from that, for the host.
"""

from __future__ import annotations

from typing import Protocol

from .answers import Answer, body_too_late, head_too_large, head_too_late
from .arrival import Arrivals, Sight
from .connection import Connection, State
from .deadlines import Deadlines
from .rules import Serving

GLANCE = 0.02  # seconds between two looks at a request that dribbles in
SLOWER = 1 << 18  # bytes at which looks, whose cost grows with what lies there, come half as often
SLOWER_HEAD = 1 << 15  # and so many of a head, which is searched from its beginning each time
QUIET = 0.1  # seconds of silence after which a client may be stuck on a full buffer
SHED = 64  # idle connections that are closed at a time when there are too many


class Host(Protocol):
    """What an arrival asks of the one who holds the connections."""

    def watch(self, conn: Connection, more: int = 0) -> None: ...
    def time(self, conn: Connection, deadlines: Deadlines[Connection], now: float) -> None: ...
    def on_ready(self, conn: Connection, now: float) -> None: ...
    def answer(self, conn: Connection, answer: Answer, now: float) -> None: ...
    def close(self, conn: Connection) -> None: ...


class Arriving:
    """Connections in the state ARRIVING."""

    def __init__(self, host: Host, serving: Serving) -> None:
        self._host = host
        self._arrivals = Arrivals(serving)
        self._heads: Deadlines[Connection] = Deadlines(None)
        self._bodies: Deadlines[Connection] = Deadlines(None)
        self._idle: Deadlines[Connection] = Deadlines(None)
        self._glances: Deadlines[Connection] = Deadlines(GLANCE)
        self._quiet: Deadlines[Connection] = Deadlines(QUIET)

    def serve(self, serving: Serving) -> None:
        """Take over settings that may have changed; they hold for waits that go on, too."""
        self._serving = self._arrivals.serving = serving
        self._heads.last(serving.header_timeout)
        self._bodies.last(serving.receive_timeout / 4)
        self._idle.last(serving.keepalive)

    def begin(self, conn: Connection, now: float) -> None:
        """A client has connected; its request may be there already."""
        self._host.time(conn, self._heads, now)
        self.look(conn, now)

    def await_next(self, conn: Connection, now: float) -> None:
        """The connection is between two requests."""
        conn.looked_at = 0.0
        self._host.time(conn, self._idle, now)

    def take(self, conn: Connection, size: int) -> None:
        """Take exactly so many bytes, which have come, off the connection. Raises OSError."""
        self._arrivals.take(conn, size)

    def forget(self, conn: Connection) -> None:
        """Nothing is expected on the connection any more."""
        if conn.awaited:
            self._arrivals.forget(conn)
        self._glances.stop(conn)
        self._quiet.stop(conn)

    def on_event(self, conn: Connection, now: float) -> None:
        """epoll has something to say about a connection on which a request is to come."""
        if conn.local:
            self._quiet.start(conn, now)
        if now - conn.looked_at >= _pause(conn):
            self.look(conn, now, woken=True)
        elif conn not in self._glances:
            self._glances.start(conn, now)

    def look(self, conn: Connection, now: float, woken: bool = False) -> None:
        """See how much of a request has come, and act on it.

        `woken` says that the kernel reported the socket readable. If it does so below the
        mark we set, its buffer may be full: see whether more comes in the next moment.
        """
        before = conn.arrived
        sight = self._arrivals.look(conn)
        if sight == Sight.LEFT:
            self._host.close(conn)
        elif sight == Sight.READY:
            self._host.on_ready(conn, now)
        elif sight == Sight.TOO_LARGE:
            self._host.answer(conn, head_too_large(self._serving.limits.head), now)
        else:
            if conn.arrived > before:
                conn.progress_at = now
            if woken and conn.mark:
                self._quiet.start(conn, now)
            self._expect_more(conn, now)

    def _expect_more(self, conn: Connection, now: float) -> None:
        """See that we are woken when more comes, and when it is too late."""
        if conn.hung_up:
            self._host.close(conn)
            return
        conn.looked_at = now
        if conn.head is not None and conn.timer is not self._bodies:
            conn.head = conn.head.shortened()
            conn.progress_at = now
            self.forget(conn)  # what was due for its head; what follows is for the mark
            self._host.time(conn, self._bodies, now)
            self._arrivals.expect_body(conn, conn.head)
        elif conn.head is not None:
            self._arrivals.follow_chunks(conn)
        else:
            self._arrivals.expect_head(conn)
            if conn.arrived and conn.timer is self._idle:
                self._host.time(conn, self._heads, now)
        if conn.arrived and (conn.local or conn.head is None) and conn not in self._quiet:
            self._quiet.start(conn, now)
        self._host.watch(conn)

    def shed(self) -> None:
        """Make room for clients that want something: end connections that are idle."""
        for conn in self._idle.oldest(SHED):
            if not conn.unread():
                self._host.close(conn)

    # Time.

    def due(self) -> float:
        """When `tick` is needed next, or sooner."""
        return min(
            self._heads.due, self._bodies.due, self._idle.due, self._glances.due, self._quiet.due
        )

    def tick(self, now: float) -> None:
        """Do what is due."""
        for conn in self._glances.expired(now):
            self._on_glance(conn, now)
        for conn in self._quiet.expired(now):
            self._on_quiet(conn, now)
        for conn in self._heads.expired(now):
            self._on_head_late(conn, now)
        for conn in self._bodies.expired(now):
            self._on_body_slow(conn, now)
        for conn in self._idle.expired(now):
            self._on_idle(conn, now)

    def _on_glance(self, conn: Connection, now: float) -> None:
        if conn.state != State.ARRIVING:
            return
        if now - conn.looked_at >= _pause(conn):
            self.look(conn, now, woken=True)
        else:
            self._glances.start(conn, now)

    def _on_quiet(self, conn: Connection, now: float) -> None:
        """A client is silent, perhaps because nobody takes what it has sent."""
        if conn.state != State.ARRIVING or not conn.arrived:
            return
        if not (conn.local or conn.is_stuck()):
            return
        before = len(conn.ahead)
        if conn.head is None and self._arrivals.take_ahead(conn):
            if len(conn.ahead) > before:  # what came while it was taken is reported by nobody
                self.look(conn, now)
        elif conn.local or conn.head is not None:
            self._host.on_ready(conn, now)

    def _on_idle(self, conn: Connection, now: float) -> None:
        """Its event may be among those of the next turn: with many, one turn does not see all."""
        if conn.unread():
            self.look(conn, now)
        else:
            self._host.close(conn)

    def _on_head_late(self, conn: Connection, now: float) -> None:
        if conn.arrived:
            self._host.answer(conn, head_too_late(self._serving.header_timeout), now)
        else:
            self._host.close(conn)

    def _on_body_slow(self, conn: Connection, now: float) -> None:
        """A quarter of receive_timeout has passed; was there progress?"""
        before = conn.arrived
        self._arrivals.measure(conn)
        if conn.arrived > before:
            conn.progress_at = now
        if now - conn.progress_at >= self._serving.receive_timeout:
            self._host.answer(conn, body_too_late(self._serving.receive_timeout), now)
        else:
            self._host.time(conn, self._bodies, now)


def _pause(conn: Connection) -> float:
    """Seconds between two looks: so long that looking stays cheap, however much lies there."""
    if conn.head is None:
        return GLANCE * (1 + conn.arrived / SLOWER_HEAD) if conn.arrived else 0.0
    if conn.mark and conn.chunks is None:
        return 0.0
    return GLANCE * (1 + conn.arrived / SLOWER)
