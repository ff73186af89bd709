"""What a dispatcher inherits: processes of its predecessor that have not come back yet.

Their slots may be busy with requests that nobody has counted. Until such a process
registers again, or dies, everything it has counts as busy, so that the cap holds; or as much as it
was running, if it was dismissed. Death is a pidfd here, too; and since pids come back, only a
living child of the master is believed, and who is hidden from us.
"""

from __future__ import annotations

import os
import select

from .pages import ReplicaPage

Row = tuple[int, int, int]
"""A process: its age, how many of its slots may be busy, its pid."""


class Heritage:
    """The processes in the table of the page, as the dispatcher before left it."""

    def __init__(self, epoll: select.epoll, page: ReplicaPage, parent: int) -> None:
        self._epoll = epoll
        self._missing: dict[int, Row] = {}
        for row in page.read_table():
            pidfd = open_child(row[2], parent)
            if pidfd is not None:
                self._missing[pidfd] = row
                epoll.register(pidfd, select.EPOLLIN)

    def __contains__(self, fd: int) -> bool:
        return fd in self._missing

    def rows(self) -> list[Row]:
        """Those still missing."""
        return list(self._missing.values())

    def died(self, pidfd: int) -> int:
        """One of them is dead; its age."""
        age = self._missing[pidfd][0]
        self.back(age)
        return age

    def back(self, age: int) -> None:
        """One of them is missing no more, if it was."""
        for pidfd in [fd for fd, row in self._missing.items() if row[0] == age]:
            del self._missing[pidfd]
            self._epoll.unregister(pidfd)
            os.close(pidfd)


def is_dead(pidfd: int, patience: float = 0.0) -> bool:
    """Whether the process has ended, or ends in so many seconds; what is no pidfd is dead, too."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(min(patience * 1000, 1 << 30)))  # an int of C's


def open_child(pid: int, parent: int) -> int | None:
    """A pidfd of a living child of this parent; None if the pid is nobody's or another's."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    if _parent(pid) in (parent, None) and not is_dead(pidfd):
        return pidfd
    os.close(pidfd)
    return None


def _parent(pid: int) -> int | None:
    """None if that is hidden from us (hidepid, for those who have given up root's privileges)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return None
