"""How much of a request has come: seen with MSG_PEEK and FIONREAD, without taking a byte.

A request is ready when it is complete, or when more of it need not or cannot be awaited:
`request_buffer` bytes of the body are there; the client expects 100 Continue; the client has
been silent for a moment and seems to be stuck on a buffer that is full, its own (Unix) or
ours (TCP). The last is judged by the caller. A part of a head is then taken, not sent to a
slot.

A body of known length is awaited with one wake-up: SO_RCVLOWAT is set to what is needed. For
a chunked body the mark is moved along, from the end of one chunk to that of the next. Room
in the kernel is made first: else a body above some 100 KB would never arrive while nobody
reads; nor would such a head. That is kernel memory, so what is awaited is bounded, for all
together; and the mark travels with the connection, so it is taken back before a slot gets that.
"""

from __future__ import annotations

import socket
from contextlib import suppress

from .channel import LARGEST
from .chunks import Chunks
from .connection import Connection
from .head import Head, HeadTooLarge, read_head
from .rules import Serving

PEEK = 1 << 14  # bytes looked at first; most heads and many bodies fit
CHUNKED_LOOK = 4 << 20  # bytes of a chunked body that are looked at in search of its end
ALL_MARKS = 256 << 20  # bytes that may be awaited in the kernel, all together
FREE_MARK = 1 << 16  # and so many of each, which any connection's buffer holds
_PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)


class Sight:
    """What a look at a connection shows of its next request."""

    LEFT = "left"  # the client has closed
    PART = "part"  # nothing, or not enough
    READY = "ready"
    TOO_LARGE = "too_large"  # a head beyond the limits


class Arrivals:
    """Looks at connections. `serving` may be replaced at any time."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.buffer = bytearray(PEEK)
        self._marks = 0

    def look(self, conn: Connection) -> str:
        """See how much has come, and the head once it is there."""
        try:
            if conn.head is not None and not conn.head.chunked:
                self.measure(conn)
                return Sight.READY if conn.arrived >= self._enough(conn.head) else Sight.PART
            data = self._peek(conn)
            if data is None:
                return Sight.LEFT
            return Sight.READY if data and self._is_ready(conn, data) else Sight.PART
        except OSError:
            return Sight.LEFT
        except HeadTooLarge:
            conn.head = Head(conn.arrived)
            return Sight.TOO_LARGE

    def measure(self, conn: Connection) -> None:
        """Count what has come, without looking at it."""
        conn.arrived = len(conn.ahead) + conn.unread()

    def expect_head(self, conn: Connection) -> None:
        """Have the kernel hold all of a head that may be more than it holds by itself."""
        size = self.serving.limits.head
        if conn.local or conn.awaited or conn.arrived < FREE_MARK:
            return
        if self._marks + _cost(size) <= ALL_MARKS:
            self._marks += _cost(size)
            conn.awaited = size
            conn.make_room(size)
            conn.wake_at(0)

    def expect_body(self, conn: Connection, head: Head) -> None:
        """Have the kernel wake us when enough is there, or a part if much is awaited already.

        A part, not at once: clients that announce much and send nothing would get the slots.
        """
        if conn.local:
            return
        size = self._enough(head) - len(conn.ahead)
        if self._marks + _cost(size) > ALL_MARKS:
            size = min(size, FREE_MARK)
        self._marks += _cost(size)
        conn.awaited = size
        conn.make_room(size)
        conn.wake_at(size)
        self.follow_chunks(conn)

    def follow_chunks(self, conn: Connection) -> None:
        """Move the mark of a chunked body on, to where something new can be seen."""
        if conn.chunks is not None and conn.awaited:
            needed = conn.chunks.needed - len(conn.ahead)
            mark = max(1, min(conn.awaited, needed))
            if mark != conn.mark:  # the kernel would tell again of what has been seen
                conn.wake_at(mark)

    def forget(self, conn: Connection) -> None:
        """Nothing more is awaited on this connection."""
        self._marks -= _cost(conn.awaited)
        conn.awaited = 0
        if conn.mark:
            conn.wake_at(0)

    def take(self, conn: Connection, size: int) -> None:
        """Take exactly so many bytes, which have come, off the connection. Raises OSError.

        So it does if they have gone: a child of the app may have a duplicate, and read them.
        """
        ahead, conn.ahead = conn.ahead[:size], conn.ahead[size:]
        size -= len(ahead)
        while size > 0:
            part = min(size, len(self.buffer))
            taken = conn.sock.recv_into(self.buffer, part, socket.MSG_DONTWAIT)
            if not taken:
                raise ConnectionError("somebody else has taken them")
            size -= taken

    def take_ahead(self, conn: Connection) -> bool:
        """Take what has come of a head, so that a client's small buffer has room for the rest.

        It travels with the request, as bytes do that a slot has read ahead. False if it has
        become too much for that.
        """
        space = LARGEST // 2 - len(conn.ahead) - len(conn.carry)
        if space > 0:
            with suppress(OSError):  # nothing there, or a reset that epoll will tell of
                conn.ahead += conn.sock.recv(space, socket.MSG_DONTWAIT)
        return space > 0

    def _peek(self, conn: Connection) -> bytes | None:
        """What lies there, as much of it as may matter; None at the end of the stream.

        What follows a head may be a megabyte of others, each of which has a look of its own.
        """
        space = PEEK if conn.head is None else len(self.buffer)
        while True:
            try:
                size = conn.sock.recv_into(self.buffer, space, _PEEK)
            except BlockingIOError:
                size = 0
            else:
                if not size and not conn.ahead:
                    return None
                conn.hung_up = conn.hung_up or not size
            data = conn.ahead + memoryview(self.buffer)[:size]
            conn.arrived = len(data)
            if size < space:
                return data
            if not self._wants_more(conn, data):
                self.measure(conn)
                return data
            space *= 4
            if space > len(self.buffer):
                self.buffer = bytearray(space)

    def _wants_more(self, conn: Connection, data: bytes) -> bool:
        """Whether the buffer, which is full, is too small for what it must show.

        Raises HeadTooLarge.
        """
        head = conn.head or read_head(data, self.serving.limits, conn.number == 1)
        if head is None:  # nor has a PROXY preamble ended, perhaps
            return len(data) <= self.serving.limits.head
        return head.chunked and len(data) < self._enough(head)

    def _is_ready(self, conn: Connection, data: bytes) -> bool:
        """Raises HeadTooLarge."""
        head = conn.head
        if head is None:
            head = conn.head = read_head(data, self.serving.limits, conn.number == 1)
            if head is None:
                return False
        if not head.framed or head.expects:
            return True
        if head.chunked and self._end_is_seen(conn, head, data):
            return True
        return conn.arrived >= self._enough(head)

    def _end_is_seen(self, conn: Connection, head: Head, data: bytes) -> bool:
        if conn.chunks is None:
            conn.chunks = Chunks(head.size)
        return conn.chunks.end_is_seen(data)

    def _enough(self, head: Head) -> int:
        """How many bytes make a request ready; for a chunked one, if its end is not seen."""
        if head.chunked:
            return head.size + min(self.serving.request_buffer, CHUNKED_LOOK)
        return head.size + min(head.length, self.serving.request_buffer)


def _cost(size: int) -> int:
    """What a body that is awaited takes of ALL_MARKS."""
    return max(0, size - FREE_MARK)
