"""The master's part: what gunicorn's arbiter lends us, and what we tell the helpers.

The master runs no code of ours but these hooks, each of which writes what is wanted now to
the master's page and nudges whoever reads it. Nothing is sent that could be lost: a helper
that was not there reads the page when it comes.

gunicorn's arbiter is touched here and in hook.py, and nowhere else. Some of its methods hook.py
wraps on the instance, since no hook says what they do: `stop` (a stop is told, never inferred
from a worker that goes), `setup` (a reload brings a new configuration, into which our hooks go
again), `reload` (see hook.py), `spawn_worker` (a signal to a process just forked is not lost; one
that cannot be forked does not end the others), `manage_workers` (a supervisor that died is
replaced, and a process that did not load the app not at once), `reap_workers` (a stop comes to its
end, whatever processes end with), `kill_workers` (a stop is hurried with QUIT), `reexec` (another
master shares our sockets) and `handle_usr1` (logs are reopened).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import gunicorn
from gunicorn.config import Config
from gunicorn.errors import HaltServer

from . import journal, overtime, ready_file, ready_mark
from .channel import control_pair
from .config.settings import Settings
from .decisions import Rules
from .head import Limits
from .heritage import is_dead
from .loading import HALT, Pauses, fail
from .pages import LoadPage, MasterPage, ReplicaPage
from .rules import Privileges, Serving, Stop, Wishes
from .settled import refuses_at_once
from .supervisor import Inheritance

STARTER = (
    "import sys, json; inherited = json.loads(sys.argv[1]); "
    "sys.path += inherited.pop('path'); "
    "from replica_plugin.supervisor import main; main(inherited)"
)
"""What the supervisor runs, isolated: the working directory may hold a `queue.py`."""

# Isolation takes Python's variables away, of which this one is kept.
_FLAGS = ("-I", "-B") if sys.dont_write_bytecode else ("-I",)

LEAVE_TIME = 0.5  # seconds after graceful_timeout at which helpers that are still there are killed
SHORT_LIFE = 1.0  # seconds between two starts of a supervisor, at least
LARGEST_TOLD = 1 << 15  # bytes of a setting of gunicorn's, such as logconfig_dict
PAUSE = 0.1  # seconds between two looks at processes and signals during drain_delay


class Arbiter(Protocol):
    """What we use of gunicorn's arbiter."""

    cfg: Config
    log: Any
    pid: int
    num_workers: int
    worker_age: int
    worker_class: Any
    master_pid: int
    WORKERS: dict[int, Any]
    LISTENERS: list[Any]
    SIG_QUEUE: Any
    reexec_pid: int
    systemd: bool

    def stop(self, graceful: bool = True) -> None: ...
    def setup(self, app: Any) -> None: ...
    def reload(self) -> None: ...
    def reexec(self) -> None: ...
    def spawn_worker(self) -> Any: ...
    def reap_workers(self) -> None: ...
    def murder_workers(self) -> None: ...
    def manage_workers(self) -> None: ...
    def kill_worker(self, pid: int, sig: int) -> None: ...
    def kill_workers(self, sig: int) -> None: ...
    def handle_usr1(self) -> None: ...


class Master:
    """The replica, as the master holds it. There is one a master, from `when_ready` on."""

    def __init__(self, arbiter: Arbiter, settings: Settings) -> None:
        self.page = MasterPage()
        self.replica_page = ReplicaPage()
        self.load_page = LoadPage()
        self._pauses = Pauses(self.load_page)
        self.control, self.control_out = control_pair()  # processes write to the second
        self._arbiter = arbiter
        self._stop: Stop | None = None
        self._draining = False
        self._mark = ready_mark.ReadyMark()
        self._reopen = 0
        self._most_threads = 0
        self._told = 0
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self._nudges = (os.eventfd(0, flags), os.eventfd(0, flags))
        self._supervisor = 0
        self._supervisor_pidfd = -1
        self._started_at = 0.0
        self._beside, self._served = False, False  # as the page says
        self.adopt(settings)
        self._start_supervisor()

    def adopt(self, settings: Settings) -> None:
        """Take over settings, at the start and with each reload."""
        self.settings = settings
        self._first = self._arbiter.worker_age + 1
        self._graceful_timeout: int = self._arbiter.cfg.graceful_timeout
        # Now, for the working directory may be deleted while we serve.
        self._ready_file = settings.ready_file and os.path.abspath(settings.ready_file)
        self.tell()

    def want(self) -> None:
        """An operator has said how many processes there shall be, with HUP, TTIN or TTOU."""
        self._pauses = Pauses(self.load_page)
        self.tell()

    def not_forked(self, error: Exception) -> None:
        """Nor was it. The arbiter tries again within a second, if a process is missing."""
        self._arbiter.log.error("No process can be started: %r", error)
        self.tell()

    def after_end(self, age: int, pid: int) -> None:
        """A process has ended, and the arbiter will see whether it is missing."""
        if self._is_one_missing() and not self.stopping:
            pause = self._pauses.begin(age, time.monotonic())
            if pause:
                self._arbiter.log.error(
                    "Process %d ended before it had loaded the app: the next one starts in %g s",
                    pid,
                    pause,
                )
        self.tell()

    def _is_one_missing(self) -> bool:
        return len(self._arbiter.WORKERS) < self._arbiter.num_workers

    def manage(self, manage_workers: Callable[[], None]) -> None:
        """The arbiter looks after its workers, once a second at least; we after our helper, too."""
        if (self._is_beside(), self._other_serves()) != (self._beside, self._served):
            self.tell()
        self._mark.show(self._beside and self._serves())
        if time.monotonic() - self._started_at >= SHORT_LIFE and is_dead(self._supervisor_pidfd):
            log = self._arbiter.log
            log.error("The supervisor (pid %d) is gone: starting another", self._supervisor)
            try:
                self._start_supervisor()
            except OSError as error:
                log.error("No supervisor can be started: %s", error)
        if time.monotonic() >= self._pauses.until or not self._is_one_missing():
            manage_workers()

    def restore_timeout(self) -> None:
        """graceful_timeout is again what the user wants; see hook.py."""
        self._arbiter.cfg.set("graceful_timeout", self._graceful_timeout)

    def tell(self, *forking: int) -> None:
        """Write what is wanted now, and wake its readers. `forking` are ages about to be born.

        gunicorn before 24 calls hooks in a signal handler. One that comes in the middle of
        this writes the page first, so what we were writing is older: write again.
        """
        while True:
            self._told += 1
            turn = self._told
            self.page.write(self._wishes(forking).encode())
            if turn == self._told:
                break
        for nudge in self._nudges:
            os.eventfd_write(nudge, 1)

    def _wishes(self, forking: tuple[int, ...]) -> Wishes:
        cfg = self._arbiter.cfg
        self._most_threads = max(self._most_threads, cfg.threads)
        self._beside, self._served = self._is_beside(), self._other_serves()
        return Wishes(
            rules=Rules(
                self._arbiter.num_workers,
                cfg.threads,
                self.settings.max_replica_concurrency,
                self.settings.queue_timeout,
                self.settings.request_timeout,
                overtime.GRACE,
                self.settings.overload_dry_run,
            ),
            serving=_serving(self.settings, cfg),
            live=(*(worker.age for worker in list(self._arbiter.WORKERS.values())), *forking),
            first=self._first,
            most_threads=self._most_threads,
            graceful_timeout=self._graceful_timeout,
            privileges=Privileges(cfg.uid, cfg.gid, cfg.initgroups),
            logging=_logging(cfg),
            supervisor=self._supervisor,
            ready_file=self._ready_file,
            shared=self._is_shared(),
            beside=self._beside,
            served=self._served,
            draining=self._draining,
            stop=self._stop,
            reopen=self._reopen,
        )

    def _is_beside(self) -> bool:
        """Whether there is another master: the one that we have started, or that has started us."""
        return bool(self._arbiter.reexec_pid or self._arbiter.master_pid)

    def _serves(self) -> bool:
        """Whether the replica is ready, and is not paused or about to stop."""
        now = self.replica_page.read()
        ready = bool(now.was_ready and now.processes and self._arbiter.num_workers)
        return ready and not self._draining and not self.stopping

    def _other_serves(self) -> bool:
        """Whether the other master says that of its replica."""
        other = self._arbiter.reexec_pid or self._arbiter.master_pid
        return bool(other) and ready_mark.is_shown(other)

    def _is_shared(self) -> bool:
        """Whether someone else has our listening sockets: another master, or who activated us."""
        arbiter = self._arbiter
        inherited = any(isinstance(address, int) for address in arbiter.cfg.address)  # fd://
        return bool(inherited or arbiter.systemd or self._beside)

    def drain(self) -> bool:
        """Serve on for drain_delay while readyz says 503; False if that was cut short.

        Until another master serves: nobody has to be moved away then, and readyz is 200 there. The
        arbiter does nothing but stop meanwhile, so we do for it what keeps processes there.
        """
        end = time.monotonic() + self.settings.drain_delay
        if self._stop is not None or not self.replica_page.read().was_ready:
            return True
        self._draining = True
        self._mark.show(False)  # before we look at the other's: both may be told to stop
        if self._other_serves():
            return True
        self.tell()
        while time.monotonic() < end and not self._other_serves():
            if self._is_hurried():
                return False
            try:
                self._arbiter.reap_workers()
                self._arbiter.murder_workers()
                self._arbiter.manage_workers()
            except HaltServer:
                break
            time.sleep(min(PAUSE, max(0.0, end - time.monotonic())))
        return True

    def _is_hurried(self) -> bool:
        """Whether INT or QUIT has come."""
        with suppress(queue.Empty, IndexError):
            while True:
                number = _next_signal(self._arbiter.SIG_QUEUE)
                if number in (signal.SIGINT, signal.SIGQUIT):
                    return True
                if number == signal.SIGUSR1:
                    self._arbiter.handle_usr1()
        return False

    @property
    def stopping(self) -> bool:
        return self._stop is not None

    def stop(self, graceful: bool) -> None:
        """A stop begins. A quick one after a graceful one takes over, not the other way round."""
        if self._stop is None or (self._stop.graceful and not graceful):
            self._stop = Stop(graceful, time.monotonic() + self._graceful_timeout)
        self._mark.show(False)
        self.tell()

    def end(self) -> None:
        """All workers are gone: let the helpers send their last bytes in time, and end them."""
        now = time.monotonic()
        self._stop = self._stop or Stop(False, now)
        self.tell()
        end = LEAVE_TIME + (max(now, self._stop.deadline) if self._stop.graceful else now)
        self._await_end("supervisor", self._supervisor_pidfd, end)
        living = self.replica_page.find_living()
        if living:
            self._await_end("dispatcher", living[1], end)
        if self._ready_file:  # of a dispatcher that was killed, now or before
            with suppress(OSError, ValueError):
                ready_file.remove(self._ready_file, self._arbiter.pid)

    def _await_end(self, name: str, pidfd: int, end: float) -> None:
        if not is_dead(pidfd, max(0.0, end - time.monotonic())):
            self._arbiter.log.warning("The %s has not ended in time: killing it", name)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def reopen_logs(self) -> None:
        self._reopen += 1
        self.tell()

    def reload(self, reload: Callable[[], None]) -> None:
        """HUP. gunicorn opens its logs anew. Dispatcher and supervisor do only if that is needed:
        having given up root's privileges they may not be allowed to."""
        moved = journal.were_moved()
        try:
            reload()
            if moved:
                self.reopen_logs()
        finally:
            self.restore_timeout()

    def in_worker(self) -> None:
        """We are in a forked worker, which runs the app: let go of what only the master needs."""
        for listener in self._arbiter.LISTENERS:
            listener.close()
        self.control.close()
        self._mark.show(False)
        for fd in (*self._nudges, self._supervisor_pidfd):
            os.close(fd)
        self.page.only_read()
        self.replica_page.only_read()

    def see_to_end(self, error: BaseException) -> None:
        """In a worker that ends. In `post_fork`, say, it has failed before we could see to it; and
        gunicorn fails, too, if it cannot print why."""
        if not isinstance(error, SystemExit):
            with suppress(Exception):  # else it would go on
                self._arbiter.log.exception("A process failed")
            fail(self.load_page)
        if error.code in HALT:
            fail(self.load_page)

    def _start_supervisor(self) -> None:
        """Start the supervisor in a session of its own, where no Ctrl-C reaches it."""
        self._started_at = time.monotonic()
        own = os.pidfd_open(os.getpid())
        try:
            inheritance = Inheritance(
                [listener.fileno() for listener in self._arbiter.LISTENERS],
                self.control.fileno(),
                self.page.fd,
                self.replica_page.fd,
                *self._nudges,
                own,
                os.getpid(),
            )
            inherited = json.dumps({**vars(inheritance), "path": _import_path()})
            process = subprocess.Popen(
                [sys.executable, *_FLAGS, "-c", STARTER, inherited],
                stdin=subprocess.DEVNULL,
                pass_fds=inheritance.fds(),
                start_new_session=True,
            )
        finally:
            os.close(own)
        process.returncode = 0  # gunicorn reaps it, and its pid may come back as a worker's
        pidfd = os.pidfd_open(process.pid)
        if self._supervisor_pidfd >= 0:
            os.close(self._supervisor_pidfd)
        self._supervisor, self._supervisor_pidfd = process.pid, pidfd
        self.tell()


def _next_signal(signals: Any) -> int:
    """The next of the arbiter's signals; a list before gunicorn 24. Raises Empty, IndexError."""
    return int(signals.pop(0) if isinstance(signals, list) else signals.get_nowait())


def _import_path() -> list[str]:
    """Where the supervisor finds us and gunicorn: behind the standard library, and no more."""
    packages = (Path(__file__), Path(gunicorn.__file__))
    return list(dict.fromkeys(str(file.resolve().parent.parent) for file in packages))


def _logging(cfg: Config) -> dict[str, Any]:
    """gunicorn's settings for its logs, of those that this version has, JSON can hold, and fit."""
    values = {name: cfg.settings[name].get() for name in journal.SETTINGS if name in cfg.settings}
    return {name: value for name, value in values.items() if _can_be_told(value)}


def _can_be_told(value: Any) -> bool:
    try:
        return len(json.dumps(value)) <= LARGEST_TOLD
    except (TypeError, ValueError):
        return False


def _serving(settings: Settings, cfg: Config) -> Serving:
    prefix = settings.probes
    names = ("healthz", "readyz") if prefix else ()
    return Serving(
        limits=Limits(
            _head_limit(cfg), cfg.limit_request_line, _takes_proxy_lines(cfg), refuses_at_once(cfg)
        ),
        header_timeout=settings.header_timeout,
        receive_timeout=settings.receive_timeout,
        send_timeout=settings.send_timeout,
        keepalive=cfg.keepalive,
        request_buffer=settings.request_buffer,
        overload_status=settings.overload_status,
        probes=tuple(f"{prefix}{name}".encode() for name in names),
        exempt=tuple(path.encode() for path in settings.exempt),
    )


def _head_limit(cfg: Config) -> int:
    """Bytes of the largest head that gunicorn's limits allow, and 1 MiB at most."""
    fields = cfg.limit_request_fields * (cfg.limit_request_field_size + 2) + 4
    line: int = cfg.limit_request_line
    if not (line and cfg.limit_request_fields and cfg.limit_request_field_size):
        return 1 << 20
    return min(line + int(fields), 1 << 20)


def _takes_proxy_lines(cfg: Config) -> bool:
    return cfg.proxy_protocol not in (False, None, "off")
