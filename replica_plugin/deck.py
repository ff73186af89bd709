"""The deck: the queue's head, in a socket from which the slots of all processes take.

    dispatcher: offer -> [ some jobs ] -> take: a slot that has ended a request

While all slots are busy, whichever ends a request first gets the one that has waited longest. It
finds it here, and reports both at once (DONE with `took`), so that it need not sleep until the
dispatcher has heard of the one and sent the other. The kernel gives each job to one taker.

1. The decisions say when there may be something (`for_deck`), and clear the deck before anything
   happens that would have the dispatcher decide: so it only ever does what that would do.
2. A slot marks its cell, takes, reports, and unmarks it. So of a request that is missing and that
   nobody reports, while no cell of a living process is marked, it is sure that who took it died
   before it was begun: it waits again.
3. A process has the same end as all others, and can have the kernel drop or cut short what is laid
   there (SO_ATTACH_FILTER). What is cut short counts as missing, too, and is let go of.
4. A deck ends with its dispatcher. What a slot then takes, and cannot report, it lets go of; what
   lies there, each process's attendant lets go of: those clients' connections end.
"""

from __future__ import annotations

import math
import socket
import time
from contextlib import suppress

from .channel import Job, close_all, decode_job, pair, receive_now, send_job

Taken = tuple[Job, list[int]]


class Deck:
    """The dispatcher's side, and the end that it gives to processes."""

    def __init__(self) -> None:
        self._front, self.end = pair()

    def offer(self, job: Job, client: int) -> bool:
        """Lay a job there; False if that is not possible now."""
        try:
            send_job(self._front, job, client)
        except OSError:
            return False
        return True

    def recall(self, most: int) -> set[int]:
        """Take back the first requests that lie there, so many at most.

        Whatever else than its end stops that ends the dispatcher, and the deck with it: what is
        left there could be taken, and run a second time.
        """
        left: set[int] = set()
        with suppress(BlockingIOError):
            while len(left) < most:
                data, fds = receive_now(self.end)
                close_all(fds)
                if not data:  # a process has shut it
                    break
                with suppress(EOFError):  # cut short: it is missing
                    left.add(decode_job(data).request)
        return left


def take(end: socket.socket) -> Taken | None:
    """Asked by a slot: the first job, which begins now, and its client's descriptor."""
    try:
        data, fds = receive_now(end)
    except OSError:
        return None
    if not data:
        return None
    try:
        job, now = decode_job(data), time.monotonic()
    except EOFError:  # cut short
        close_all(fds)
        return None
    overdue_at = math.inf if job.limit is None else now + job.limit
    return job._replace(waited=now - job.ready_at, overdue_at=overdue_at), fds


def let_go(end: socket.socket) -> None:
    """The dispatcher has died: what waited ends with it."""
    with suppress(OSError):
        while (message := receive_now(end))[0]:
            close_all(message[1])
