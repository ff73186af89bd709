"""Requests that found the replica full: refused when it is sure that it was.

    ready -> full -> [ doubts ] -> judged again in the next turn -> admitted, or refused; in a dry
                                   run counted, and admitted

A client that has all of its answer may ask again, on another connection, before the slot has
reported, or before we have heard that. What it asks then is not one too many. So there is doubt

1. while slots have written their responses and not reported yet (`Cells.complete`): about as many
   requests as there are such slots;
2. while processes have said something that has not been heard: about as many as they can have
   ended by themselves, what slots had and what lay on the deck (deck.py);

and about none for longer than PATIENCE: what the app does when its response is closed may take
long. A slot reports before it says that it has: so 1 is looked at before 2, and misses nothing. In
a dry run, whoever comes meanwhile and is one too many for sure is admitted before those in doubt.
"""

from __future__ import annotations

from typing import Protocol

from .connection import Connection
from .decisions import DECK

PATIENCE = 0.05  # seconds


class Slots(Protocol):
    """What is asked of the processes' side."""

    slots: int

    def ending(self) -> int: ...
    def have_spoken(self) -> bool: ...


class Doubts:
    """Connections whose request is to be judged again, in their order."""

    def __init__(self, slots: Slots) -> None:
        self.held: list[Connection] = []
        self._slots = slots

    def hold(self, conn: Connection, now: float) -> bool:
        """A request has found the replica full; False if there is no doubt."""
        ending = self._slots.ending()
        most = self._slots.slots + DECK if self._slots.have_spoken() else ending
        if len(self.held) >= most or now >= conn.ready_at + PATIENCE:
            return False
        self.held.append(conn)
        return True

    def take_all(self) -> list[Connection]:
        """Those to judge again now; some may have left meanwhile."""
        held, self.held = self.held, []
        return held
