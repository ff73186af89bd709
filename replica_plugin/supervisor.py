"""The supervisor: starts the dispatcher, and starts it again if it dies or hangs.

1. There are never two dispatchers: each holds the lock of the replica's page while it lives.
2. A supervisor that finds one at its start, because its predecessor died, watches over that.

A process of its own, started by the master with exec, so that it holds nothing of the app
even with preload_app. It imports everything once and then forks dispatchers, which makes a
restart a matter of milliseconds. It holds what has to outlive a dispatcher: listeners, the
control socket, the pages.

It ends when its dispatcher ends well (after a stop). It ignores the signals that reach a
whole process group: the master tells through its page what it wants.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gunicorn import util

from .dispatcher import Dispatcher, Frame
from .heritage import is_dead
from .journal import Journal
from .listeners import Listening
from .pages import MasterPage, ReplicaPage
from .rules import Wishes, decode_wishes
from .scheduling import may_choose

TURN = 1.0  # seconds between two looks at the heartbeat
HUNG = 5.0  # seconds without a heartbeat after which a dispatcher counts as hung
SHORT_LIFE = 1.0  # seconds; a dispatcher that fails sooner is not restarted at once
PAUSE = 1.0  # seconds before such a restart

IGNORED = ("HUP", "INT", "QUIT", "TERM", "TTIN", "TTOU", "USR1", "USR2", "WINCH")


@dataclass(frozen=True)
class Inheritance:
    """The descriptors, and the master's pid, that the supervisor is started with."""

    listeners: list[int]
    control: int
    master_page: int
    replica_page: int
    dispatcher_nudge: int
    supervisor_nudge: int
    master_pidfd: int
    master_pid: int

    def fds(self) -> list[int]:
        """All of them, for the `pass_fds` of the one who starts it."""
        return [
            *self.listeners, self.control, self.master_page, self.replica_page,
            self.dispatcher_nudge, self.supervisor_nudge, self.master_pidfd,
        ]  # fmt: skip


def main(inherited: dict[str, Any]) -> None:
    """The supervisor's whole life. Exits 0 after a stop, 1 if the master is gone too early."""
    for name in IGNORED:
        signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)
    inheritance = Inheritance(**inherited)
    for fd in inheritance.fds():
        os.set_inheritable(fd, False)
    page = MasterPage(inheritance.master_page)
    state = page.read()
    if state is None:
        sys.exit(1)
    wishes = decode_wishes(state)
    journal = Journal(wishes.logging)
    _settle(wishes)
    Supervisor(inheritance, page, wishes, journal).run()


def _settle(wishes: Wishes) -> None:
    """Give up privileges as gunicorn's workers do, and take all the descriptors we may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # where fs.nr_open has been lowered meanwhile
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    privileges = wishes.privileges
    util.set_owner_process(privileges.uid, privileges.gid, initgroups=privileges.initgroups)


class Supervisor:
    """One dispatcher at a time, for as long as the master lives."""

    def __init__(
        self, inheritance: Inheritance, page: MasterPage, wishes: Wishes, journal: Journal
    ) -> None:
        self._inheritance = inheritance
        self._page = page
        self._wishes = wishes
        self._journal = journal
        self._replica_page = ReplicaPage(inheritance.replica_page)
        self._listeners = [Listening(fileno=fd) for fd in inheritance.listeners]
        self._control = socket.socket(fileno=inheritance.control)
        self._poll = select.poll()
        self._poll.register(inheritance.supervisor_nudge, select.POLLIN)
        self._poll.register(inheritance.master_pidfd, select.POLLIN)
        self._pid = 0
        self._pidfd = -1
        self._born = 0.0
        self._watched = 0.0
        self._may_choose = False

    def run(self) -> None:
        gc.collect()
        gc.freeze()
        self._may_choose = may_choose()
        self._start()
        while True:
            ready = {fd for fd, _ in self._poll.poll(int(TURN * 1000))}
            if self._inheritance.supervisor_nudge in ready:
                self._on_nudge()
            if self._inheritance.master_pidfd in ready:
                self._on_master_death()
            if self._pidfd in ready:
                self._on_death()
            else:
                self._watch()

    def _start(self) -> None:
        """Watch over the dispatcher that lives, or a new one; end if the last one ended well."""
        if self._replica_page.read().beat == math.inf:
            sys.exit(0)
        util._setproctitle("replica supervisor")
        while True:
            try:
                self._pid, self._pidfd = self._find_living() or self._fork()
                break
            except OSError as error:  # no memory, processes or descriptors for now
                self._journal.error("No dispatcher can be started: %s", error.strerror)
                time.sleep(PAUSE)
                self._read_page()
                if self._wishes.stop is not None or is_dead(self._inheritance.master_pidfd):
                    sys.exit(1)
        self._born = self._watched = time.monotonic()
        self._poll.register(self._pidfd, select.POLLIN)

    def _find_living(self) -> tuple[int, int] | None:
        living = self._replica_page.find_living()
        if living:
            self._journal.info("Watching over the dispatcher (pid %d) that is there", living[0])
        return living

    def _fork(self) -> tuple[int, int]:
        """Start a dispatcher: its pid and pidfd. The child never returns from here."""
        self._beat()
        pid = os.fork()
        if not pid:
            self._become_dispatcher()
        return pid, os.pidfd_open(pid)

    def _become_dispatcher(self) -> None:
        status = 1
        try:
            util._setproctitle("replica dispatcher")
            if self._replica_page.claim():
                Dispatcher(self._frame(), self._wishes, self._journal).run()
                status = 0
        except BaseException:
            self._journal.exception("The dispatcher failed")
        finally:
            os._exit(status)

    def _frame(self) -> Frame:
        inheritance = self._inheritance
        return Frame(
            tuple(self._listeners),
            self._control,
            self._page,
            self._replica_page,
            inheritance.dispatcher_nudge,
            inheritance.master_pidfd,
            inheritance.master_pid,
            self._may_choose,
        )

    def _beat(self) -> None:
        """A dispatcher that is being born has the time that a hung one has."""
        self._replica_page.write(self._replica_page.read()._replace(beat=time.monotonic()))

    def _watch(self) -> None:
        """Kill a dispatcher that hangs; not if we have been hanging ourselves."""
        now = time.monotonic()
        slept, self._watched = now - self._watched, now
        if slept < 2 * TURN and now - self._replica_page.read().beat > HUNG:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._journal.error("The dispatcher (pid %d) hangs: killing it", self._pid)

    def _on_death(self) -> None:
        """The dispatcher has ended: well, and so do we, or not, and there is another."""
        code = self._reap()
        self._poll.unregister(self._pidfd)
        os.close(self._pidfd)
        if self._replica_page.read().beat != math.inf:
            if is_dead(self._inheritance.master_pidfd):
                sys.exit(1)
            self._journal.error("The dispatcher (pid %d) died (%s): restarting it", self._pid, code)
            if code > 0 and time.monotonic() - self._born < SHORT_LIFE:
                time.sleep(PAUSE)
        self._read_page()
        self._start()

    def _reap(self) -> int:
        """Its exit code; 0 if it was a child of the supervisor before us, and nobody knows."""
        try:
            _, status = os.waitpid(self._pid, 0)
        except ChildProcessError:
            return 0
        return os.waitstatus_to_exitcode(status)

    def _on_nudge(self) -> None:
        os.eventfd_read(self._inheritance.supervisor_nudge)
        self._read_page()

    def _read_page(self) -> None:
        """The next dispatcher starts from what the master wants now."""
        state = self._page.read()
        if state is None:
            return
        wishes = decode_wishes(state)
        if wishes.reopen != self._wishes.reopen:
            self._journal.reopen()
        if wishes.logging != self._wishes.logging:
            self._journal.setup(wishes.logging)
        if wishes.stop is not None:
            self._close_listeners()
        self._wishes = wishes

    def _close_listeners(self) -> None:
        """A listener is closed only when nobody holds it."""
        while self._listeners:
            self._listeners.pop().close()

    def _on_master_death(self) -> None:
        """The dispatcher knows too, finishes, and ends; nothing is restarted after that."""
        self._poll.unregister(self._inheritance.master_pidfd)
        self._close_listeners()
