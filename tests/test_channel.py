"""What comes through a channel: when its other end is gone, and beside a message."""

from __future__ import annotations

import socket

from replica_plugin.channel import FREE, LEAVE, pair, receive_now, send


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
