"""How a process offers itself to a dispatcher, and leaves, when that is not possible at once."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from server import wait_for
from stage import PATIENCE

from replica_plugin import gevent_worker, registration, thread_worker, worker
from replica_plugin.cells import Cells
from replica_plugin.channel import (
    LEAVING,
    WELCOME,
    Job,
    Kind,
    ProcessEnd,
    Register,
    close_all,
    decode_report,
    pair,
    receive_control,
    send,
)
from replica_plugin.deck import Deck, take
from replica_plugin.registration import Registration
from replica_plugin.slot import Slot

OFFER = Register(1, 1, 0, False)


def no_descriptors() -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def offering_on(control: socket.socket, cells: Cells, found: list[socket.socket]) -> Registration:
    return Registration(
        control,
        cells.fd,
        logging.getLogger(),
        lambda again: OFFER,
        lambda *ends: found.extend(ends),
        lambda _: None,
    )


def test_a_process_without_descriptors_offers_itself_when_it_has_some_again(monkeypatch):
    control, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    cells = Cells(1)
    with control, writing:
        offering = offering_on(writing, cells, [])

        def offer() -> list[int]:
            offering.wait(0)
            try:
                return receive_control(control)[1]
            except BlockingIOError:
                return []

        with monkeypatch.context() as patch:
            patch.setattr(registration, "pair", no_descriptors)
            assert offer() == []
        close_all(wait_for(offer, "an offer"))
    os.close(cells.fd)


def test_a_deck_is_never_waited_for_whatever_timeout_the_app_gives_new_sockets(monkeypatch):
    control, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    cells = Cells(1)
    found: list[socket.socket] = []
    with control, writing:
        offering = offering_on(writing, cells, found)
        offering.wait(0)
        _, (channel, *others), _ = receive_control(control)
        deck = Deck()
        with socket.socket(fileno=channel) as end:
            send(end, WELCOME, os.pidfd_open(os.getpid()), deck.end.fileno())
            socket.setdefaulttimeout(PATIENCE)
            try:
                offering.wait(0)
            finally:
                socket.setdefaulttimeout(None)
        assert found[1].gettimeout() is None
        assert take(found[1]) is None
    close_all(others)
    os.close(cells.fd)


def test_a_child_that_the_app_forks_forgets_what_a_slot_was_about_to_begin():
    slot: Any = Slot(SimpleNamespace(log=None), 0, Cells(1), None)
    reading, writing = os.pipe()
    slot._next = Job(1, 1, "", "", b"", b"", False, 0.0, 1.0), [writing]
    slot.forget()
    assert slot._next is None
    assert os.read(reading, 1) == b"", "the child holds the client's connection"
    os.close(reading)


class Leaving:
    """A process that was told to leave, as far as its attendant sees to that."""

    def __init__(self, monkeypatch: Any) -> None:
        self.now = 0.0
        self.ended = False
        monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.process: Any = object.__new__(worker.ReplicaWorker)
        self.process.__dict__.update(
            _channel=None, _dead=None, _leaving_since=None, _alone_since=None, _told=None,
            _dismissed_at=None, _asked=False, _end=self._end, ppid=os.getppid(),
        )  # fmt: skip

    def _end(self) -> None:
        self.ended = True

    def look(self, now: float, channel: ProcessEnd | None) -> None:
        self.now = now
        self.process._channel = channel
        self.process._leave()


def test_a_process_that_has_long_wanted_to_leave_waits_for_another_dispatcher(monkeypatch):
    """As after a HUP, while its successor loads for minutes: it serves on meanwhile."""
    leaving = Leaving(monkeypatch)
    first, second = (ProcessEnd(*pair()) for _ in range(2))
    leaving.look(0.0, first)
    leaving.look(60.0, None)
    leaving.look(60.0 + worker.ORPHAN_TIME, None)
    assert not leaving.ended
    leaving.look(63.0, second)
    leaving.look(90.0, None)
    assert not leaving.ended
    leaving.look(90.5 + worker.ORPHAN_TIME, None)
    assert leaving.ended


def test_a_process_sees_that_its_dispatcher_is_dead_though_no_slot_is_free_to(monkeypatch):
    """In gevent mode the slots tell that a channel has ended, if one of them reads it."""
    leaving = Leaving(monkeypatch)
    channel = ProcessEnd(*pair())
    leaving.look(0.0, channel)
    leaving.process._dead = channel.sock
    leaving.look(60.0, channel)
    assert not leaving.ended
    leaving.look(60.5 + worker.ORPHAN_TIME, channel)
    assert leaving.ended


def test_a_process_that_is_sent_term_says_so_once_the_master_could_have_said_that_all_stop(
    monkeypatch,
):
    """As what ends a control group does; dismissed before, it would not be there for what waits."""
    leaving = Leaving(monkeypatch)
    leaving.process._asked = True
    ours, theirs = pair()
    channel = ProcessEnd(ours, ours)
    for now in (10.0, 10.0 + worker.ASKED - 0.01):
        leaving.look(now, channel)
        with pytest.raises(BlockingIOError):
            theirs.recv(100, socket.MSG_DONTWAIT)
    leaving.look(10.0 + worker.ASKED, channel)
    assert theirs.recv(100, socket.MSG_DONTWAIT) == LEAVING


def test_a_process_says_that_it_wants_to_leave_until_it_could(monkeypatch):
    leaving = Leaving(monkeypatch)
    ours, theirs = pair()
    channel = ProcessEnd(ours, ours)
    filling = 0
    with suppress(BlockingIOError):
        while True:
            ours.send(b"", socket.MSG_DONTWAIT)
            filling += 1
    for now in (0.0, 1.0):
        leaving.look(now, channel)
    for _ in range(filling):
        theirs.recv(1)
    for now in (2.0, 3.0):
        leaving.look(now, channel)
    assert theirs.recv(100, socket.MSG_DONTWAIT) == LEAVING
    with pytest.raises(BlockingIOError):  # it is said once
        theirs.recv(100, socket.MSG_DONTWAIT)


@pytest.mark.parametrize("mode", ["thread", "gevent"])
def test_a_dismissed_process_knows_its_dispatcher_though_slots_read_the_end_of_the_channel(mode):
    """It has something to say yet: that a request is overdue. `dismissed` has shut the channel."""
    kind = thread_worker.ThreadWorker if mode == "thread" else gevent_worker.GeventWorker
    process: Any = object.__new__(kind)
    channel = ProcessEnd(*pair())
    process.__dict__.update(_change=threading.Condition(), _channel=channel, serving=False)
    process.lost(channel)
    assert process._channel is channel
    process.serving = True
    process.lost(channel)
    assert process._channel is None


class Broken:
    """A slot into which the app raises, later than its request."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def run(self) -> None:
        raise self._error

    join = run


@pytest.mark.parametrize("error", [SystemExit(), gevent.Timeout(), ValueError()])
@pytest.mark.parametrize("mode", ["thread", "gevent"])
def test_a_process_whose_slot_has_failed_wants_to_leave(mode, error):
    kind = thread_worker.ThreadWorker if mode == "thread" else gevent_worker.GeventWorker
    process: Any = object.__new__(kind)
    process.__dict__.update(
        _change=threading.Condition(), alive=True, log=logging.getLogger(),
        _wake_attendant=lambda: None,
    )  # fmt: skip
    slots = process._slots = [Broken(error), Broken(error)]
    running: Any = (
        threading.Thread(target=process._run_slot, args=slots[:1])
        if mode == "thread"
        else gevent.Greenlet(process._run_slot, slots[0])
    )
    running.start()
    running.join()
    assert (len(process._slots), process.alive) == (1, False)


def test_a_process_that_serves_no_more_tells_how_many_slots_have_neither_ended_nor_said_free():
    """Of a new dispatcher's point of view: they may be busy with requests of the one before."""
    process: Any = object.__new__(worker.ReplicaWorker)
    ours, theirs = pair()
    before, channel = object(), ProcessEnd(ours, ours)
    ended, waiting, *busy = (SimpleNamespace(free_on=before) for _ in range(4))
    process.__dict__.update(
        _channel=None, _owed_told=None, _slots=[ended, waiting, *busy],
        age=1, cfg=SimpleNamespace(threads=4), _extra=0, _leaving_since=None, serving=False,
    )  # fmt: skip

    def told() -> list[int]:
        process._tell_owed()
        with suppress(BlockingIOError):
            report = decode_report(theirs.recv(100, socket.MSG_DONTWAIT), [])
            return [report.kind, report.request]
        return []

    assert process._describe(False).owed == 0
    assert process._describe(True).owed == 4
    process._slots.remove(ended)  # behind the offer, and before there is a channel
    assert told() == []
    process._channel = channel
    assert told() == [Kind.OWED, 3]
    waiting.free_on = channel
    assert told() == [Kind.OWED, 2]
    process._slots.remove(waiting)
    assert told() == []
    process._slots.remove(busy[0])
    assert told() == [Kind.OWED, 1]
    assert told() == []
    ours.close()
    theirs.close()


class Stubborn:
    """A slot whose descriptors the app has closed."""

    def forget(self) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def test_a_child_that_cannot_part_from_its_parent_has_no_signals_blocked():
    process: Any = object.__new__(thread_worker.ThreadWorker)
    process.__dict__.update(
        _forking=threading.local(), _channel=None, _nowhere=None, _slots=[Stubborn()]
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    wakeup = signal.set_wakeup_fd(-1)
    process._hold_signals()
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            process._part_from_parent()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.set_wakeup_fd(wakeup)
