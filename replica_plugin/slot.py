"""A slot: takes a ready request, has an exchange (exchange.py) work on it, and reports.

    take -> read (parser) -> call the app -> write, close the body -> report, and take again

It takes off the deck (deck.py) when it reports, if something lies there; otherwise from the
channel, when the dispatcher sends something.

1. The report is the one way back of the slot's credit. It is sent exactly once for each
   request taken, on every exit, after the response body is closed; or the request is given back
   (RETURNED), when there was no descriptor left for its client.
2. A slot takes from one channel until that ends; its credit on a new one is FREE.
3. What goes wrong with a request stays with it: nothing but the end of the process, or of
   the slot's work (LEAVE), ends the loop.

A channel that ends means that the dispatcher died: the connection is then offered to the
next one (ADOPT), with what is known about it.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import partial
from typing import Protocol

from .cells import Cells
from .channel import (
    FREE,
    LEAVE,
    Address,
    Adopt,
    End,
    Job,
    Kind,
    ProcessEnd,
    Report,
    close_all,
    decode_job,
)
from .client_socket import ClientSocket
from .deck import Taken, take
from .exchange import Exchange, Worker
from .overdue import Watch


class Process(Worker, Protocol):
    """What a slot asks of the process it is in; a gunicorn worker."""

    serving: bool
    client_socket: type[ClientSocket]

    def await_channel(self) -> ProcessEnd | None: ...
    def dismissed(self, channel: ProcessEnd) -> None: ...
    def lost(self, channel: ProcessEnd) -> None: ...
    def offer(self, adopt: Adopt, sock: socket.socket) -> None: ...
    def may_take(self) -> bool: ...
    def room_for_rest(self) -> int: ...


class Slot:
    """One thread's, or greenlet's, place in a process; `index` is its cell."""

    def __init__(self, worker: Process, index: int, cells: Cells, watch: Watch) -> None:
        self._worker = worker
        self._index = index
        self._cells = cells
        self._watch = watch
        self._log = worker.log
        self._next: Taken | None = None  # what it has taken off the deck, and reported
        self.free_on: ProcessEnd | None = None  # where it has said FREE last; not before it has
        self._may_answer = partial(cells.answering, index)  # as the dispatcher has it
        self._complete = partial(cells.complete, index)

    def run(self) -> None:
        """Take requests until the process is dismissed. Never raises, but for SystemExit."""
        while (channel := self.join()) is not None:
            while self.take(channel):
                pass

    def join(self) -> ProcessEnd | None:
        """Come to wait on the channel, once there is one; None if no more requests are taken."""
        while (channel := self._worker.await_channel()) is not None:
            if self._say(channel, FREE):
                self.free_on = channel
                return channel
        return None

    def take(self, channel: ProcessEnd) -> bool:
        """Work on the next thing that comes on this channel; False when that has ended."""
        if self._next is not None:
            (job, fds), self._next = self._next, None
            self._work(channel, job, fds)
            return True
        if not self._worker.serving:
            return False
        data, fds = channel.receive()
        if not data:
            self._worker.lost(channel)
            return False
        if data == LEAVE:
            self._worker.dismissed(channel)
            return False
        self._work(channel, decode_job(data), fds)
        return True

    def forget(self) -> None:
        """In a child that the app has forked: what the slot was about to begin is its parent's."""
        if self._next is not None:
            (_, fds), self._next = self._next, None
            close_all(fds)

    def _work(self, channel: ProcessEnd, job: Job, fds: list[int]) -> None:
        """One request, from taken to reported."""
        if not fds:
            self._say(channel, Report(Kind.RETURNED, job.request, End.UNTAKEN).encode())
            return
        self._cells.begin(self._index, job.request)
        run = self._watch.begin(self._index, job, channel, self._may_answer)
        sock = self._worker.client_socket(
            _family(job.client),
            socket.SOCK_STREAM,
            fds[0],
            run.may_write,
            self._complete,
            self._worker.room_for_rest,
        )
        run.client = sock
        report = Report(Kind.DONE, job.request, End.ABORT)
        try:
            report = Exchange(self._worker, job, sock, run).run()
        except BaseException:  # a logger of the user's, say: it must not cost the slot
            with suppress(Exception):
                self._log.exception("A request could not be brought to its end")
        finally:
            try:
                run.end()
            finally:
                self._report(channel, job, report, sock)

    def _report(self, channel: ProcessEnd, job: Job, report: Report, sock: ClientSocket) -> None:
        """Give slot and connection back; to the next dispatcher, if ours has died."""
        if not self._report_and_take(channel, report) and report.end == End.KEEP:
            adopt = Adopt(job.number + 1, job.server, report.ahead, report.carry)
            self._worker.offer(adopt, sock)
        self._cells.end(self._index)
        self._watch.end(self._index)
        sock.close()

    def _report_and_take(self, channel: ProcessEnd, report: Report) -> bool:
        """Report, and with that what the slot takes off the deck; False if nobody was told."""
        taken = None
        if self._worker.may_take() and channel.may_take:
            self._cells.take(self._index)
            taken = take(channel.deck)
        if taken is None:
            return self._say(channel, report.encode())
        job, fds = taken
        if not self._say(channel, report._replace(took=job.request).encode()):
            close_all(fds)
            return False
        self._next = taken
        return True

    def _say(self, channel: ProcessEnd, message: bytes) -> bool:
        """Tell the dispatcher; False if it is dead."""
        try:
            channel.tell(message)
        except ConnectionError:  # what else stops it, ends the slot's work
            self._worker.lost(channel)
            return False
        return True


def _family(client: Address) -> int:
    if isinstance(client, tuple):
        return socket.AF_INET6 if len(client) > 2 else socket.AF_INET
    return socket.AF_UNIX
