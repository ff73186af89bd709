"""A stop of the replica, or a pause: what has come is finished, and what has not is kept out.

    begin       listen no more; whoever has connected, or is about to, may still send a request
    last call   a second later at most: who has sent nothing by now is closed
    drained     nothing is left that could become a request: the processes are dismissed
    give up     shortly before the deadline: whatever is left is told that it is too late
    ended       nothing and nobody is left; at the latest a moment after the deadline

A pause (WINCH) ends with the last call, until `resume`.
"""

from __future__ import annotations

import math
from typing import Protocol

from .actions import Action
from .answers import OUT_OF_TIME
from .clients import Clients
from .connection import Connection
from .decisions import Decisions
from .processes import Link, Processes
from .rules import Stop, Wishes

LAST_CALL = 1.0  # seconds that a client has to send a request after a stop began
OVERTIME = 0.25  # seconds after graceful_timeout at which a stop ends, whatever is left to do


class Host(Protocol):
    """The dispatcher that stops."""

    requests: dict[int, Connection]

    def perform(self, actions: list[Action], now: float) -> None: ...


class Stopping:
    """What is left to do until the replica has stopped; nothing, as long as it need not."""

    def __init__(
        self, clients: Clients, decisions: Decisions, processes: Processes, host: Host
    ) -> None:
        self._clients = clients
        self._decisions = decisions
        self._processes = processes
        self._host = host
        self.stop: Stop | None = None
        self.ended = False
        self._graceful_timeout = 0.0
        self._paused = False
        self._given_up = 0  # turns

    def begin(self, stop: Stop, wishes: Wishes, now: float) -> None:
        """Begin to stop; or go on, sooner or at once."""
        if self.stop is None:
            self._graceful_timeout = wishes.graceful_timeout
            self._decisions.stop()
            last_call = min(LAST_CALL, wishes.graceful_timeout / 2)
            serving = stop.graceful and self._clients.listeners.wanted
            self._clients.stop(now, now + last_call, wishes.shared, serving)
        self.stop = stop
        self.ended = self.ended or not stop.graceful

    def pause(self, pausing: bool, now: float) -> None:
        """While p is 0 what has come is finished, and what comes is left to another master."""
        if self.stop is not None or pausing == self._paused:
            return
        self._paused = pausing
        if pausing:
            self._decisions.stop()
            self._clients.pause(now + LAST_CALL)
        else:
            self._clients.resume()
            self._host.perform(self._decisions.resume(now), now)

    def due(self) -> float:
        """When `tick` is needed next, or sooner."""
        if self.stop is None:
            return math.inf
        return self._give_up_at(self.stop) if self._given_up < 2 else self._end_at(self.stop)

    def tick(self, live: tuple[int, ...], now: float) -> None:
        """Go on, as far as possible now. `live` are the processes that the master has."""
        roster, stop = self._decisions.roster, self.stop
        if roster.stopping and self._clients.called and not roster.drained:
            self._drain_if_done(now)
        nobody = not (live or self._processes.links)
        if self._paused and stop is None and nobody:
            self._refuse(now)
        if stop is None or not stop.graceful:
            return
        if nobody or now >= self._give_up_at(stop):
            self._give_up(now)
        gone = self._clients.called and roster.drained and not self._clients.connections
        late = now >= self._end_at(stop)
        self.ended = self.ended or late or (gone and not self._processes.links)

    def _give_up_at(self, stop: Stop) -> float:
        """When the rest is told that it is too late: a second before the end, or a quarter."""
        return stop.deadline - min(1.0, self._graceful_timeout / 4)

    def _end_at(self, stop: Stop) -> float:
        return stop.deadline + OVERTIME

    def _drain_if_done(self, now: float) -> None:
        """Dismiss the processes once nothing is left that could become a request."""
        if not any(self._clients.pending()):
            self._host.perform(self._decisions.drain(), now)

    def _give_up(self, now: float) -> None:
        """Answer what waits, what has come in part, and what runs and has sent nothing.

        The last in two turns: in the first its slots lose the right to begin a response. Nothing
        begins any more, so that processes may go which have nothing to do.
        """
        self._given_up += 1
        self._refuse(now)
        self._host.perform(self._decisions.drain(), now)
        for link in self._processes.links.values():
            if link.silenced:
                self._answer_for(link, now)
            link.silenced = True
            link.cells.silence()

    def _refuse(self, now: float) -> None:
        """Nobody will work on what waits, on what has come in part, or on what comes yet."""
        self._host.perform(self._decisions.give_up(), now)
        self._clients.give_up(OUT_OF_TIME, now)

    def _answer_for(self, link: Link, now: float) -> None:
        begun = link.cells.begun()
        for request in self._decisions.processes[link.age].requests:
            conn = None if begun.get(request) else self._host.requests.pop(request, None)
            if conn is not None:
                self._clients.answer(conn, OUT_OF_TIME, now)
