"""How a process loads the app: when it may, and what follows if it cannot.

1. With stagger_init, one process loads at a time, and begins only while no more than p others
   have the app loaded. So in a reload at most p + 1 do: the next successor loads when an old
   process has gone. The turn is a lock that ends with its holder. A holder that does not come to
   an end is left behind after PATIENCE: those that wait take their turns in the next lane.
2. The master's page says which process is the first since the last reload. So the dispatcher
   knows whether one has had the app since, and until then keeps those that might be replaced by
   one that cannot load it.
3. A failure ends gunicorn (exit code 3) only if no process has ever had the app. If a process is
   missing after any other end before the app was loaded, killed or not, the master does not fork
   the next one sooner than in 1 to 60 s, so that it does not fork and fail in a circle; but at once
   when one that had the app ends, and with HUP, TTIN and TTOU.
4. Python ends when all threads have. Those of an app that failed have END_TIME for it; of one that
   has served, what is left of graceful_timeout, if that is more.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, Protocol

from .pages import LoadPage, MasterPage
from .rules import Wishes, decode_wishes
from .unpatched import sleep, start_new_thread

BOOT_ERROR = 3
HALT = (BOOT_ERROR, 4)  # the exit codes at which gunicorn halts
LONGEST_PAUSE = 60.0
PATIENCE = 600.0  # seconds without any change after which a process loads beside another
END_TIME = 5.0  # seconds that the threads of an app have to end
GLANCE = 0.02  # seconds between two looks at what has to change first
_MOMENT = 0.001


class Process(Protocol):
    """What loading asks of the process it is in; a gunicorn worker."""

    age: int
    ppid: int
    alive: bool
    log: Any


class Pauses:
    """The master's: until when it forks no process in place of one that did not load the app.

    Each fork that does not wait costs a process that had it, or an operator's word, for which the
    master begins anew. So none goes on in a circle.
    """

    def __init__(self, load_page: LoadPage) -> None:
        self.until = 0.0
        self._load_page = load_page
        self._loads = 0  # until the last failure
        self._failures = 0  # in a row

    def begin(self, age: int, now: float) -> float:
        """One has ended, and is missing. Seconds to wait; 0 if it has had the app, for which others
        that are missing wait no longer; or if others have failed with it, for which a pause has
        begun."""
        if self._load_page.loaded([age]):
            self.until = 0.0
            return 0.0
        if now < self.until:
            return 0.0
        if self._loads != self._load_page.loads:
            self._loads, self._failures = self._load_page.loads, 0
        pause = min(LONGEST_PAUSE, 2.0 ** min(self._failures, 6))  # a float has an end, too
        self._failures += 1
        self.until = now + pause
        return pause


class Loading:
    """One process's attempt."""

    def __init__(self, process: Process, load_page: LoadPage, master_page: MasterPage) -> None:
        self._process = process
        self._load_page = load_page
        self._master_page = master_page

    def run(self, load: Callable[[], None], staggered: bool) -> None:
        """Load the app, in turn. Raises SystemExit if it cannot be loaded."""
        if not staggered:
            loaded = self._try(load)
        else:
            with self._turn():
                loaded = self._try(load)
        if not loaded:
            self._fail()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        lane = self._await_turn()
        try:
            yield
        finally:
            self._load_page.end_turn(lane)

    def _await_turn(self) -> int:
        """Wait as long as others get on; the lane in which the turn was taken."""
        lane, before, since = 0, None, time.monotonic()
        while obstacle := self._obstacle(lane):
            now = time.monotonic()
            if obstacle != before:
                before, since = obstacle, now
            elif now - since >= PATIENCE:
                self._process.log.warning(
                    "Loading the app in spite of stagger_init: for %g s %s", PATIENCE, obstacle
                )
                if self._load_page.take_turn(lane):
                    break
                lane, before = lane + 1, None
            time.sleep(GLANCE)
        return lane

    def _obstacle(self, lane: int) -> str | None:
        """What keeps this process from loading now."""
        self._end_without_master()
        if not self._load_page.take_turn(lane):
            return f"process {self._load_page.whose_turn(lane)} has been loading it"
        wishes = self._wishes()
        loaded = self._load_page.loaded(wishes.live)
        if len(loaded) > max(1, wishes.rules.processes):
            return f"{len(loaded)} processes have had it ({', '.join(map(str, sorted(loaded)))})"
        return None

    def _try(self, load: Callable[[], None]) -> bool:
        try:
            load()
        except BaseException:  # an app may raise SystemExit, too
            if not self._process.alive:  # a signal has told us to leave
                _end(0)
            self._process.log.exception("The app cannot be loaded")
            return False
        self._load_page.note_loaded(self._process.age, self._wishes().live)
        return True

    def _fail(self) -> None:
        if self._load_page.was_loaded:
            self._process.log.error(
                "The replica serves on with the processes it has. A HUP, or the next process that "
                "is missing, tries again"
            )
        fail(self._load_page)

    def _end_without_master(self) -> None:
        if os.getppid() != self._process.ppid:
            _end(0)

    def _wishes(self) -> Wishes:
        while True:
            state = self._master_page.read()
            if state is not None:
                return decode_wishes(state)
            self._end_without_master()
            time.sleep(_MOMENT)


def fail(load_page: LoadPage) -> NoReturn:
    """End this process, and gunicorn with it if none has ever had the app."""
    _end(1 if load_page.was_loaded else BOOT_ERROR)


def _end(code: int) -> NoReturn:
    """No heartbeat is due while a process loads, so that gunicorn's `timeout` would not end it."""
    end_within(END_TIME, code)
    sys.exit(code)


def end_within(seconds: float, code: int, complain: Callable[[], None] = lambda: None) -> None:
    """The process is about to end: see that it does, whatever threads and atexit of the app do."""
    with suppress(RuntimeError):  # threads are short
        start_new_thread(_end_for_sure, (seconds, code, complain))


def _end_for_sure(seconds: float, code: int, complain: Callable[[], None]) -> None:
    sleep(seconds)
    with suppress(Exception):
        complain()
    os._exit(code)
