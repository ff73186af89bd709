"""How a process offers itself to a dispatcher, when that is not possible at once."""

from __future__ import annotations

import errno
import logging
import os
import socket
from types import SimpleNamespace
from typing import Any

from server import wait_for
from stage import PATIENCE

from replica_plugin import registration
from replica_plugin.cells import Cells
from replica_plugin.channel import WELCOME, Job, Register, close_all, receive_control, send
from replica_plugin.deck import Deck, take
from replica_plugin.registration import Registration
from replica_plugin.slot import Slot

OFFER = Register(1, 1, 1, False, False)


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
