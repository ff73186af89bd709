"""What a slot leaves to the dispatcher, and what the dispatcher takes for it."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Any

import pytest

from replica_plugin.channel import FREE, Kind, Report, decode_report
from replica_plugin.connection import Connection
from replica_plugin.endings import Endings
from replica_plugin.rest import Rest


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_what_was_taken_down_is_sent_as_far_as_the_client_takes_it():
    here, there = socket.socketpair()
    content = os.urandom(1 << 22)
    rest = Rest.of(content[:1000], memoryview(content)[1000:])
    assert rest.left == len(content)
    assert rest.send(here) is False
    assert 0 < rest.sent < len(content)
    taken = bytearray()
    while len(taken) < len(content):
        taken += there.recv(1 << 20)
        rest.send(here)
    assert (rest.left, taken) == (0, content)
    for each in (rest, here, there):
        each.close()


def test_one_turn_sends_no_more_than_its_share(monkeypatch):
    monkeypatch.setattr("replica_plugin.rest.PIECE", 10)
    here, there = socket.socketpair()
    rest = Rest.of(b"x" * 1000)
    assert rest.send(here) is True
    assert rest.sent == 160
    for each in (rest, here, there):
        each.close()


@pytest.mark.parametrize("kind", ["unsealed", "pipe", "file"])
def test_what_is_no_sealed_memory_is_refused_and_closed(kind, tmp_path):
    if kind == "unsealed":
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    elif kind == "pipe":
        fd, other = os.pipe()
        os.close(other)
    else:
        fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    with pytest.raises(ValueError, match="no sealed memory"):
        Rest(fd)
    assert not is_open(fd)


def test_descriptors_that_come_with_a_report_that_needs_none_are_closed_and_it_is_nonsense():
    rest = Rest.of(b"x")
    with pytest.raises(ValueError):
        decode_report(FREE, [rest.fd])
    assert not is_open(rest.fd)
    unannounced = Rest.of(b"x")
    with pytest.raises(ValueError, match="a descriptor too many"):
        decode_report(Report(Kind.DONE, 1).encode(), [unannounced.fd])
    assert not is_open(unannounced.fd)
    first, second = Rest.of(b"x"), Rest.of(b"y")
    with pytest.raises(ValueError, match="a descriptor too many"):
        decode_report(Report(Kind.DONE, 1, rest=first).encode(), [first.fd, second.fd])
    assert not is_open(first.fd)
    assert not is_open(second.fd)


class Host:
    """As much of the clients' side as a rest needs."""

    def __init__(self) -> None:
        self.endings = Endings(self)

    def watch(self, conn: Connection, more: int = 0) -> None:
        pass

    def time(self, conn: Connection, deadlines: Any, now: float) -> None:
        pass

    def close(self, conn: Connection) -> None:
        self.endings.forget(conn)
        conn.sock.close()


def test_a_client_that_takes_a_part_and_leaves_takes_up_no_room_for_ever():
    host = Host()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        ours, address = listener.accept()
    conn = Connection(ours, address, address, False)
    host.endings.send(conn, Rest.of(bytes(12 << 20)), 0.0)
    while host.endings.due() == 0.0:
        host.endings.tick(0.0)
    with suppress(BlockingIOError):
        while client.recv(1 << 20, socket.MSG_DONTWAIT):
            pass
    client.close()
    while conn.rest is not None:
        host.endings.on_event(conn, 0.0)
    assert host.endings.unsent == 0
