"""A client's socket in the hands of a slot.

The dispatcher has bounded every read and write in the kernel (SO_RCVTIMEO, SO_SNDTIMEO), so
that the socket needs no timeouts of Python's, each of which costs a system call. Here the
kernel's EAGAIN gets a name, the slot's cell learns when the response begins, and what went
wrong with the client is told apart from what went wrong in the app.

The head of a response, which gunicorn writes by itself, is held until there is a part of the
body to go with it, or `flush`: one write a response, not two, and one wake-up of the client.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from .unpatched import Socket

JOINED = 1 << 16  # bytes of body up to which copying it behind the head is cheaper than a write
_INTERIM = b"1"  # the first digit of a status that is no response yet: 103 Early Hints


class ReceiveTimeoutError(TimeoutError):
    """Nothing of the body came for receive_timeout."""


class SendTimeoutError(TimeoutError):
    """The client took nothing for send_timeout."""


class ClientSocket(Socket):
    """`trouble` is the error that this socket raised, if it did; then nothing more is sent.

    `answering` says that the response has begun; its head may still be held.
    """

    __slots__ = ("_flags", "_head", "_on_first_byte", "_written", "answering", "trouble")

    def __init__(self, family: int, kind: int, fd: int, on_first_byte: Callable[[], None]) -> None:
        super().__init__(family, kind, 0, fd)
        self.trouble: OSError | None = None
        self.answering = False
        self._flags = 0
        self._head = b""  # what is held
        self._written = False
        self._on_first_byte = on_first_byte

    def read_only_what_is_there(self) -> None:
        """From now on a read that would wait fails."""
        self._flags = socket.MSG_DONTWAIT

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As socket.recv. Raises ReceiveTimeoutError."""
        try:
            return super().recv(size, flags | self._flags)
        except OSError as error:
            raise self._noted(error, ReceiveTimeoutError) from None

    def send(self, data: Any, flags: int = 0) -> int:
        """As socket.send. What is sent so is no answer yet: gunicorn's 100 Continue."""
        try:
            return super().send(data, flags)
        except OSError as error:
            raise self._noted(error, SendTimeoutError) from None

    def sendall(self, data: Any, flags: int = 0) -> None:
        """As socket.sendall; holds the head. Raises SendTimeoutError."""
        if self.answering or data[9:10] == _INTERIM:
            self._write(data)
        else:
            self.answering = True
            self._head = data

    def flush(self) -> None:
        """Send what is held; the head of a response without a body, say."""
        if self._head:
            self._write(b"")

    def _write(self, data: Any) -> None:
        """Send everything. Raises SendTimeoutError when the client takes nothing for too long."""
        self._begin()
        head, self._head = self._head, b""
        try:
            if not head:
                self._put(data)
            elif len(data) <= JOINED:
                self._put(head + data)
            else:
                self._put(head, socket.MSG_MORE)
                self._put(data)
        except OSError as error:
            raise self._noted(error, SendTimeoutError) from None

    def _put(self, data: Any, flags: int = 0) -> None:
        super().sendall(data, flags)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """As socket.sendfile, which would wait for ever when the kernel's timeout has passed."""
        self.flush()
        self._begin()
        sent = 0
        try:
            while count is None or sent < count:
                part = min(1 << 30, 1 << 30 if count is None else count - sent)
                done = os.sendfile(self.fileno(), file.fileno(), offset + sent, part)
                if not done:
                    break
                sent += done
        except OSError as error:
            raise self._noted(error, SendTimeoutError) from None
        return sent

    def _begin(self) -> None:
        if self.trouble is not None:
            raise self.trouble
        if not self._written:
            self._written = True
            self._on_first_byte()

    def _noted(self, error: OSError, when_blocked: type[OSError]) -> OSError:
        trouble = when_blocked() if isinstance(error, BlockingIOError) else error
        self.trouble = trouble
        return trouble
