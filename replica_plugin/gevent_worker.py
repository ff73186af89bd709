"""gunicorn's worker class of gevent mode. Nothing else imports gevent.

All slots are greenlets of the process's main thread, where the app is imported, too. Beside
it the attendant is a thread of the system that runs no code of the app.

1. A greenlet in which a request has waited for anything takes no other one; the hub makes the
   slot a new one. So what the app leaves behind there (locals, a timeout not cancelled) meets no
   later request, as with gunicorn's gevent worker. A request that never waited leaves its
   greenlet to the next: to make one takes a third of the time that such a request does.
2. One watcher reads the channel: two greenlets may not wait on one socket.
3. Only the main thread, which is the hub's, touches what the slots use. The attendant puts
   what it wants done there on `_errands`, and wakes the hub.
4. No O_NONBLOCK is set on clients' sockets, which would be set for whoever has them next;
   reads and writes are told not to wait, and the hub waits where they would have.
5. The hub says in the process's cells that it turns (`_turn`). When it has not for too long,
   the dispatcher sends nothing more; the attendant tells it why, and gives back what no slot
   has taken. A call that keeps the GIL keeps the attendant from that, too.

The attendant uses nothing that gevent patches, and of gevent only the hub's `async_` watcher.

What the patch needs of gevent is imported here, in the master: once for all processes, and before
an app that is preloaded. Python takes modules down in the reverse order, and what an app's still do
then, such as a logging handler of Flask's, which takes a lock, finds gevent's in place.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import gevent
import gevent.event
import gevent.hub
import gevent.lock
import gevent.monkey
import gevent.queue
import gevent.select
import gevent.signal
import gevent.socket
import gevent.ssl
import gevent.subprocess
import gevent.thread
import gevent.threading
import gevent.time

from . import early
from .channel import (
    LEAVE,
    TURNING,
    Kind,
    ProcessEnd,
    Report,
    Stall,
    close_all,
    decode_job,
    receive,
)
from .client_socket import ClientSocket, ReceiveTimeoutError, SendTimeoutError
from .errors import OverdueError
from .overdue import SIGNAL, Interrupter, Run
from .pages import STALL
from .rest import PIECE, queued
from .slot import Slot
from .unpatched import Socket
from .worker import ReplicaWorker

TURN = 0.25  # seconds between two signs of life of the hub, and two looks at it
READABLE = 1
_NOW = int(socket.MSG_DONTWAIT)  # an IntFlag takes a microsecond for each `|`
_TELL = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_TIMEVAL = struct.Struct("ll")

_get_ident: Callable[[], int] = gevent.monkey.get_original("_thread", "get_ident")
_start_thread: Callable[..., int] = gevent.monkey.get_original("_thread", "start_new_thread")

Message = tuple[bytes, list[int]]
END: Message = (b"", [])


class GeventWorker(ReplicaWorker):
    """The worker class of gevent mode."""

    turn = TURN

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.client_socket = GreenClientSocket
        self._errands: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._waker: Any = None
        self._explained = False

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """gunicorn asks before it forks; with preload_app, when the app has been loaded."""
        super().check_config(cfg, log)
        warning = early.warning(gevent.monkey.get_original)
        if warning:
            log.warning("%s", warning)

    def init_process(self) -> None:
        """Patch where gunicorn's own gevent worker does: in the process, before the app comes."""
        # It takes a while, in which the master's handler, inherited, would lose a TERM.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        gevent.monkey.patch_all()
        gevent.reinit()
        super().init_process()

    def _interrupter(self) -> Interrupter:
        return GreenInterrupter(self._in_hub)

    def _serve(self, slots: list[Slot]) -> None:
        loop = gevent.get_hub().loop
        self._main = _get_ident()
        self._changed = gevent.event.Event()
        self._ended = gevent.event.Event()
        self._waker = loop.async_()
        self._waker.start(self._run_errands)
        self._turned_at, self._cpu_at_turn = time.monotonic(), time.process_time()
        self._timer = loop.timer(0.0, TURN)
        self._timer.start(self._turn)
        for slot in slots:
            gevent.spawn(self._run_slot, slot)
        _start_thread(self._attend, ())
        self._ended.wait()

    # In the main thread: slots.

    def _run_slot(self, slot: Slot, channel: ProcessEnd | None = None) -> None:
        """A greenlet's life. The hub makes its successor, which inherits nothing."""
        try:
            while (channel := channel or slot.join()) is not None:
                going = slot.take(channel)
                if not (going and isinstance(channel, GreenEnd) and channel.handing):
                    following = channel if going else None
                    run = gevent.get_hub().loop.run_callback
                    run(gevent.spawn, self._run_slot, slot, following)
                    return
        except Exception:
            self.log.exception("A slot failed")
        self._working -= 1
        self._wake_attendant()
        if not self._working:
            self._ended.set()

    def await_channel(self) -> ProcessEnd | None:
        while self.serving and self._channel is None:
            self._changed.clear()
            self._changed.wait()
        return self._channel if self.serving else None

    def lost(self, channel: ProcessEnd) -> None:
        if self._channel is channel:
            self._channel = None

    def _take_up(self, sock: socket.socket) -> None:
        self._channel = GreenEnd(sock)
        self._changed.set()
        if self._leaving_since is not None:
            self._say_leaving()

    # In the main thread: the hub.

    def _turn(self) -> None:
        """The hub turns. If it had stalled, as the dispatcher sees it, say so."""
        late = self._cells.has_stalled(time.monotonic())
        self._turned_at, self._cpu_at_turn = time.monotonic(), time.process_time()
        self._cells.turn()
        if late and self._channel is not None:
            with suppress(OSError):  # no room, or a dispatcher that died: it looks once a second
                self._channel.sock.send(TURNING, _TELL)

    def _run_errands(self) -> None:
        while self._errands:
            errand, arguments = self._errands.popleft()
            errand(*arguments)

    # What signals ask. They come at any instant, in the hub, too, which may not wait.

    def handle_quit(self, sig: int, frame: Any) -> None:
        """QUIT, INT: leave now."""
        gevent.spawn(super().handle_quit, sig, frame)

    def handle_abort(self, sig: int, frame: Any) -> None:
        """ABRT: interrupt what keeps the hub, which is not what waits for the end; then end."""
        self._in_hub(self._finish)
        super().handle_abort(sig, frame)

    def _finish(self) -> None:
        self._ended.set()

    # The attendant, in a thread of its own.

    def _in_hub(self, errand: Callable[..., Any], *arguments: Any) -> None:
        self._errands.append((errand, arguments))
        if self._waker is not None:
            self._waker.send()

    def _found(self, sock: socket.socket) -> None:
        self._in_hub(self._take_up, sock)

    def _on_death(self, sock: socket.socket) -> None:
        """The end of the channel tells the slots."""

    def _end(self) -> None:
        self.serving = False
        self._in_hub(self._changed.set)

    def _reopen_logs(self) -> None:
        """Logs have locks, which are greenlets' business."""
        self._in_hub(gevent.spawn, super()._reopen_logs)

    def _is_stuck(self) -> bool:
        """Whether the hub has not turned for `timeout`, as with gunicorn's gevent worker."""
        stood = time.monotonic() - self._turned_at
        if stood > STALL:
            self._on_stall(stood)
        return bool(0 < self.cfg.timeout < stood)

    def _on_stall(self, stood: float) -> None:
        channel = self._channel
        if not isinstance(channel, GreenEnd):
            return
        with suppress(OSError):  # the dispatcher died
            self._explain(channel, stood)
            channel.give_back(self._in_hub)

    def _explain(self, channel: ProcessEnd, stood: float) -> None:
        """Tell the log, by way of the dispatcher, which knows no locks: once is enough."""
        if self._explained:
            return
        request, place = _culprit(sys._current_frames().get(self._main))
        if place is None:
            return
        self._explained = True
        share = (time.process_time() - self._cpu_at_turn) / stood
        stall = Stall(share, place).encode()
        channel.tell(Report(Kind.STALLED, request, carry=stall).encode())


def _culprit(frame: FrameType | None) -> tuple[int, str | None]:
    """Which request runs in the main thread (0: none), and where; None for a hub at rest."""
    if frame is None or frame.f_globals.get("__name__", "").partition(".")[0] == "gevent":
        return 0, None
    code = frame.f_code
    place = f"{os.path.basename(code.co_filename)}:{frame.f_lineno} ({code.co_name})"
    caller: FrameType | None = frame
    while caller is not None and caller.f_code is not Slot._work.__code__:
        caller = caller.f_back
    return (caller.f_locals["job"].request if caller else 0), place


class GreenInterrupter:
    """For slots that are greenlets. It is made in the main thread, where they are.

    The hub raises the exception in a greenlet that waits. A greenlet that runs, and so keeps the
    hub, has it raised by a signal's handler, which also ends a call that blocks. Whichever comes
    first: only the main thread takes from `_aims`.
    """

    here = staticmethod(gevent.getcurrent)

    def __init__(self, in_hub: Callable[..., None]) -> None:
        self._in_hub = in_hub
        self._main = _get_ident()
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

    `handing` is true for a slot that has not let the hub turn since it was handed a message.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.handing = False
        self._idle: list[Any] = []  # gevent's Waiters
        self._arrived: deque[Message] = deque()
        self._ended = False
        self._watcher = gevent.get_hub().loop.io(sock.fileno(), READABLE)
        self._watcher.start(self._on_readable)

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

    def tell(self, message: bytes, *fds: int) -> None:
        """Tell the dispatcher; the greenlet waits for room if there is none. Raises OSError."""
        while True:
            try:
                self._send(message, fds, _TELL)
                return
            except BlockingIOError:
                gevent.socket.wait_write(self.sock.fileno())

    def _on_readable(self) -> None:
        """Called by the hub, which may not wait."""
        try:
            message = receive(self.sock, _NOW)
        except BlockingIOError:  # the attendant was faster
            return
        except OSError:
            message = END
        if message == END:
            self._ended = True
            self._watcher.close()
            while self._idle:
                self._hand(message)
        else:
            self._deliver(message)

    def _deliver(self, message: Message) -> None:
        if self._idle:
            self._hand(message)
        else:
            self._arrived.append(message)

    def _hand(self, message: Message) -> None:
        """Run a slot, until it waits."""
        self.handing = True
        self._idle.pop().switch(message)
        self.handing = False

    def give_back(self, in_hub: Callable[..., None]) -> None:
        """Called by the attendant while the hub stalls: return jobs that no slot has taken."""
        with suppress(BlockingIOError):
            while True:
                data, fds = receive(self.sock, _NOW)
                if not data:
                    return
                if data == LEAVE:
                    in_hub(self._deliver, (data, fds))
                    return
                close_all(fds)
                report = Report(Kind.RETURNED, decode_job(data).request)
                self.sock.send(report.encode(), socket.MSG_NOSIGNAL)


class GreenClientSocket(ClientSocket):
    """A client's socket of which only the greenlet waits, for as long as the kernel would have."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As socket.recv. Raises ReceiveTimeoutError."""
        while True:
            try:
                return Socket.recv(self, size, flags | _NOW)
            except BlockingIOError:
                self._await_bytes()
            except OSError as error:
                raise self._noted(error, ReceiveTimeoutError) from None

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As socket.recv_into, which an app may use by `makefile`. Raises ReceiveTimeoutError."""
        while True:
            try:
                return Socket.recv_into(self, buffer, nbytes, flags | _NOW)
            except BlockingIOError:
                self._await_bytes()
            except OSError as error:
                raise self._noted(error, ReceiveTimeoutError) from None

    def send(self, data: Any, flags: int = 0) -> int:
        """As socket.send. What is sent so is no answer yet: gunicorn's 100 Continue."""
        try:
            return Socket.send(self, data, flags | _NOW)
        except BlockingIOError:
            return self._send_later(data, flags)
        except OSError as error:
            raise self._noted(error, SendTimeoutError) from None

    def _send_later(self, data: Any, flags: int) -> int:
        try:
            while not (sent := self._send_some(data, flags)):
                pass
        except OSError as error:
            raise self._noted(error, SendTimeoutError) from None
        return sent

    def _send_some(self, data: memoryview, flags: int) -> int:
        before = queued(self)
        ready = self._wait(gevent.socket.wait_write, socket.SO_SNDTIMEO)
        try:
            return Socket.send(self, data, flags | _NOW)
        except BlockingIOError:
            if not ready and queued(self) >= before:
                raise
            return 0

    def _sendfile_some(self, fd: int, offset: int, count: int) -> int | None:
        """By reading: sendfile() has no MSG_DONTWAIT, and would have the whole process wait."""
        data = os.pread(fd, min(PIECE, count), offset)
        self._send_all(data)
        return len(data)

    def _await_bytes(self) -> None:
        if self._flags or not self._wait(gevent.socket.wait_read, socket.SO_RCVTIMEO):
            raise self._noted(BlockingIOError(), ReceiveTimeoutError)

    def _wait(self, wait: Callable[..., None], limit: int) -> bool:
        """Wait for as long as the dispatcher has told the kernel; whether that was enough."""
        limits = self.getsockopt(socket.SOL_SOCKET, limit, _TIMEVAL.size)
        whole, millionths = _TIMEVAL.unpack(limits)
        try:
            wait(self.fileno(), whole + millionths / 1e6 or None, TimeoutError())
        except TimeoutError:
            return False
        return True
