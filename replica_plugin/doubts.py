"""Requests that found the replica full: refused when it is sure that it was.

    ready -> full -> [ doubts ] -> judged again, in the next turn at first -> admitted, or refused

A client that has all of its answer may ask again, on another connection, before the slot has
reported, or before we have heard that. What it asks then is not one too many.

1. Whatever was reported before a request came has been heard when that is judged again: each turn
   hears reports before it judges.
2. While slots have written their responses and not reported yet (`Cells.complete`), as many
   requests as there are such slots stay in doubt, each for PATIENCE at most: what the app does when
   its response is closed may take long.
"""

from __future__ import annotations

import math

from .connection import Connection

PATIENCE = 0.05  # seconds
_MOMENT = 0.005


class Doubts:
    """Connections whose request is to be judged again. `ending` is how many slots are about to
    report, as of the last time somebody looked; before what they have said since was heard."""

    def __init__(self) -> None:
        self.held: list[Connection] = []
        self.ending = 0
        self.due = math.inf  # when they are judged again at the latest

    def hold(self, conn: Connection, now: float) -> bool:
        """A request has found the replica full; False if there is no doubt."""
        if conn.ready_at == now:  # it comes in this turn
            self.due = now
        elif len(self.held) < self.ending and now < conn.ready_at + PATIENCE:
            self.due = min(self.due, now + _MOMENT)
        else:
            return False
        self.held.append(conn)
        return True

    def take_all(self) -> list[Connection]:
        """Those to judge again now, in their order; some may have left meanwhile."""
        held, self.held, self.due = self.held, [], math.inf
        return held
