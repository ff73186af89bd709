"""The processes of a replica: which may be sent requests, which are to leave, and when.

Plain values, as in decisions.py, which they are a part of.

1. At most p processes are usable: the newest that have the app loaded and are to stay.
2. A process is dismissed once, and only while it can be spared.
"""

from __future__ import annotations

from collections.abc import Iterable

from .actions import Action, Dismiss
from .process import Process


class Roster:
    """All processes that are known, by age, of which `wanted` are to serve."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.processes: dict[int, Process] = {}
        self.usable: list[Process] = []  # those that may be sent requests
        self.was_ready = False  # all p were, once
        self.draining = False  # a stop is about to begin, which ends successors that still load
        self.stopping = False
        self.drained = False
        self.live: frozenset[int] = frozenset()
        self._first = 0  # the age of the first process since the last reload
        self._loaded = 0  # the newest that has ever registered

    @property
    def booting(self) -> bool:
        """Whether the master has a process that has not registered with us yet."""
        return bool(self.live - self._registered())

    @property
    def cannot_load(self) -> bool:
        """Whether none has loaded the app as it is since the last reload: nobody may be able to."""
        return self._loaded < self._first

    @property
    def is_ready(self) -> bool:
        """Whether readyz says 200: all p were ready once, one is usable, no stop begins."""
        return self.was_ready and bool(self.usable) and not (self.draining or self.stopping)

    @property
    def is_healthy(self) -> bool:
        """Whether healthz says 200: there is a process, if only one that boots, or is to leave and
        has a successor then."""
        return bool(self.processes) or self.booting

    def told(self, wanted: int, live: Iterable[int], first: int) -> None:
        """The master's word: p, the ages of its processes, and of the first since a reload."""
        self.wanted = wanted
        self.live = frozenset(live)
        self._first = first

    def changed(self) -> list[Action]:
        """Processes or rules have changed: who leaves now, and who is usable."""
        self._loaded = max(self._loaded, *self._registered(), 0)
        dismissed: list[Action] = []
        for process in sorted(self.processes.values(), key=lambda each: each.age):
            if self._wants_to_leave(process) and self.may_leave(process):
                process.dismissed = True
                dismissed.append(Dismiss(process.age))
        present = sorted(self._present(), key=lambda each: each.age, reverse=True)
        self.usable = present[: self.wanted]
        self.see_whether_ready()
        return dismissed

    def see_whether_ready(self) -> None:
        """The replica is ready once p processes have all their slots waiting, or working."""
        if not self.was_ready:
            complete = sum(each.is_complete for each in self.usable)
            self.was_ready = complete >= self.wanted > 0

    def may_leave(self, process: Process) -> bool:
        """Whether a process that is told to leave can be spared.

        Either p newer ones are ready; or no successor is loading, since gunicorn will fork
        one only when this process has gone, and then one process leaves at a time. But not
        while gunicorn would fork none, since others have not ended yet; nor while that one may
        not be able to load the app, or not have the time for it.
        """
        if self.stopping:
            return self.drained
        if self._is_replaced(process):
            return True
        enough = len(self._present()) >= self.wanted >= len(self.live)
        return enough and not (self.booting or self.cannot_load or self.draining)

    def _registered(self) -> set[int]:
        return {each.age for each in self.processes.values() if each.registered}

    def _present(self) -> list[Process]:
        """Processes that have registered and have not been dismissed."""
        return [p for p in self.processes.values() if p.registered and not p.dismissed]

    def _wants_to_leave(self, process: Process) -> bool:
        if process.dismissed or not process.registered:
            return False
        return process.leaving or self.drained or self._is_replaced(process)

    def _is_replaced(self, process: Process) -> bool:
        """Whether p newer ones are ready. The master has told it to leave; its app may not heed."""
        newer = sum(each.age > process.age for each in self._present())
        return newer >= self.wanted
