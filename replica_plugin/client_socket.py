"""A client's socket in the hands of a slot.

Reads and writes are told not to wait (not by O_NONBLOCK, which would be set for whoever has the
connection next), since what they want is mostly there. Where it is not, `_wait` does: for as long
as the dispatcher has set with the socket (SO_RCVTIMEO, SO_SNDTIMEO), and in short turns, since a
thread can be interrupted between two of them only (overdue.py). The slot's cell learns when the
response begins, and what went wrong with the client is told apart from what went wrong in the app.

The head of a response, which gunicorn writes by itself, is held until there is a part of the
body to go with it, or `flush`: one write a response, not two, and one wake-up of the client.

Once the response is complete (`finish`), what the client does not take at once is `left`, as far as
there is `room` for it: the `rest`, which is for the dispatcher to send; before that, WSGI wants
each part of the body out of the app's hands before the app is asked for the next.
"""

from __future__ import annotations

import math
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .rest import NOW, PIECE, Rest, queued
from .unpatched import Socket, poll

JOINED = 1 << 16  # bytes of body up to which copying it behind the head is cheaper than a write
TURN = 0.25  # seconds after which a thread that waits for a client can be interrupted, at most
_TIMEVAL = struct.Struct("ll")
_INTERIM = b"1"  # the first digit of a status that is no response yet: 103 Early Hints


class ReceiveTimeoutError(TimeoutError):
    """Nothing of the body came for receive_timeout."""


class SendTimeoutError(TimeoutError):
    """The client took nothing for send_timeout."""


class AnsweredError(ConnectionError):
    """Attendant or dispatcher has answered in place of the slot, or is about to."""


class InterruptedWriteError(ConnectionError):
    """A write was interrupted, so nobody knows how much of it was sent: nothing may follow."""


class ClientSocket(Socket):
    """`trouble` is the error that this socket raised, if it did; then nothing more is sent.

    `answering` says that the response has begun; its head may still be held. `claim` is called
    before its first byte, and says whether it may be written; `complete` before its last.
    """

    __slots__ = (
        "_claim", "_complete", "_finishing", "_hasty", "_head", "_left_size", "_room",
        "answering", "left", "trouble", "written",
    )  # fmt: skip

    def __init__(
        self,
        family: int,
        kind: int,
        fd: int,
        claim: Callable[[], bool],
        complete: Callable[[], None],
        room: Callable[[], int],
    ) -> None:
        super().__init__(family, kind, 0, fd)
        if self.gettimeout() is not None:  # the app has called setdefaulttimeout, for its own
            self.setblocking(True)
        self.trouble: OSError | None = None
        self.answering = False
        self._finishing = False
        self.left: deque[memoryview] = deque()
        self._left_size = 0
        self._room = room
        self._hasty = False
        self._head = b""  # what is held
        self.written = False
        self._claim = claim
        self._complete = complete

    def read_only_what_is_there(self) -> None:
        """From now on a read that would wait fails."""
        self._hasty = True

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As socket.recv. Raises ReceiveTimeoutError."""
        while True:
            try:
                return super().recv(size, flags | NOW)
            except BlockingIOError:
                self._await_bytes()
            except OSError as error:
                raise self._noted(error, ReceiveTimeoutError) from None

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As socket.recv_into, which an app may use by `makefile`. Raises ReceiveTimeoutError."""
        while True:
            try:
                return super().recv_into(buffer, nbytes, flags | NOW)
            except BlockingIOError:
                self._await_bytes()
            except OSError as error:
                raise self._noted(error, ReceiveTimeoutError) from None

    def send(self, data: Any, flags: int = 0) -> int:
        """As socket.send. What is sent so is no answer yet: gunicorn's 100 Continue."""
        try:
            try:
                return super().send(data, flags | NOW)
            except BlockingIOError:
                while not (sent := self._send_some(data, flags)):
                    pass
                return sent
        except OSError as error:
            raise self._noted(error, SendTimeoutError) from None

    def sendall(self, data: Any, flags: int = 0) -> None:
        """As socket.sendall; holds the head. Raises SendTimeoutError."""
        if self.answering or data[9:10] == _INTERIM:
            self._write(data)
        else:
            self.answering = True
            self._head = data

    def answer_instead(self, data: bytes) -> None:
        """Called by the attendant, to which the response belongs: send what there is room for."""
        with suppress(OSError):  # the client has left
            super().send(data, NOW)

    def discard(self) -> None:
        """Take back what is held, and what is left."""
        self._head, self.answering = b"", False
        self.left.clear()
        self._left_size = 0

    def flush(self) -> None:
        """Send what is held; the head of a response without a body, say."""
        if self._head:
            self._write(b"")

    def finish(self) -> None:
        """From now on all that comes is there already: the app is not asked for anything more."""
        if not self._finishing:
            self._finishing = True
            self._complete()

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """As socket.sendfile, which would wait for ever when the kernel's timeout has passed.

        What there is room for is not sent by the kernel from the file, since that would wait
        for the client.
        """
        self.flush()
        self._begin()
        fd = file.fileno()
        size = os.fstat(fd).st_size - offset if count is None else count
        here = max(0, size - self._room()) if self._finishing else size
        sent = 0
        try:
            if here:  # the kernel may have had no room for the head
                self._send_first(self._left_size)
            while sent < here:
                part = self._sendfile_some(fd, offset + sent, here - sent)
                if part == 0:
                    return sent
                sent += part or 0
            while sent < size and (piece := os.pread(fd, min(PIECE, size - sent), offset + sent)):
                self._send_or_leave(piece)
                sent += len(piece)
        except OSError as error:
            raise self._noted(error, SendTimeoutError) from None
        except BaseException:
            self.trouble = InterruptedWriteError()
            raise
        return sent

    def rest(self) -> Rest | None:
        """What is left, for the dispatcher; None when memory or descriptors are short."""
        try:
            return Rest.of(*self.left)
        except OSError:
            return None

    def send_left(self) -> None:
        """Send what is left after all: there is nobody to leave it to. Raises OSError."""
        try:
            self._send_first(self._left_size)
        except OSError as error:
            raise self._noted(error, SendTimeoutError) from None
        except BaseException:
            self.trouble = InterruptedWriteError()
            raise

    def _write(self, data: Any) -> None:
        """Send everything. Raises SendTimeoutError when the client takes nothing for too long."""
        self._begin()
        head, self._head = self._head, b""
        try:
            if head and len(data) > JOINED:
                self._send_all(head, socket.MSG_MORE)
            elif head:
                data = head + data
            if self._finishing:
                self._send_or_leave(data)
            else:
                self._send_all(data)
        except OSError as error:
            raise self._noted(error, SendTimeoutError) from None
        except BaseException:
            self.trouble = InterruptedWriteError()
            raise

    def _send_or_leave(self, data: bytes) -> None:
        """Send what the client takes at once, and as much more as there is no room for."""
        sent = 0
        if not self.left:
            with suppress(BlockingIOError):
                sent = super().send(data, NOW)
        if sent < len(data):
            self.left.append(memoryview(data)[sent:])
            self._left_size += len(data) - sent
            self._send_first(self._left_size - self._room())

    def _send_first(self, count: int) -> None:
        """Send so many bytes of what is left, however long the client takes."""
        while count > 0:
            part = self.left[0]
            now = part[:count]
            self._send_all(now)
            count -= len(now)
            self._left_size -= len(now)
            if len(now) == len(part):
                self.left.popleft()
            else:
                self.left[0] = part[len(now) :]

    def _send_all(self, data: Any, flags: int = 0) -> None:
        """Send everything, while the client takes something every send_timeout."""
        left = memoryview(data)
        while left:
            try:
                left = left[super().send(left, flags | NOW) :]
            except BlockingIOError:
                left = left[self._send_some(left, flags) :]

    def _send_some(self, data: memoryview, flags: int) -> int:
        """Send what there is room for, once there is some. Raises BlockingIOError."""
        before = queued(self)
        ready = self._wait(socket.SO_SNDTIMEO)
        try:
            return super().send(data, flags | NOW)
        except BlockingIOError:
            if not ready and queued(self) >= before:
                raise
            return 0

    def _sendfile_some(self, fd: int, offset: int, count: int) -> int | None:
        """As `_send_some`, from a file; 0 at its end, None if there was no room yet.

        sendfile() has no MSG_DONTWAIT. But it need not wait for a part of the buffer of which a
        third is free, as it is when the kernel says that one can write.
        """
        before = queued(self)
        if self._wait(socket.SO_SNDTIMEO):
            room = self.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 4
            return os.sendfile(self.fileno(), fd, offset, min(room, count))
        if queued(self) >= before:
            raise BlockingIOError
        return None

    def _await_bytes(self) -> None:
        if self._hasty or not self._wait(socket.SO_RCVTIMEO):
            raise self._noted(BlockingIOError(), ReceiveTimeoutError)

    def _wait(self, limit: int) -> bool:
        """Wait to read or to write, up to this limit of the socket's; whether that was enough."""
        until = time.monotonic() + (self._seconds(limit) or math.inf)
        client = poll()
        client.register(self, select.POLLIN if limit == socket.SO_RCVTIMEO else select.POLLOUT)
        while (left := until - time.monotonic()) > 0:
            if client.poll(min(TURN, left) * 1000):
                return True
        return False

    def _seconds(self, limit: int) -> float:
        """What the dispatcher has told the kernel; 0 for no limit."""
        option = self.getsockopt(socket.SOL_SOCKET, limit, _TIMEVAL.size)
        whole, millionths = _TIMEVAL.unpack(option)
        return float(whole + millionths / 1e6)

    def _begin(self) -> None:
        if self.trouble is not None:
            raise self.trouble
        if not self.written:
            if not self._claim():
                self.trouble = AnsweredError()
                raise self.trouble
            self.written = True

    def _noted(self, error: OSError, when_blocked: type[OSError]) -> OSError:
        trouble = when_blocked() if isinstance(error, BlockingIOError) else error
        self.trouble = trouble
        return trouble
