"""What the dispatcher sees of a connection, on sockets that do what is rare."""

from __future__ import annotations

import socket

from replica_plugin.arrival import Arrivals, Sight
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
