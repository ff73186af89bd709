"""How a process loads the app: when it may, and what follows if it cannot.

1. With stagger_init, one process loads at a time, and begins only while no more than p others
   have the app loaded. So in a reload at most p + 1 do: the next successor loads when an old
   process has gone. The turn is a lock that ends with its holder. A holder that does not come to
   an end is left behind after PATIENCE: those that wait take their turns in the next lane.
2. The master's page says which process is the newest, and which live. So the dispatcher knows
   that one has ended before it had the app, however it ended, and keeps those it might have
   replaced.
3. A failure ends gunicorn (exit code 3) only if no process has ever had the app. Any other
   process that fails takes, for 1 to 60 s, the place of the one that is missing, so that
   gunicorn does not fork and fail in a circle; if none is missing, it ends at once.
4. Python ends when all threads have. Those of an app that failed have END_TIME for it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, Protocol

from .pages import LoadPage, MasterPage, ReplicaPage
from .rules import Wishes, decode_wishes
from .unpatched import sleep, start_new_thread

BOOT_ERROR = 3  # the exit code at which gunicorn halts
LONGEST_PAUSE = 60.0
PATIENCE = 600.0  # seconds without any change after which a process loads beside another
END_TIME = 5.0  # seconds that the threads of an app that failed have to end
GLANCE = 0.02  # seconds between two looks at what has to change first
_MOMENT = 0.001


class Process(Protocol):
    """What loading asks of the process it is in; a gunicorn worker."""

    age: int
    ppid: int
    alive: bool
    log: Any


class Loading:
    """One process's attempt."""

    def __init__(
        self, process: Process, load_page: LoadPage, master_page: MasterPage, page: ReplicaPage
    ) -> None:
        self._process = process
        self._load_page = load_page
        self._master_page = master_page
        self._replica_page = page

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
            self._load_page.note_failure()
            return False
        self._load_page.note_loaded(self._process.age, self._wishes().live)
        return True

    def _fail(self) -> None:
        if not self._replica_page.read().was_ready and not self._others():
            _end(BOOT_ERROR)
        doublings = min(self._load_page.failures - 1, 6)  # a float has an end, too
        pause = min(LONGEST_PAUSE, 2.0**doublings)
        self._process.log.error(
            "The replica serves on with the processes it has. A HUP, or the next process that is "
            "missing, tries again; not sooner than in %g s, if one is missing now",
            pause,
        )
        end = time.monotonic() + pause
        while time.monotonic() < end and self._is_in_place_of_another():
            self._end_without_master()
            time.sleep(GLANCE)
        _end(1)

    def _others(self) -> set[int]:
        return self._load_page.loaded(self._wishes().live) - {self._process.age}

    def _is_in_place_of_another(self) -> bool:
        """Whether gunicorn would fork another process if we ended now."""
        wishes = self._wishes()
        return len(set(wishes.live) - {self._process.age}) < wishes.rules.processes

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


def _end(code: int) -> NoReturn:
    """No heartbeat is due while a process loads, so that gunicorn's `timeout` would not end it."""
    with suppress(RuntimeError):  # threads are short
        start_new_thread(_end_for_sure, (code,))
    sys.exit(code)


def _end_for_sure(code: int) -> None:
    sleep(END_TIME)
    os._exit(code)
