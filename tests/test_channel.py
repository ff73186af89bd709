"""What comes through a channel: when its other end is gone, and beside a message."""

from __future__ import annotations

import errno
import socket

import pytest

from replica_plugin.channel import FREE, LEAVE, ProcessEnd, pair, receive_now, send


def test_what_was_said_before_the_end_is_read_though_not_all_had_been_heard():
    ours, theirs = pair()
    with ours:
        ours.send(LEAVE)
        theirs.send(FREE)
        theirs.close()
        assert [receive_now(ours) for _ in range(2)] == [(FREE, []), (b"", [])]


def test_what_else_the_kernel_says_beside_a_message_is_no_descriptor():
    """A process shares the sockets that it gives and is given, and may set their options."""
    for ours, theirs in (pair(), reversed(pair())):
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            send(theirs, FREE)
            assert receive_now(ours) == (FREE, [])


class Poor(socket.socket):
    """A socket for whose messages there is no memory, twice; then its other end is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.errors = [errno.ENOBUFS, errno.ENOMEM, errno.EPIPE]

    def send(self, data: bytes, flags: int = 0) -> int:
        error = self.errors.pop(0)
        raise OSError(error, "")


def test_a_report_waits_while_there_is_no_memory_for_it():
    """Else the slot would take its dispatcher for dead, and its credit would be lost."""
    sock = Poor()
    with sock, pytest.raises(BrokenPipeError):
        ProcessEnd(sock, sock).tell(FREE)
    assert not sock.errors
