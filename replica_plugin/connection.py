"""A client's connection, as the dispatcher holds it between requests and beside a slot."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import termios
from contextlib import suppress
from typing import TYPE_CHECKING

from .channel import Address

if TYPE_CHECKING:
    from .channel import Report
    from .chunks import Chunks
    from .deadlines import Deadlines
    from .head import Head
    from .rest import Rest


SPARE = 1 << 17  # bytes of room for two of the largest segments
SEGMENT = 1 << 10  # bytes of a window that is as good as closed
WINDOW = struct.Struct("=232xI")  # tcpi_rcv_wnd in struct tcp_info


def timeval(seconds: float) -> bytes:
    """As the kernel wants it for SO_RCVTIMEO and SO_SNDTIMEO: time without progress."""
    whole, part = divmod(seconds, 1)
    return struct.pack("ll", int(whole), int(part * 1e6))


class State:
    """Where a connection stands. It is in a slot's hands while RUNNING."""

    ARRIVING = "arriving"  # nothing, or a part, of the next request has come
    WAITING = "waiting"  # its request is ready, and in the queue
    RUNNING = "running"  # its request was sent to a process
    SENDING = "sending"  # its slot has left us what the client has not taken yet
    LINGERING = "lingering"  # answered and half-closed; what still comes is thrown away
    CLOSED = "closed"


class Connection:
    """A socket, and what is known of the request that is on it or on its way."""

    __slots__ = (
        "ahead", "arrived", "awaited", "carry", "chunks", "client", "fd", "head", "hung_up",
        "local", "looked_at", "mark", "number", "progress_at", "queued", "ready_at", "registered",
        "report", "request", "rest", "server", "sock", "state", "timer", "touched",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, client: Address, server: Address, local: bool) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.client = client
        self.server = server
        self.local = local
        self.number = 1  # counts the requests on this connection
        self.ahead = b""  # bytes of the next request that a parser has read already
        self.carry = b""  # what the slot before wants the next one to know
        self.state = State.ARRIVING
        self.head: Head | None = None
        self.arrived = 0  # bytes of the request seen so far
        self.awaited = 0  # bytes for which the kernel was asked to have room
        self.chunks: Chunks | None = None  # how far a chunked body was followed
        self.mark = 0  # SO_RCVLOWAT, if it was raised
        self.request = 0
        self.report: Report | None = None  # what the slot said, while the rest is being sent
        self.rest: Rest | None = None
        self.queued = 0  # bytes of it in the kernel, when that was looked at last
        self.ready_at = 0.0
        self.looked_at = 0.0
        self.progress_at = 0.0
        self.registered = 0  # with epoll, for these events
        self.touched = False  # something may lie there beyond the request that was seen
        self.hung_up = False  # the client has sent its last byte
        self.timer: Deadlines[Connection] | None = None

    def __repr__(self) -> str:
        return f"<Connection {self.fd} of {self.client!r}: {self.state}>"

    def limit_waits(self, receive: bytes, send: bytes) -> None:
        """Bound every read and write a slot does on this socket; each limit is a `timeval`.

        In the kernel, so that they travel with the descriptor (client_socket.py).
        """
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, receive)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, send)

    def unread(self) -> int:
        """How many bytes lie in the kernel; 0 if a process has made a listener of it."""
        count = array.array("i", [0])
        try:
            fcntl.ioctl(self.fd, termios.FIONREAD, count)
        except OSError:
            return 0
        return count[0]

    def make_room(self, size: int) -> None:
        """Have the kernel hold so many bytes while nobody reads, and tell the client (TCP only).

        It makes room as a mark is raised, and keeps it. It calls a buffer full that is 7/8
        full, or has no room for another segment: so it is asked for more than is needed. The
        client learns of it when bytes are looked at; else only with the next, late ACK.
        """
        self._raise_mark(size + size // 2 + SPARE)
        with suppress(OSError):
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)

    def wake_at(self, size: int) -> None:
        """Have the kernel wake us when so many bytes lie there, not before (TCP only); 0: any."""
        self._raise_mark(size)
        self.mark = size

    def _raise_mark(self, size: int) -> None:
        mark = min(max(1, size), 1 << 30)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)

    def is_stuck(self) -> bool:
        """Whether the client can send no more, since the kernel's buffer is full (TCP only).

        Ask when nothing has come for a moment. Before Linux 6.2 nobody can tell: True; so it is
        if a process has made something of the socket of which the kernel cannot tell.
        """
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            return True
        return len(info) < WINDOW.size or WINDOW.unpack_from(info)[0] < SEGMENT

    def next_request(self, ahead: bytes, carry: bytes) -> None:
        """The connection is between two requests."""
        self.number += 1
        self.ahead = ahead
        self.carry = carry
        self.head = None
        self.chunks = None
        self.arrived = 0
        self.request = 0
        self.ready_at = 0.0
        self.state = State.ARRIVING
