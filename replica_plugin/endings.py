"""How a connection's last bytes leave, when no slot is needed for that any more.

    SENDING    the rest of a response that a slot has left to us; then as the slot reported
    LINGERING  answered and half-closed; what still comes is thrown away, then closed

A reset would take an answer away from a client that has not read it yet, which is why a
connection on which something unread may lie is never just closed.

Both have a deadline: SENDING a new one with every byte that the client takes, LINGERING one.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from contextlib import suppress
from typing import Protocol

from .connection import Connection, State
from .deadlines import Deadlines
from .rest import Rest, queued

LINGER = 2.0  # seconds a client that has been answered may take to stop sending
DRAINS = 64  # reads of what a lingering client sends, before others have their turn


class Host(Protocol):
    """What an ending asks of the one who holds the connections."""

    def watch(self, conn: Connection, more: int = 0) -> None: ...
    def time(self, conn: Connection, deadlines: Deadlines[Connection], now: float) -> None: ...
    def on_sent(self, conn: Connection, now: float) -> None: ...
    def close(self, conn: Connection) -> None: ...


class Endings:
    """Connections in the states SENDING and LINGERING. `unsent` counts the bytes still to go."""

    def __init__(self, host: Host) -> None:
        self.unsent = 0
        self._host = host
        self._buffer = bytearray(1 << 16)
        self._again: deque[Connection] = deque()  # those with more to do in the next turn
        self._sending: Deadlines[Connection] = Deadlines(None)
        self._lingering: Deadlines[Connection] = Deadlines(LINGER)

    def serve(self, send_timeout: float) -> None:
        self._sending.last(send_timeout)

    def send(self, conn: Connection, rest: Rest, now: float) -> None:
        """Send what a slot has left; `on_sent` follows."""
        conn.state = State.SENDING
        conn.head = None  # which may be long, and nobody asks for it any more
        conn.rest = rest
        self.unsent += rest.left
        conn.queued = queued(conn.sock)
        self._host.time(conn, self._sending, now)
        self._host.watch(conn, select.EPOLLOUT)
        self._again.append(conn)

    def linger(self, conn: Connection, now: float) -> None:
        """End the connection without a reset."""
        conn.state = State.LINGERING
        conn.head = None
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._host.close(conn)
            return
        self._host.time(conn, self._lingering, now)
        self._host.watch(conn)
        self._drain(conn)

    def on_event(self, conn: Connection, now: float) -> None:
        """epoll has something to say about a connection that ends."""
        if conn.state == State.SENDING:
            self._send_more(conn, now)
        elif conn.state == State.LINGERING:
            self._drain(conn)

    def forget(self, conn: Connection) -> None:
        """The connection is about to be closed, or all is sent."""
        if conn.rest is not None:
            self.unsent -= conn.rest.left
            conn.rest.close()
            conn.rest = None

    def due(self) -> float:
        """When `tick` is needed next, or sooner."""
        return 0.0 if self._again else min(self._sending.due, self._lingering.due)

    def tick(self, now: float) -> list[Connection]:
        """Do what is due. Returns those that were cut off, for taking nothing for too long."""
        for _ in range(len(self._again)):
            self.on_event(self._again.popleft(), now)
        for conn in self._lingering.expired(now):
            self._host.close(conn)
        return [conn for conn in self._sending.expired(now) if self._is_cut_off(conn, now)]

    def _is_cut_off(self, conn: Connection, now: float) -> bool:
        """No room came in the kernel for send_timeout: see whether the client took something."""
        before, conn.queued = conn.queued, queued(conn.sock)
        if conn.queued < before:
            self._host.time(conn, self._sending, now)
            return False
        self._host.close(conn)
        return True

    def _send_more(self, conn: Connection, now: float) -> None:
        rest = conn.rest
        assert rest is not None
        before = rest.left
        more: bool | None = None
        with suppress(OSError):  # after a part of it, perhaps
            more = rest.send(conn.sock)
        self.unsent -= before - rest.left
        if more is None:
            self._host.close(conn)
            return
        if not rest.left:
            self.forget(conn)
            self._host.watch(conn)
            self._host.on_sent(conn, now)
            return
        if rest.left < before:
            self._host.time(conn, self._sending, now)
            conn.queued = queued(conn.sock)
        if more:
            self._again.append(conn)

    def _drain(self, conn: Connection) -> None:
        """Throw away what still comes; at the end of the stream, close."""
        for _ in range(DRAINS):
            try:
                if not conn.sock.recv_into(self._buffer, 0, socket.MSG_DONTWAIT):
                    break
            except BlockingIOError:
                return
            except OSError:
                break
        else:
            self._again.append(conn)
            return
        self._host.close(conn)
