"""What the dispatcher sees of a connection, on sockets that do what is rare."""

from __future__ import annotations

import socket

from replica_plugin.arrival import Arrivals, Sight
from replica_plugin.channel import LARGEST
from replica_plugin.connection import Connection
from replica_plugin.rules import Serving


def test_a_client_that_reset_while_its_half_head_is_taken_is_gone_at_the_next_look():
    ours, client = socket.socketpair()
    with ours, client:
        ours.sendall(b"an answer it does not read")
        conn, arrivals = Connection(ours, "", "", local=True), Arrivals(Serving())
        client.close()
        assert arrivals.take_ahead(conn)
        assert conn.ahead == b""
        assert arrivals.look(conn) == Sight.LEFT


def test_of_a_half_head_no_more_is_taken_than_fits_into_a_job_with_what_its_process_said():
    ours, client = socket.socketpair()
    with ours, client:
        client.setblocking(False)
        client.send(b"x" * LARGEST)
        conn, arrivals = Connection(ours, "", "", local=True), Arrivals(Serving())
        conn.carry = b"c" * (LARGEST // 2 - 10)
        assert arrivals.take_ahead(conn)
        assert conn.ahead == b"x" * 10
        assert not arrivals.take_ahead(conn)
