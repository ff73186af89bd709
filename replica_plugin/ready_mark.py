"""How one of two masters (USR2) knows whether the other's replica is ready.

They share listening sockets and can ask each other nothing; what one has written down (pages.py)
the other, which may be of another version, cannot read. So, beside another, a master has one more
descriptor as long as its replica is ready, whose name the other finds. With the pid in it, since
what has just been forked still has its parent's. Where nobody may look, nobody counts as ready.
"""

from __future__ import annotations

import os
from contextlib import suppress

NAME = "replica-ready-{}"


class ReadyMark:
    """What a master shows the other."""

    def __init__(self) -> None:
        self._fd = -1

    def show(self, ready: bool) -> None:
        if ready and self._fd < 0:
            with suppress(OSError):  # no descriptor; perhaps in a moment
                self._fd = os.memfd_create(NAME.format(os.getpid()), os.MFD_CLOEXEC)
        elif not ready and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_shown(pid: int) -> bool:
    """Whether this master shows that its replica is ready."""
    try:
        links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    return f"/memfd:{NAME.format(pid)} (deleted)" in links
