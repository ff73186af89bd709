"""What a client has not taken yet of a response that is complete: on its way out of a slot.

    slot: writes what the client takes; leaves the rest in a memfd, and says so; closes the body
    dispatcher: sends the rest as the client takes it, with a deadline for each pause

1. The memfd is sealed before it travels, and the seals are looked at when it comes: so it is
   memory (reading it never waits), and nobody can make it shorter while it is being sent. It is
   as much memory as it says: what counts towards response_buffer_total costs its process as much.
2. Progress is what the client takes, not what the kernel does: that reports room in a socket's
   buffer only when a third of it is free, which with 4 MiB can take a slow client minutes. So
   whoever finds no room looks at `queued` before it gives a client up.
3. The dispatcher never waits for a client: it sends with MSG_DONTWAIT. sendfile() has no such
   flag, and O_NONBLOCK would be shared with a slot; so the bytes are copied once.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import termios

PIECE = 1 << 18  # bytes read and offered to the kernel at a time
PIECES = 16  # in one turn, before others have theirs
BLOCK = 512  # bytes; what st_blocks counts
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
NOW = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)  # an IntFlag takes a microsecond for each `|`


def queued(sock: socket.socket) -> int:
    """How many bytes lie in the kernel that the client has not taken yet; 0 if a process has made a
    listener of it."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    except OSError:
        return 0
    return count[0]


class Rest:
    """A sealed piece of memory, and how much of it has been sent."""

    def __init__(self, fd: int) -> None:
        """Of a descriptor that came from a process, which is closed with `close`.

        Raises ValueError if it is not what it should be, and closes it.
        """
        self.fd = fd
        self.sent = 0
        status = os.fstat(fd)
        self.size = status.st_size
        if not _is_sealed(fd) or status.st_blocks * BLOCK < self.size:
            os.close(fd)
            raise ValueError("no sealed memory")

    @classmethod
    def of(cls, *parts: bytes | memoryview) -> Rest:
        """Take down what these parts hold. Raises OSError when memory or descriptors are short."""
        fd = os.memfd_create("replica-rest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            for part in parts:
                _write(fd, memoryview(part))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(fd)
            raise
        return cls(fd)

    @property
    def left(self) -> int:
        """How many bytes are still to be sent."""
        return self.size - self.sent

    def send(self, sock: socket.socket) -> bool:
        """Send what the client takes now; whether it may take more at once. Raises OSError."""
        for _ in range(PIECES):
            piece = os.pread(self.fd, PIECE, self.sent)
            if not piece:
                return True
            try:
                sent = sock.send(piece, NOW)
            except BlockingIOError:
                return False
            self.sent += sent
        return True

    def close(self) -> None:
        os.close(self.fd)


def _is_sealed(fd: int) -> bool:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:  # a file, a pipe, a socket
        return False


def _write(fd: int, part: memoryview) -> None:
    while part:
        part = part[os.write(fd, part) :]
