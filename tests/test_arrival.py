"""What the dispatcher sees of a connection, on sockets that do what is rare."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from replica_plugin.arrival import PEEK, Arrivals, Sight
from replica_plugin.channel import LARGEST
from replica_plugin.chunks import Chunks
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


class Impatient(socket.socket):
    """A socket that is asked once for what does not come any more."""

    ended = False

    def recv_into(self, *arguments: Any) -> int:
        assert not self.ended, "it would be asked for ever"
        size = super().recv_into(*arguments)
        self.ended = not size
        return size


def test_what_was_seen_and_somebody_else_has_read_is_not_waited_for_when_the_client_has_left():
    """A child that the app has forked may hold a duplicate of the connection."""
    ours, client = socket.socketpair()
    with Impatient(fileno=ours.detach()) as ours, client, ours.dup() as childs:
        client.send(b"x" * 10)
        conn, arrivals = Connection(ours, "", "", local=True), Arrivals(Serving())
        assert arrivals.look(conn) == Sight.PART
        assert childs.recv(10)
        with pytest.raises(BlockingIOError):
            arrivals.take(conn, conn.arrived)
        client.close()
        with pytest.raises(ConnectionError, match="somebody else has taken them"):
            arrivals.take(conn, conn.arrived)


class Counting(socket.socket):
    """A socket that counts what is looked at."""

    looked_at = 0

    def recv_into(self, *arguments: Any) -> int:
        size = super().recv_into(*arguments)
        self.looked_at += size
        return size


def test_of_many_requests_that_lie_there_each_look_copies_no_more_than_of_the_first_ever():
    """Though another client's chunked body has been looked at as a whole before."""
    body, plain = b"x" * (PEEK * 8), b"GET / HTTP/1.1\r\n\r\n"
    chunked = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s" % (len(body), body)
    arrivals = Arrivals(Serving())
    for data, most in ((chunked, 1 << 20), (plain * 6000, PEEK)):
        ours, client = socket.socketpair()
        with Counting(fileno=ours.detach()) as ours, client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            client.sendall(data)
            arrivals.look(Connection(ours, "", "", local=True))
            assert ours.looked_at <= most


def test_a_chunk_is_awaited_whose_size_has_as_many_digits_as_any():
    chunks = Chunks(0)
    assert not chunks.end_is_seen(b"f" * 16 + b";a=b\r\nx")
    assert chunks.needed > 1 << 63
    assert Chunks(0).end_is_seen(b"0" * 15 + b"1\r\nx\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "digits", [b"f" * 17, b"0" * 16 + b"1", b"f" * 60_000], ids=["large", "padded", "huge"]
)
def test_a_chunk_is_left_to_the_parser_whose_size_has_more_digits(digits):
    """It costs no memory: no number is made of them."""
    chunks = Chunks(0)
    data = digits + b"\r\nx"
    assert chunks.end_is_seen(data)
    assert chunks.needed == len(data) + 1
