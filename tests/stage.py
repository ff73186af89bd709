"""A stage for requests: tests see each one begin, in order, and say when it ends.

The served app (served_app.py) connects to the stage's Unix socket when a request to
`/hold/NAME` begins, tells who it is, and goes on when it gets a byte back. So tests wait
for states and never for time.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 20.0
"""Seconds after which a wait fails its test. Long, since it only ever fails tests."""


@dataclass
class Actor:
    """A request that has begun, and is held until `finish`."""

    name: str
    pid: int
    thread: int
    main: bool
    waited: str
    _link: socket.socket

    def finish(self) -> None:
        self._link.sendall(b"x")
        self._link.close()

    def vanished(self) -> bool:
        """Wait until the process that ran it is gone (or has let go of it)."""
        self._link.settimeout(PATIENCE)
        return self._link.recv(1) == b""


class Stage:
    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "stage")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(2048)

    def next(self, timeout: float = PATIENCE) -> Actor:
        """The next request that begins; not one whose process died before it told who it is."""
        deadline = time.monotonic() + timeout
        while True:
            self._listener.settimeout(max(deadline - time.monotonic(), 0.001))
            link, _ = self._listener.accept()
            link.settimeout(PATIENCE)
            with link.makefile("rb") as file:
                line = file.readline()
            if line.endswith(b"\n"):
                return Actor(**json.loads(line), _link=link)
            link.close()

    def take(self, count: int) -> list[Actor]:
        """The next so many requests that begin."""
        return [self.next() for _ in range(count)]

    def is_empty(self) -> bool:
        """Whether no request has begun that was not taken. Ask only in a settled state."""
        self._listener.setblocking(False)
        try:
            link, _ = self._listener.accept()
        except BlockingIOError:
            return True
        link.close()
        return False

    def close(self) -> None:
        self._listener.close()
