"""What a slot writes to its client."""

from __future__ import annotations

import socket

import pytest

from replica_plugin.client_socket import ClientSocket, InterruptedWriteError


class Interrupted(ClientSocket):
    """An exception of the attendant's, or a timeout of the app's, ends the wait for the client."""

    def _send_some(self, data: memoryview, flags: int) -> int:
        raise KeyboardInterrupt


def test_nothing_follows_a_write_that_was_interrupted():
    theirs, ours = socket.socketpair()
    sock = Interrupted(
        ours.family, socket.SOCK_STREAM, ours.detach(), claim=lambda: True, room=lambda: 0
    )
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
