"""What a slot of gevent mode works with: the channel, the client's socket, the interrupter.

Where a thread would wait in the kernel, here only the greenlet does (gevent_worker.py).

1. One watcher reads the channel: two greenlets may not wait on one socket.
2. Of a client's socket only the waiting is different (client_socket.py).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import gevent
import gevent.hub
import gevent.socket

from .channel import LEAVE, PAUSE, Kind, ProcessEnd, Report, close_all, decode_job, receive_now
from .client_socket import ClientSocket
from .errors import OverdueError
from .overdue import SIGNAL, Run
from .rest import NOW, PIECE
from .unpatched import get_ident

READABLE = 1
HAND_TIME = 0.005  # seconds in which a slot may take one request after the other, and no hub turns

Message = tuple[bytes, list[int]]
END: Message = (b"", [])


class GreenInterrupter:
    """For slots that are greenlets. It is made in the main thread, where they are.

    The hub raises the exception in a greenlet that waits. A greenlet that runs, and so keeps the
    hub, has it raised by a signal's handler, which also ends a call that blocks. Whichever comes
    first: only the main thread takes from `_aims`.
    """

    here = staticmethod(gevent.getcurrent)

    def __init__(self, in_hub: Callable[..., None]) -> None:
        self._in_hub = in_hub
        self._main = get_ident()
        self._aims: set[Run] = set()
        signal.signal(SIGNAL, self._on_signal)

    def frame(self, where: Any) -> FrameType | None:
        """A greenlet that runs has no frame of its own, but the thread's."""
        return where.gr_frame or sys._current_frames().get(self._main)

    def strike(self, run: Run) -> None:
        self._aims.add(run)
        self._in_hub(self._throw, run)
        signal.pthread_kill(self._main, SIGNAL)

    def _throw(self, run: Run) -> None:
        if run in self._aims:
            self._aims.discard(run)
            run.where.throw(OverdueError)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        current = gevent.getcurrent()
        for run in [run for run in self._aims.copy() if run.where is current]:
            self._aims.discard(run)
            if run.is_open:
                raise OverdueError

    def take_back(self, run: Run) -> None:
        self._aims.discard(run)


class GreenEnd(ProcessEnd):
    """A channel's end that one watcher reads, for slots that wait here for their turn.

    `handing` is true for a slot that has not let the hub turn since it was handed a message. For
    HAND_TIME it may go on so; then come others of the process.
    """

    _flags = NOW

    def __init__(self, sock: socket.socket, deck: socket.socket) -> None:
        super().__init__(sock, deck)
        self.handing = False
        self._hand_until = 0.0
        self._idle: list[Any] = []  # gevent's Waiters
        self._arrived: deque[Message] = deque()
        self._ended = False
        self._dismissed = False
        self._watcher = gevent.get_hub().loop.io(sock.fileno(), READABLE)
        self._watcher.start(self._on_readable)

    @property
    def may_take(self) -> bool:  # type: ignore[override]
        """Not ahead of what this process was sent before; nor while the hub waits for its turn."""
        if self._arrived:
            return False
        return not self.handing or time.monotonic() < self._hand_until

    def receive(self) -> Message:
        """Wait for the next message; `b""` at the end. Nothing else ends the wait."""
        while not (self._arrived or self._ended):
            waiter = gevent.hub.Waiter()
            self._idle.append(waiter)
            try:
                message: Message = waiter.get()
                return message
            except BaseException:  # a timeout of a request that is long over, say
                self._idle.remove(waiter)
        return self._arrived.popleft() if self._arrived else END

    def _wait(self, for_room: bool) -> None:
        """Only the greenlet waits."""
        with suppress(BaseException):  # a timeout that the request has left behind, say
            if for_room:
                gevent.socket.wait_write(self.sock.fileno())
            else:
                gevent.sleep(PAUSE)

    def _on_readable(self) -> None:
        """Called by the hub, which may not wait."""
        try:
            message = receive_now(self.sock)
        except BlockingIOError:  # the attendant was faster
            return
        except ConnectionError:
            message = END
        if message == END:
            self._ended = True
            self._watcher.close()
            while self._idle:
                self._hand(message)
        else:
            self._deliver(message)

    def is_dismissed(self) -> bool:
        return self._dismissed or super().is_dismissed()

    def _deliver(self, message: Message) -> None:
        self._dismissed |= message[0] == LEAVE
        if self._idle:
            self._hand(message)
        else:
            self._arrived.append(message)

    def _hand(self, message: Message) -> None:
        """Run a slot, until it waits."""
        self.handing = True
        self._hand_until = time.monotonic() + HAND_TIME
        self._idle.pop().switch(message)
        self.handing = False

    def give_back(self, in_hub: Callable[..., None]) -> None:
        """Called by the attendant while the hub stalls: return jobs that no slot has taken.

        One of which the kernel has no memory to say so waits for the hub, after all.
        """
        with suppress(BlockingIOError):
            while True:
                data, fds = receive_now(self.sock)
                if not data:
                    return
                if data == LEAVE:
                    self._dismissed = True
                    in_hub(self._deliver, (data, fds))
                    return
                report = Report(Kind.RETURNED, decode_job(data).request)
                try:
                    self.sock.send(report.encode(), socket.MSG_NOSIGNAL)
                except ConnectionError:
                    close_all(fds)
                    raise
                except OSError:
                    in_hub(self._deliver, (data, fds))
                    return
                close_all(fds)


class GreenClientSocket(ClientSocket):
    """A client's socket of which only the greenlet waits."""

    def _sendfile_some(self, fd: int, offset: int, count: int) -> int | None:
        """By reading: should sendfile() wait all the same, the whole process would."""
        data = os.pread(fd, min(PIECE, count), offset)
        self._send_all(data)
        return len(data)

    def _wait(self, limit: int) -> bool:
        reads = limit == socket.SO_RCVTIMEO
        wait = gevent.socket.wait_read if reads else gevent.socket.wait_write
        over = TimeoutError()
        try:
            wait(self.fileno(), self._seconds(limit) or None, over)
        except TimeoutError as error:
            if error is not over:  # it is the app's own
                raise
            return False
        return True
