"""The worker class of thread mode: t threads are the slots.

With t = 1 the slot is the main thread, so that the app sees one thread only, and the attendant
is a thread beside it that runs no code of the app. With t > 1 the attendant is the main thread.
"""

from __future__ import annotations

import socket
import threading
import time
from functools import partial
from typing import Any

from .channel import ProcessEnd
from .overdue import Interrupter, MainInterrupter, ThreadInterrupter
from .slot import Slot
from .unpatched import start_thread
from .worker import TURN, ReplicaWorker


class ThreadWorker(ReplicaWorker):
    """The worker class of thread mode."""

    may_have_extra = True

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._change = threading.Condition()
        self._busy_with: dict[int, bool] = {}
        self._busy_since = 0.0

    def _interrupter(self) -> Interrupter:
        return MainInterrupter() if self.cfg.threads == 1 else ThreadInterrupter()

    def _serve(self) -> None:
        if len(self._slots) == 1:
            start_thread(self._attend_beside, "replica-attendant")
            self._run_slot(self._slots[0])
            return
        for index, slot in enumerate(tuple(self._slots)):
            start_thread(partial(self._run_slot, slot), f"replica-slot-{index}")
        self._attend()

    def _part_from_parent(self) -> None:
        """A child whose code comes back to the slot it was forked in ends there."""
        super()._part_from_parent()
        self.serving = False

    def _run_slot(self, slot: Slot) -> None:
        try:
            slot.run()
        except BaseException as error:  # raised by the app in this thread, late, say
            is_main = threading.current_thread() is threading.main_thread()
            if is_main and not isinstance(error, Exception):  # QUIT
                raise
            self._on_slot_failed()
        finally:
            self._slots.remove(slot)
            self._wake_attendant()

    def await_channel(self) -> ProcessEnd | None:
        with self._change:
            while self.serving and self._channel is None:
                self._change.wait(TURN)
            return self._channel if self.serving else None

    def lost(self, channel: ProcessEnd) -> None:
        with self._change:
            super().lost(channel)

    def _found(self, sock: socket.socket, deck: socket.socket) -> None:
        with self._change:
            self._channel = ProcessEnd(sock, deck)
            self._change.notify_all()

    def _on_death(self, sock: socket.socket) -> None:
        with self._change:
            self._channel = None

    def _end(self) -> None:
        with self._change:
            self.serving = False
            self._change.notify_all()

    def _is_stuck(self) -> bool:
        """With t = 1, whether a request is older than `timeout`.

        So `timeout` protects from a stuck request with t = 1, as it does in the sync worker;
        with t > 1 it watches the process, as it does in gthread.
        """
        if self.cfg.threads > 1:
            return False
        now, busy = time.monotonic(), self._cells.begun()
        if not busy or busy.keys() != self._busy_with.keys():
            self._busy_with, self._busy_since = busy, now
        return bool(0 < self.cfg.timeout < now - self._busy_since)
