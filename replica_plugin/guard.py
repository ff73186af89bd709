"""The supervisor, as its dispatcher sees it: who would replace us, and whether it lives.

The master says on its page which one it has started. It may be another than the one that
forked us: if that died, the master starts one that watches over us.
"""

from __future__ import annotations

import os
import select

from .heritage import open_child


class Guard:
    """The supervisor that the master has named last."""

    def __init__(self, epoll: select.epoll, master: int) -> None:
        self.pid = 0
        self._epoll = epoll
        self._master = master
        self._pidfd = -1

    def __contains__(self, fd: int) -> bool:
        return fd == self._pidfd

    def told(self, pid: int) -> bool:
        """The master names it; False if it is dead already."""
        if pid == self.pid:
            return True
        self.died()
        self.pid = pid
        pidfd = open_child(pid, self._master)
        if pidfd is None:
            return False
        self._pidfd = pidfd
        self._epoll.register(pidfd, select.EPOLLIN)
        return True

    def died(self) -> None:
        if self._pidfd >= 0:
            self._epoll.unregister(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
