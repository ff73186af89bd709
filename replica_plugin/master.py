"""The master's part: what gunicorn's arbiter lends us, and what we tell the helpers.

The master runs no code of ours but these hooks, each of which writes what is wanted now to
the master's page and nudges whoever reads it. Nothing is sent that could be lost: a helper
that was not there reads the page when it comes.

gunicorn's arbiter is touched here and nowhere else. Three of its methods are wrapped on
the instance, since no hook says what they do: `stop` (a stop is told, never inferred from
a worker that goes), `setup` (a reload brings a new configuration, into which our hooks go
again) and `handle_usr1` (logs are reopened).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import gunicorn
from gunicorn.config import Config

from . import journal
from .config.settings import Settings
from .decisions import Rules
from .head import Limits
from .pages import MasterPage, ReplicaPage
from .rules import Privileges, Serving, Stop, Wishes
from .supervisor import Inheritance

STARTER = (
    "import sys, json; inherited = json.loads(sys.argv[1]); "
    "sys.path += inherited.pop('path'); "
    "from replica_plugin.supervisor import main; main(inherited)"
)
"""What the supervisor runs, isolated: the working directory may hold a `queue.py`."""

# Isolation takes Python's variables away, of which this one is kept.
_FLAGS = ("-I", "-B") if sys.dont_write_bytecode else ("-I",)

LEAVE_TIME = 2.0  # seconds the helpers get to send their last bytes when all workers are gone


class Arbiter(Protocol):
    """What we use of gunicorn's arbiter."""

    cfg: Config
    log: Any
    pid: int
    num_workers: int
    WORKERS: dict[int, Any]
    LISTENERS: list[Any]

    def stop(self, graceful: bool = True) -> None: ...
    def setup(self, app: Any) -> None: ...
    def handle_usr1(self) -> None: ...


class Master:
    """The replica, as the master holds it. There is one a master, from `when_ready` on."""

    def __init__(self, arbiter: Arbiter, settings: Settings) -> None:
        self.page = MasterPage()
        self.replica_page = ReplicaPage()
        self.control, self._control_out = _control_pair()
        self._arbiter = arbiter
        self._stop: Stop | None = None
        self._reopen = 0
        self._told = 0
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self._nudges = (os.eventfd(0, flags), os.eventfd(0, flags))
        self.adopt(settings)
        self._supervisor = self._start_supervisor()

    def adopt(self, settings: Settings) -> None:
        """Take over settings, at the start and with each reload."""
        self.settings = settings
        self.tell()

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
        return Wishes(
            rules=Rules(
                self._arbiter.num_workers,
                cfg.threads,
                self.settings.max_replica_concurrency,
                self.settings.queue_timeout,
                self.settings.overload_dry_run,
            ),
            serving=_serving(self.settings, cfg),
            live=(*(worker.age for worker in list(self._arbiter.WORKERS.values())), *forking),
            graceful_timeout=cfg.graceful_timeout,
            privileges=Privileges(cfg.uid, cfg.gid, cfg.initgroups),
            logging={name: _plain(cfg, name) for name in journal.SETTINGS},
            stop=self._stop,
            reopen=self._reopen,
        )

    def stop(self, graceful: bool) -> None:
        """A stop begins. A quick one after a graceful one takes over, not the other way round."""
        if self._stop is None or (self._stop.graceful and not graceful):
            self._stop = Stop(graceful, time.monotonic() + self._arbiter.cfg.graceful_timeout)
        self.tell()

    def end(self) -> None:
        """All workers are gone: let the helpers send their last bytes, and end them."""
        now = time.monotonic()
        self._stop = replace(self._stop, deadline=now) if self._stop else Stop(False, now)
        self.tell()
        pidfd = self._supervisor_pidfd
        if not select.select([pidfd], [], [], LEAVE_TIME)[0]:
            self._arbiter.log.warning("The supervisor has not ended in time: killing it")
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def reopen_logs(self) -> None:
        self._reopen += 1
        self.tell()

    def in_worker(self) -> None:
        """We are in a forked worker: close what only the master needs."""
        for listener in self._arbiter.LISTENERS:
            listener.close()
        self.control.close()

    def offer_socket(self) -> socket.socket:
        """Where a process registers."""
        return self._control_out

    def _start_supervisor(self) -> subprocess.Popen[bytes]:
        """Start the supervisor in a session of its own, where no Ctrl-C reaches it."""
        own = os.pidfd_open(os.getpid())
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
        os.close(own)
        self._supervisor_pidfd = os.pidfd_open(process.pid)
        return process


def _control_pair() -> tuple[socket.socket, socket.socket]:
    reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    writing.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return reading, writing


def _import_path() -> list[str]:
    """Where the supervisor finds us and gunicorn: behind the standard library, and no more."""
    packages = (Path(__file__), Path(gunicorn.__file__))
    return list(dict.fromkeys(str(file.resolve().parent.parent) for file in packages))


def _plain(cfg: Config, name: str) -> Any:
    """A setting of gunicorn's, if this version has it and JSON can hold it."""
    setting = cfg.settings.get(name)
    value = setting.get() if setting is not None else None
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return None
    return value


def _serving(settings: Settings, cfg: Config) -> Serving:
    prefix = settings.probes
    names = ("healthz", "readyz") if prefix else ()
    return Serving(
        limits=Limits(_head_limit(cfg), cfg.limit_request_line, _takes_proxy_lines(cfg)),
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
