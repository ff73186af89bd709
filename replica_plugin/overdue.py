"""The attendant's watch over requests that run for longer than request_timeout.

    attendant, when the time is over         slot
    1. note where the code is                claim the response, then write its first byte
    2. claim the response, answer 504        ...
    3. tell the dispatcher                   when the app's code is at its end: close the window
    4. interrupt the code                    report, as ever: only then is the slot free

1. A response has one claim, and the first to ask gets it. Is it the attendant, a write of the
   slot's fails before it has sent anything. Is it the slot, the response goes on until the
   interrupt ends it, and the client sees it cut short. Before it reports, a slot asks for the
   claim, too (`end`), and waits if the attendant is at 2 or 3, which need its socket and cell.
2. At most one exception is raised for a request, and only in its windows: while the app's code
   works on it. None is left for the request that the slot takes next.
3. The attendant waits for nobody here: no lock of the app's, of a log or of a slot.

Why 2 holds. Attendant and slot share two flags, each of which one of them writes:

    attendant                     slot, when the app's code has returned or raised
    1. aims = True                a. is_open = False
    2. if is_open:                b. wait while aims
    3.     strike                 c. take back what was not raised yet
    4. aims = False               d. go on

If 2 finds it open, a comes after 2 and so b after 1: the slot waits for 4, and c comes after 3.
If it does not, there is no 3. So at d nothing is pending, and nothing will be. An exception that
is raised in a, b or c ends them half-way; but there is only one, so they are done again in peace.
It is no lock, because an exception between taking one and entering `with` would leave it taken.
"""

from __future__ import annotations

import ctypes
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol, TypeVar

from .answers import overdue
from .channel import Job
from .errors import OverdueError

SIGNAL = signal.SIGRTMIN + 6
"""Interrupts the main thread, where slots are: with one of them, and in gevent mode."""

STACK = 1 << 15  # characters of a stack that are told
TURN = 1.0  # seconds between two looks at most
_MOMENT = 0.0005

Result = TypeVar("Result")


class Interrupter(Protocol):
    """How code is interrupted, which depends on what a slot is."""

    def here(self) -> Any:
        """Asked in a slot: what identifies it."""

    def frame(self, where: Any) -> FrameType | None:
        """Asked by the attendant: what the slot is doing."""

    def strike(self, run: Run) -> None:
        """Asked by the attendant: raise OverdueError in the slot."""

    def take_back(self, run: Run) -> None:
        """Asked in the slot: whatever was not raised will not be."""


class Client(Protocol):
    """The client's socket."""

    def answer_instead(self, data: bytes) -> None:
        """Send what there is room for, at once."""


class Run:
    """One request in a slot. `permit` says whether this process may begin its response."""

    # Most requests keep most of these as they are, so they cost nothing to set.
    client: Client | None = None  # the first four are written by the slot
    asked: Any = None  # the request as gunicorn has parsed it
    where: Any = None
    is_open = False
    was_answered = False  # and these by the attendant
    aims = False
    struck = False
    telling = False
    told = False
    tale = ""

    def __init__(
        self, job: Job, channel: Any, permit: Callable[[], bool], interrupter: Interrupter
    ) -> None:
        self.request = job.request
        self.overdue_at = job.overdue_at
        self._limit = job.limit
        self.channel = channel
        self._claim: dict[None, bool] = {}
        self._permit = permit
        self._interrupter = interrupter

    def may_write(self) -> bool:
        """Asked by the slot before its first byte."""
        return self.claim_for_slot() and self._permit()

    def claim_for_slot(self) -> bool:
        """Whether the slot has the claim; if not, the attendant is done with it."""
        if self._claim.setdefault(None, True):
            return True
        while self.telling:  # it was true before the attendant claimed
            time.sleep(_MOMENT)
        return False

    def end(self) -> None:
        """Called by the slot: from now on the attendant leaves socket and cell alone."""
        self.claim_for_slot()
        self.client = self.asked = None  # which know this run: a circle is garbage to collect

    @property
    def is_answered(self) -> bool:
        """Whether the attendant has the claim."""
        return not self._claim.get(None, True)

    def answer(self) -> None:
        """Called by the attendant: answer in place of the slot, if that has not begun to."""
        client = self.client
        if client is not None and not self._claim.setdefault(None, False) and self._permit():
            client.answer_instead(overdue(self._limit).encode_for(self.asked))
            self.was_answered = True

    def window(self, call: Callable[[], Result]) -> Result:
        """Call the app, which may be interrupted meanwhile, by OverdueError."""
        try:
            try:
                self.where = self._interrupter.here()
                self.is_open = True
                return call()
            finally:
                self._close()
        except OverdueError:
            self._close()
            raise

    def _close(self) -> None:
        self.is_open = False
        while self.aims:
            time.sleep(_MOMENT)
        if self.struck:
            self._interrupter.take_back(self)

    def interrupt(self) -> None:
        """Called by the attendant, at most once."""
        self.aims = True
        if self.is_open:
            self.struck = True
            self._interrupter.strike(self)
        self.aims = False

    def stack(self) -> str:
        """Where the slot is, for the log."""
        if not self.is_open:
            return "(not in the app)\n"
        try:
            frame = self._interrupter.frame(self.where)
            return "".join(traceback.format_stack(frame))[-STACK:] if frame else "(not known)\n"
        except Exception as error:  # the lines come from the app's own loaders
            return f"(not known: {error!r})\n"


Tell = Callable[[Run], bool]
"""Tell the dispatcher of an overdue request; whether it was told."""


class Watch:
    """What the slots of a process run. A slot writes its place, the attendant looks."""

    def __init__(self, slots: int, interrupter: Interrupter, wake: Callable[[], None]) -> None:
        self._runs: list[Run | None] = [None] * slots
        self._interrupter = interrupter
        self._wake = wake
        self._looks_at = 0.0

    def begin(self, slot: int, job: Job, channel: object, permit: Callable[[], bool]) -> Run:
        """A slot has taken a request. It wakes the attendant if that would look too late."""
        run = Run(job, channel, permit, self._interrupter)
        self._runs[slot] = run
        if job.overdue_at < self._looks_at:
            self._wake()
        return run

    def end(self, slot: int) -> None:
        self._runs[slot] = None

    def look(self, now: float, tell: Tell) -> float:
        """Called by the attendant: see to what is overdue. When to look again at the latest.

        `_looks_at` is set before the slots are looked at: a request that comes later sees it.
        """
        self._looks_at = now + TURN
        for run in self._runs:
            if run is not None and run.client and not run.told and run.overdue_at <= now:
                self._on_overdue(run, tell)
        due = (run.overdue_at for run in self._runs if run is not None and run.overdue_at > now)
        self._looks_at = min(now + TURN, min(due, default=math.inf))
        return self._looks_at

    def _on_overdue(self, run: Run, tell: Tell) -> None:
        """Once; but it is told again if that was not possible."""
        if run.tale:
            run.told = tell(run)
            return
        run.tale = run.stack()
        run.telling = True
        run.answer()
        run.told = tell(run)
        run.telling = False
        run.interrupt()

    def outlives(self, moment: float, channel: object) -> bool:
        """Whether a request of a dispatcher before this was overdue already at that moment."""
        return any(
            run is not None and run.channel is not channel and run.overdue_at <= moment
            for run in self._runs
        )


class ThreadInterrupter:
    """For slots that are threads beside the main thread.

    The exception is raised when the thread next executes Python code, so a call that blocks,
    a sleep or a read, comes to its end first.
    """

    here = staticmethod(threading.get_ident)

    def frame(self, where: int) -> FrameType | None:
        return sys._current_frames().get(where)

    def strike(self, run: Run) -> None:
        _set_exception(ctypes.c_ulong(run.where), ctypes.py_object(OverdueError))

    def take_back(self, run: Run) -> None:
        _set_exception(ctypes.c_ulong(run.where), None)


class MainInterrupter(ThreadInterrupter):
    """For the slot that is the main thread: a signal's handler raises, and ends blocking calls.

    It is made in that thread. A signal that comes at another time raises nothing.
    """

    def __init__(self) -> None:
        self._aim: Run | None = None
        signal.signal(SIGNAL, self._on_signal)

    def strike(self, run: Run) -> None:
        self._aim = run
        signal.pthread_kill(run.where, SIGNAL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        run, self._aim = self._aim, None
        if run is not None and run.is_open:
            raise OverdueError

    def take_back(self, run: Run) -> None:
        self._aim = None


def _set_exception(thread: ctypes.c_ulong, exception: ctypes.py_object[Any] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, exception)
