"""The listening sockets. Only the dispatcher accepts from them.

Connections leave some descriptors to others: the rests of responses, and processes that
register. When there are no more for connections, or the kernel has no memory for one, all
wait in the backlog for a moment. In one turn as many are accepted as there are events of any
kind: a single one then costs no second look, and nobody keeps the loop from the rest.

Before one is closed that nobody else has, the kernel is told to drop what would begin another
connection (a SYN without ACK), while those whose handshake is under way are still accepted. A
client whose SYN is dropped sends another, and is then refused; closed at once, the socket would
reset all that it has in its backlog, and all that are about to get there.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import resource
import select
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress

from .channel import Address
from .connection import Connection
from .machine import spare

ACCEPTS = 64  # connections taken in one turn, so that clients cannot keep the loop from the rest
PAUSE = 0.1  # seconds without accept when descriptors or memory have run out
SO_ATTACH_FILTER = 26
_PROGRAM = struct.pack(
    "=" + "HBBI" * 5,
    0x30, 0, 0, 13,  # load the byte of TCP's flags
    0x54, 0, 0, 0x12,  # of which we want SYN and ACK
    0x15, 0, 1, 0x02,  # is it SYN alone?
    0x06, 0, 0, 0,  # then drop it
    0x06, 0, 0, 0xFFFFFFFF,
)  # fmt: skip
_MEMORY = ctypes.create_string_buffer(_PROGRAM)
_FILTER = struct.pack("@HP", 5, ctypes.addressof(_MEMORY))
_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listening(socket.socket):
    """A listening socket that need not make two enums of numbers for each connection it accepts."""

    family = socket.SocketType.family  # type: ignore[assignment]
    type = socket.SocketType.type  # type: ignore[assignment]


class Listener:
    """One listening socket, under the name that the app sees as its server's."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.server: Address = sock.getsockname()
        self.local = sock.family == socket.AF_UNIX

    def refuse(self) -> None:
        """Take no more connections, but those that have begun. Never for a socket others have."""
        if not self.local:
            with suppress(OSError):  # a sandbox may not have it: then late clients are reset
                self.sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, _FILTER)

    def accept(self) -> Connection:
        """A new connection. Raises OSError."""
        sock, client = self.sock.accept()
        return Connection(sock, client, self.server, self.local)


class Listeners:
    """All of them, by descriptor."""

    def __init__(self, epoll: select.epoll, listeners: Iterable[Listener]) -> None:
        self.paused_until = math.inf
        self.is_short = False  # of what a connection needs, when that was looked at last
        self._beyond: Connection | None = None  # the last that took one that is left to others
        self.wanted = True  # connections, now
        self._epoll = epoll
        self.leave_room(1)
        self._listeners = {each.sock.fileno(): each for each in listeners}
        for fd in self._listeners:
            epoll.register(fd, select.EPOLLIN)

    def __contains__(self, fd: int) -> bool:
        return fd in self._listeners

    def leave_room(self, processes: int) -> None:
        """For so many processes, and what else is not for connections."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = limit - spare(limit, processes) if limit >= 0 else math.inf

    def accept_if(self, wanted: bool) -> None:
        """Take connections, or leave them to whoever else has these listeners."""
        self.wanted = wanted
        if self.paused_until == math.inf:
            self._listen(select.EPOLLIN)

    def refuse(self) -> None:
        """Take no more connections, but those that have begun."""
        for listener in self._listeners.values():
            listener.refuse()

    def fds(self) -> list[int]:
        return list(self._listeners)

    def accept(self, fd: int, now: float, most: int = ACCEPTS) -> Iterator[Connection | None]:
        """New connections, up to a number; None at the end if there are no more for now."""
        for _ in range(most):
            self._see_whether_short()
            if self.is_short:
                break
            try:
                conn = self._listeners[fd].accept()
            except BlockingIOError:
                yield None
                return
            except OSError as error:  # others are those of a client that was too quick
                self.is_short = error.errno in _SHORTAGE
                if self.is_short:
                    break
            else:
                if not self.has_room(conn.fd):
                    self.is_short, self._beyond = True, conn
                yield conn
        if self.is_short:
            self._pause(now)
            yield None

    def has_room(self, fd: int) -> bool:
        """Whether this is a descriptor for connections, and not one of those left to others."""
        return fd < self._most

    def _see_whether_short(self) -> None:
        """Whether the next connection would take a descriptor that is not for connections.

        One has to take one before we look; as long as it has it, we look each time, so that it is
        the only one.
        """
        if self._beyond is not None and self._beyond.sock.fileno() >= 0:
            self.is_short = True
        if self.is_short:
            with suppress(OSError):
                number = os.dup(self._epoll.fileno())
                os.close(number)
                self.is_short = not self.has_room(number)

    def close(self) -> None:
        """Listen no more; the kernel refuses connects once nobody holds the socket."""
        while self._listeners:
            fd, listener = self._listeners.popitem()
            self._epoll.unregister(fd)
            listener.sock.close()
        self.paused_until = math.inf

    def tick(self, now: float) -> None:
        self._see_whether_short()
        if self.paused_until <= now:
            self.paused_until = math.inf
            self._listen(select.EPOLLIN)

    def _pause(self, now: float) -> None:
        """An event that nothing is done about would keep the loop spinning."""
        if self.paused_until == math.inf:
            self._listen(0)
        self.paused_until = now + PAUSE

    def _listen(self, mask: int) -> None:
        for fd in self._listeners:
            self._epoll.modify(fd, mask if self.wanted else 0)
