"""How a process offers itself to a dispatcher, when that is not possible at once."""

from __future__ import annotations

import errno
import logging
import os
import socket

from server import wait_for

from replica_plugin import registration
from replica_plugin.cells import Cells
from replica_plugin.channel import Register, close_all, receive_control
from replica_plugin.registration import Registration

OFFER = Register(1, 1, 1, False, False)


def no_descriptors() -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_process_without_descriptors_offers_itself_when_it_has_some_again(monkeypatch):
    control, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    cells = Cells(1)
    with control, writing:
        offering = Registration(
            writing,
            cells.fd,
            logging.getLogger(),
            lambda again: OFFER,
            lambda _: None,
            lambda _: None,
        )

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
