"""gunicorn's worker class of gevent mode. Nothing but this and green.py imports gevent.

All slots are greenlets of the process's main thread, where the app is imported, too. Beside
it the attendant is a thread of the system that runs no code of the app.

1. A greenlet in which a request has waited for anything takes no other one; the hub makes the
   slot a new one. So what the app leaves behind there (locals, a timeout not cancelled) meets no
   later request, as with gunicorn's gevent worker. A request that never waited leaves its
   greenlet to the next: to make one takes a third of the time that such a request does.
2. Only the main thread, which is the hub's, touches what the slots use. The attendant puts
   what it wants done there on `_errands`, and wakes the hub.
3. The hub says in the process's cells that it turns (`_turn`). When it has not for too long,
   the dispatcher sends nothing more; the attendant tells it why, and gives back what no slot
   has taken. A call that keeps the GIL keeps the attendant from that, too.

The attendant uses nothing that gevent patches, and of gevent only the hub's `async_` watcher.

What the patch needs of gevent is imported here, in the master: once for all processes, and before
an app that is preloaded. Python takes modules down in the reverse order, and what an app's still do
then, such as a logging handler of Flask's, which takes a lock, finds gevent's in place.
"""

from __future__ import annotations

import os
import socket
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
from .cells import STALL
from .channel import TURNING, Kind, ProcessEnd, Report, Stall
from .green import GreenClientSocket, GreenEnd, GreenInterrupter
from .overdue import Interrupter
from .slot import Slot
from .unpatched import get_ident, start_thread
from .worker import ReplicaWorker

TURN = 0.25  # seconds between two signs of life of the hub, and two looks at it


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
        gevent.monkey.patch_all()
        gevent.reinit()
        super().init_process()

    def _interrupter(self) -> Interrupter:
        return GreenInterrupter(self._in_hub)

    def _serve(self) -> None:
        loop = gevent.get_hub().loop
        self._main = get_ident()
        self._changed = gevent.event.Event()
        self._ended = gevent.event.Event()
        self._waker = loop.async_()
        self._waker.start(self._run_errands)
        self._turned_at, self._cpu_at_turn = time.monotonic(), time.process_time()
        self._timer = loop.timer(0.0, TURN)
        self._timer.start(self._turn)
        for slot in self._slots:
            gevent.spawn(self._run_slot, slot)
        start_thread(self._attend_beside, "replica-attendant")
        self._ended.wait()

    def _part_from_parent(self) -> None:
        super()._part_from_parent()
        self._errands.clear()  # such as to take up a new channel

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
        except BaseException:  # a timeout that a request has left behind, say
            self._on_slot_failed()
        self._slots.remove(slot)
        self._wake_attendant()
        if not self._slots:
            self._ended.set()

    def await_channel(self) -> ProcessEnd | None:
        while self.serving and self._channel is None:
            self._changed.clear()
            self._changed.wait()
        return self._channel if self.serving else None

    def _take_up(self, sock: socket.socket, deck: socket.socket) -> None:
        self._channel = GreenEnd(sock, deck)
        if self._dead is not sock:
            self._dead = None  # and closed
        self._changed.set()

    # In the main thread: the hub.

    def _turn(self) -> None:
        """The hub turns. If it had stalled, as the dispatcher sees it, say so."""
        late = self._cells.has_stalled(time.monotonic())
        self._turned_at, self._cpu_at_turn = time.monotonic(), time.process_time()
        self._cells.turn()
        if late and self._channel is not None:
            with suppress(OSError):  # no room, or a dispatcher that died: it looks once a second
                self._channel.tell_now(TURNING)

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

    def _found(self, sock: socket.socket, deck: socket.socket) -> None:
        self._in_hub(self._take_up, sock, deck)

    def _on_death(self, sock: socket.socket) -> None:
        """The end of the channel tells the slots."""
        self._dead = sock

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
        with suppress(OSError):  # the dispatcher died; or there is no room, and a look again soon
            self._explain(channel, stood)
            channel.give_back(self._in_hub)

    def _explain(self, channel: ProcessEnd, stood: float) -> None:
        """Tell the log, by way of the dispatcher, which knows no locks: once is enough."""
        if self._explained:
            return
        request, place = _culprit(sys._current_frames().get(self._main))
        if place is None:
            return
        share = (time.process_time() - self._cpu_at_turn) / stood
        stall = Stall(share, place).encode()
        channel.tell_now(Report(Kind.STALLED, request, carry=stall).encode())
        self._explained = True


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
