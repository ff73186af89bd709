"""What a slot writes to its client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import gevent
import pytest

from replica_plugin.client_socket import ClientSocket, InterruptedWriteError
from replica_plugin.green import GreenClientSocket


class Interrupted(ClientSocket):
    """An exception of the attendant's, or a timeout of the app's, ends the wait for the client."""

    def _send_some(self, data: memoryview, flags: int) -> int:
        raise KeyboardInterrupt


def client_socket(
    family: int,
    fd: int,
    kind: type[ClientSocket] = ClientSocket,
    complete: Callable[[], None] = lambda: None,
    room: int = 0,
) -> ClientSocket:
    return kind(family, socket.SOCK_STREAM, fd, lambda: True, complete, room=lambda: room)


def test_that_a_response_is_complete_is_said_once_and_before_its_last_byte():
    theirs, ours = socket.socketpair()
    theirs.setblocking(False)
    said = []

    def complete() -> None:
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
        said.append(True)

    sock = client_socket(ours.family, ours.detach(), complete=complete)
    with theirs, sock:
        sock.sendall(b"head:")
        sock.finish()
        sock.sendall(b"body")
        sock.finish()
        assert theirs.recv(100) == b"head:body"
    assert said == [True]


ANSWERS_A_CLIENT_THAT_LEFT = """\
import signal, socket
from replica_plugin.client_socket import ClientSocket
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
theirs, ours = socket.socketpair()
theirs.close()
sock = ClientSocket(ours.family, ours.type, ours.detach(), lambda: True, lambda: None, lambda: 0)
sock.sendall(b"head:")
try:
    sock.sendall(b"body")
except BrokenPipeError:
    print("goes on")
"""


def test_a_client_that_left_does_not_end_a_process_whose_app_has_sigpipe_as_other_programs_do():
    command = [sys.executable, "-c", ANSWERS_A_CLIENT_THAT_LEFT]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "goes on\n")


def test_nothing_follows_a_write_that_was_interrupted():
    theirs, ours = socket.socketpair()
    sock = client_socket(ours.family, ours.detach(), Interrupted)
    with theirs, sock:
        sock.sendall(b"head:")
        with pytest.raises(KeyboardInterrupt):
            sock.sendall(b"x" * (1 << 24))
        for _ in range(2):
            with pytest.raises(InterruptedWriteError):
                sock.sendall(b"more")
        sock.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: theirs.recv(1 << 20), b""))
    assert received.startswith(b"head:x")
    assert set(received[5:]) == {ord("x")}


def test_a_timeout_that_the_app_gives_new_sockets_is_not_the_client_s():
    """gunicorn's own workers take it off, too. O_NONBLOCK would be set for all who hold it."""
    theirs, ours = socket.socketpair()
    family, fd = ours.family, ours.detach()
    socket.setdefaulttimeout(0.01)
    try:
        sock = client_socket(family, fd)
    finally:
        socket.setdefaulttimeout(None)
    with theirs, sock:
        assert sock.gettimeout() is None
        assert os.get_blocking(sock.fileno())


def test_a_file_comes_behind_its_head_also_when_the_head_had_no_room(tmp_path):
    """The client reads late, and the file is larger than what may be left to the dispatcher."""
    (tmp_path / "file").write_bytes(b"f" * 3000)
    theirs, ours = socket.socketpair()
    filled = 0
    with suppress(BlockingIOError):
        while True:
            filled += ours.send(b"x" * 1000, socket.MSG_DONTWAIT)
    sock = client_socket(ours.family, ours.detach(), room=1000)
    received: list[bytes] = []

    def read() -> None:
        while sum(map(len, received)) < filled + len("head:") + 3000:
            received.append(theirs.recv(1000))

    reader = threading.Thread(target=read)
    with theirs, sock, open(tmp_path / "file", "rb") as file:
        sock.finish()
        sock.sendall(b"head:")
        sock.flush()
        reader.start()
        assert sock.sendfile(file) == 3000
        sock.send_left()
        reader.join()
    assert b"".join(received)[filled:] == b"head:" + b"f" * 3000


def test_nothing_follows_a_rest_whose_sending_was_interrupted():
    theirs, ours = socket.socketpair()
    sock = client_socket(ours.family, ours.detach(), Interrupted, room=1 << 30)
    with theirs, sock:
        sock.finish()
        sock.sendall(b"x" * (1 << 24))
        sock.flush()
        with pytest.raises(KeyboardInterrupt):
            sock.send_left()
        assert isinstance(sock.trouble, InterruptedWriteError)


def test_in_gevent_mode_a_timeout_of_the_app_s_own_is_not_the_client_s():
    theirs, ours = socket.socketpair()
    sock = client_socket(ours.family, ours.detach(), GreenClientSocket)
    with theirs, sock:
        with (
            pytest.raises(TimeoutError, match="the app's"),
            gevent.Timeout(0.01, TimeoutError("the app's")),
        ):
            sock.recv(1)
        assert sock.trouble is None
