"""More than can be served, of requests and of what the kernel has: refused, and then it goes on."""

from __future__ import annotations

import errno
import os
import re
import select
import shutil
import socket
import subprocess
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from server import IN_BOTH_MODES, Server
from stage import PATIENCE

from replica_plugin import listeners
from replica_plugin.cells import Cells
from replica_plugin.channel import Job, pair
from replica_plugin.connection import Connection
from replica_plugin.listeners import ACCEPTS, PAUSE, Listener, Listeners
from replica_plugin.processes import _SHORTAGE, Link, Processes

FULL = {"processes_per_replica": 1, "threads_per_process": 1, "max_replica_concurrency": 2}
needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")


# Thousands of refusals a second.


def flood(server: Server, *arguments: str) -> tuple[int, int]:
    """Thousands of requests, as fast as they are answered: how many were, and how many refused."""
    host, port = server.address
    line = ["wrk", "-t1", "-c64", "-d2s", *arguments, f"http://{host}:{port}/hello"]
    run = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE, check=True)
    answered = int(re.search(r"(\d+) requests in", run.stdout)[1])
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", run.stdout)
    assert "Socket errors" not in run.stdout, run.stdout
    return answered, int(refused[1]) if refused else 0


@IN_BOTH_MODES
@needs_wrk
@pytest.mark.slow
@pytest.mark.parametrize("kept", [(), ("-H", "Connection: close")], ids=["kept", "new"])
def test_whatever_comes_too_much_is_refused_and_what_was_admitted_is_served(start, kept):
    server = start(config=FULL)
    dispatcher = server.dispatcher
    clients = [server.connect().ask("/hold/x") for _ in range(2)]
    actor = start.stage.next()
    server.wait_numbers(running=1, waiting=1)
    answered, refused = flood(server, *kept)
    assert answered == refused > 100
    assert server.get("/-/readyz").status == 200
    actor.finish()
    start.stage.next().finish()
    assert [client.reply().status for client in clients] == [200] * 2
    assert server.get("/hello").status == 200
    assert server.dispatcher == dispatcher
    server.wait_numbers(running=0, waiting=0)


# What the kernel has not got.


class Poor(Listener):
    """A listening socket for whose connections there is no memory, as often as said."""

    def __init__(self, sock: socket.socket, times: int, error: int) -> None:
        super().__init__(sock)
        self.times, self.error = times, error

    def accept(self) -> Connection:
        self.times -= 1
        if self.times >= 0:
            raise OSError(self.error, os.strerror(self.error))
        return super().accept()


@pytest.mark.parametrize("most", [1, ACCEPTS])
@pytest.mark.parametrize("error", listeners._SHORTAGE)
def test_what_the_kernel_has_no_memory_for_waits_in_the_backlog_for_a_moment(error, most):
    with socket.create_server(("127.0.0.1", 0)) as sock, select.epoll() as epoll:
        sock.setblocking(False)
        fd, found = sock.fileno(), Listeners(epoll, [Poor(sock, 1, error)])
        with socket.create_connection(sock.getsockname()):
            assert [fd for fd, _ in epoll.poll(PATIENCE)] == [fd]
            assert list(found.accept(fd, 1.0, most)) == [None]
            assert found.is_short and epoll.poll(0) == []
            found.tick(1.0 + PAUSE)
            assert [fd for fd, _ in epoll.poll(PATIENCE)] == [fd]
            conn, *nothing = found.accept(fd, 1.0 + PAUSE, most)
            assert (nothing, found.is_short) == ([None] * (most > 1), False)
            conn.sock.close()


def test_a_stop_during_such_a_moment_waits_for_its_end_before_it_listens_again():
    """An event that nothing is done about would keep the loop spinning."""
    with socket.create_server(("127.0.0.1", 0)) as sock, select.epoll() as epoll:
        sock.setblocking(False)
        fd, found = sock.fileno(), Listeners(epoll, [Poor(sock, 2, errno.ENOBUFS)])
        with socket.create_connection(sock.getsockname()):
            assert epoll.poll(PATIENCE)
            assert list(found.accept(fd, 1.0)) == [None]
            found.accept_if(True)
            assert epoll.poll(0) == []
            found.tick(1.0 + PAUSE)
            assert epoll.poll(0)


def test_connections_that_come_as_others_end_never_take_what_is_left_to_others(monkeypatch):
    """But for one: only such a connection tells that all others are taken."""
    with socket.create_server(("127.0.0.1", 0)) as sock, select.epoll() as epoll:
        sock.setblocking(False)
        fd, found = sock.fileno(), Listeners(epoll, [Listener(sock)])
        clients = [socket.create_connection(sock.getsockname()) for _ in range(30)]
        free = [os.dup(fd) for _ in range(10)]
        for each in free:
            os.close(each)
        most = max(free) + 1
        monkeypatch.setattr(found, "_most", most)
        held: deque[Connection] = deque()
        for now in range(15):
            held.extend(filter(None, found.accept(fd, now)))
            assert sum(conn.fd >= most for conn in held) <= 1
            held.popleft().sock.close()
            found.tick(now + PAUSE)
        assert len(held) >= 10
        for each in (*held, *clients):
            getattr(each, "sock", each).close()


class Office:
    """Writes down which processes can be sent to again."""

    def __init__(self) -> None:
        self.sendable: list[int] = []

    def on_sendable(self, link: Link, now: float) -> None:
        self.sendable.append(link.age)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


class Full:
    """A channel to which nothing can be sent, for want of something."""

    def __init__(self, sock: socket.socket, error: int) -> None:
        self.sock, self.error = sock, error

    def sendmsg(self, *arguments: Any) -> int:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return self.sock.sendmsg(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)


@pytest.fixture
def epoll() -> Iterator[select.epoll]:
    with select.epoll() as epoll:
        yield epoll


@pytest.mark.parametrize("error", [errno.EAGAIN, *_SHORTAGE])
def test_a_job_for_which_the_kernel_has_no_room_goes_back_and_is_sent_when_there_is(epoll, error):
    (ours, theirs), (reading, writing) = pair(), socket.socketpair()
    office, cells = Office(), Cells(1)
    processes = Processes(epoll, reading, office)
    channel = Full(ours, error)
    processes._know(Link(1, 0, 1, 0, channel, cells, os.pidfd_open(os.getpid())))
    job = Job(1, 1, "", "", b"", b"", False, 0.0, 1.0)
    assert not processes.send(1, job, 0)
    channel.error = 0
    if error in _SHORTAGE:
        assert epoll.poll(0) == []  # it has room all the time
        processes.watch(1.0)
    else:
        for fd, mask in epoll.poll(PATIENCE):
            processes.on_channel(processes.by_channel[fd], mask, 1.0)
    assert office.sendable == [1]
    assert processes.send(1, job, 0)
    assert theirs.recv(1 << 16)
    for each in (ours, theirs, reading, writing):
        each.close()
    os.close(cells.fd)
