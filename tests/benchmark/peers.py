"""The servers that are compared: how each is told app, p and t; started and stopped by pid."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from .processes import cpu, cpu_by_role, roles, tree

BIN = Path(sys.executable).parent
PATIENCE = 60.0
TOUCHED = "reload"
BACKLOG = 2048  # gunicorn's default, for who has a lower one

Line = Sequence[str]


def gunicorn(*options: str) -> Callable[[str, int, int, str], Line]:
    def line(bind: str, p: int, t: int, app: str) -> Line:
        shape = [each.format(p=p, t=t, both=p * t) for each in options]
        quiet = ("--log-level", "error", "--no-control-socket")
        return (sys.executable, "-m", "gunicorn", *shape, *quiet, "--bind", bind, app)

    return line


def uwsgi(bind: str, p: int, t: int, app: str) -> Line:
    shape = (
        "--processes",
        str(p),
        "--threads",
        str(t),
        "--enable-threads",
        "--listen",
        str(BACKLOG),
    )
    ways = ("--master", "--lazy-apps", "--need-app", "--disable-logging")
    graceful = ("--hook-master-start", "unix_signal:15 gracefully_kill_them_all")
    reload = ("--touch-chain-reload", TOUCHED)
    where = ("--virtualenv", sys.prefix, "--http-socket", bind, "--module", app)
    return (str(BIN / "uwsgi"), *ways, *graceful, *reload, *shape, *where)


def waitress(bind: str, p: int, t: int, app: str) -> Line:
    return (sys.executable, "-m", "waitress", f"--listen={bind}", f"--threads={p * t}", app)


def granian(bind: str, p: int, t: int, app: str) -> Line:
    host, _, port = bind.partition(":")
    shape = ("--workers", str(p), "--blocking-threads", str(t), "--interface", "wsgi")
    where = (
        "--host",
        host,
        "--port",
        port,
        "--http",
        "1",
        "--log-level",
        "error",
        "--respawn-failed-workers",
    )
    return (str(BIN / "granian"), *shape, *where, app)


def cheroot(bind: str, p: int, t: int, app: str) -> Line:
    threads = ("--threads", str(p * t), "--max-threads", str(p * t))
    return (str(BIN / "cheroot"), *threads, "--bind", bind, app)


def hup(server: Server) -> None:
    os.kill(server.pid, signal.SIGHUP)


def touch(server: Server) -> None:
    (server.folder / TOUCHED).touch()


@dataclass(frozen=True)
class Peer:
    """`processes`: it has several; `reload`: how it is made to load the app again, if it can."""

    name: str
    line: Callable[[str, int, int, str], Line]
    env: Mapping[str, str] = field(default_factory=dict)
    processes: bool = True
    reload: Callable[[Server], None] | None = hup


OURS_LINE = gunicorn("-c", "python:replica_plugin.conf", "--workers", "{p}", "--threads", "{t}")
GEVENT_LINE = ("-k", "gevent", "--workers", "{p}")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("ours", OURS_LINE),
        Peer("ours, gevent", OURS_LINE, {"REPLICA_MODE": "gevent"}),
        Peer("uWSGI", uwsgi, reload=touch),
        Peer("gthread", gunicorn("-k", "gthread", "--workers", "{p}", "--threads", "{t}")),
        Peer("gevent", gunicorn(*GEVENT_LINE, "--worker-connections", "{t}")),
        Peer("gevent, no cap", gunicorn(*GEVENT_LINE)),
        Peer("sync", gunicorn("-k", "sync", "--workers", "{both}")),
        Peer("waitress", waitress, processes=False, reload=None),
        Peer("granian", granian),
        Peer("cheroot", cheroot, processes=False, reload=None),
    )
}
OURS, GEVENT, UWSGI, GTHREAD = "ours", "ours, gevent", "uWSGI", "gthread"
STOCK_GEVENT = "gevent, no cap"
THREE = (OURS, UWSGI, GTHREAD)
CAPPED = tuple(name for name in PEERS if name != STOCK_GEVENT)


class Server:
    """A running peer. It ends with the benchmark, whatever happens."""

    def __init__(
        self, peer: Peer, p: int, t: int, app: str, more: Sequence[str], env: Mapping[str, str]
    ) -> None:
        self.peer = peer
        self.address = ("127.0.0.1", _free_port())
        self._temporary = tempfile.TemporaryDirectory(prefix="benchmark-")
        self.folder = Path(self._temporary.name)
        (self.folder / TOUCHED).touch()
        line = [*peer.line("{}:{}".format(*self.address), p, t, f"benchmark.{app}:app"), *more]
        self._log = open(self.folder / "log", "w+")
        self._process = subprocess.Popen(
            line,
            cwd=self.folder,
            env={**environment(), **peer.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        return "http://{}:{}/".format(*self.address)

    def wait_ready(self, processes: int) -> None:
        """Until it answers, and as many processes as it is to have are there and idle."""
        deadline = time.monotonic() + PATIENCE
        while not self._is_ready(processes):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                raise SystemExit(f"{self.peer.name} does not serve:\n{self._log.read()}")
            time.sleep(0.05)

    def _is_ready(self, processes: int) -> bool:
        connection = http.client.HTTPConnection(*self.address, timeout=5)
        try:
            path = "/-/readyz" if self.peer.name.startswith(OURS) else "/"
            connection.request("GET", path, headers={"Connection": "close"})
            if connection.getresponse().status != 200:
                return False
        except OSError:
            return False
        finally:
            connection.close()
        busy = cpu(tree(self.pid))
        time.sleep(0.2)
        return len(self.workers) >= processes and cpu(tree(self.pid)) == busy

    @property
    def roles(self) -> dict[int, str]:
        return roles(self.pid)

    @property
    def workers(self) -> list[int]:
        return self.having("worker")

    def having(self, role: str) -> list[int]:
        return [pid for pid, each in self.roles.items() if each == role]

    def cpu_of(self, load: Callable[[], None]) -> dict[str, tuple[float, float]]:
        """Seconds of CPU that a load costs, in user and in system mode, by role."""
        named = self.roles
        before = cpu(named)
        load()
        return cpu_by_role(named, before)

    def reload(self) -> None:
        assert self.peer.reload is not None
        self.peer.reload(self)

    def stop(self) -> None:
        left = tree(self.pid)
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in left:  # of a master that was killed, or that never waits for them
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._log.close()
        self._temporary.cleanup()


@contextmanager
def serving(
    names: Sequence[str],
    p: int,
    t: int,
    app: str = "served",
    more: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Server]]:
    """These peers, all with p and t; one has `more` options, or `env`, only where it knows them."""
    with ExitStack() as stack:
        servers = {}
        for name in names:
            servers[name] = Server(PEERS[name], p, t, app, more, env or {})
            stack.callback(servers[name].stop)
        for server in servers.values():
            server.wait_ready(p if server.peer.processes else 1)
        yield servers


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment() -> dict[str, str]:
    """Ours, without what would configure a server, and with this package to be imported."""
    prefixes = ("REPLICA_", "GUNICORN", "GRANIAN_", "UWSGI_", "FLASK_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    clean.pop("WEB_CONCURRENCY", None)
    path = [str(Path(__file__).parents[1]), *filter(None, [clean.get("PYTHONPATH")])]
    return {**clean, "PYTHONPATH": os.pathsep.join(path)}
