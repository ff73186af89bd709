"""Real gunicorns on port 0 for the live tests, and clients that control every byte."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from stage import PATIENCE, Actor, Stage

from replica_plugin.pages import Numbers, ReplicaPage

TESTS = Path(__file__).parent
GUNICORN = (sys.executable, "-m", "gunicorn")
OURS = ("-c", "python:replica_plugin.conf")
STOCK = ("-k", "gthread")
STOCK_GEVENT = ("-k", "gevent")
IN_BOTH_MODES = pytest.mark.parametrize("mode", ["thread", "gevent"], indirect=True, scope="module")
"""For a module, as its pytestmark, whose servers promise the same whatever a slot is."""
BOTH = ("127.0.0.1:0", "unix:sock")
"""Binds of a server that is reached over TCP (0) and over a Unix socket (1)."""
Shown = subprocess.CompletedProcess[str]
BUSY = re.compile(r"Promise\s+broken|too\s+busy")  # where its lines are wrapped, too


def wait_for(condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """Wait until `condition()` is true, and return what it returned."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.005)


def environment(env: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The environment of a gunicorn: ours without what configures it; None leaves out."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("REPLICA_", "GUNICORN"))}
    clean.pop("WEB_CONCURRENCY", None)
    wanted = {**clean, "PYTHONPATH": str(TESTS), "PYTHONUNBUFFERED": "1", **(env or {})}
    return {name: value for name, value in wanted.items() if value is not None}


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class Server:
    """A gunicorn, started in a folder of its own: `command`, options, app."""

    _numbers: ReplicaPage | None = None

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        config: Mapping[str, Any] | None = None,
        base: tuple[str, ...] = OURS,
        bind: tuple[str, ...] = ("127.0.0.1:0",),
        app: str = "served_app:application",
        env: Mapping[str, str | None] | None = None,
        ready: bool = True,
        files: Mapping[str, str] | None = None,
        command: tuple[str, ...] = GUNICORN,
        listening_in: str | None = None,
        mode: str = "thread",
        **popen: Any,
    ) -> None:
        self.folder = folder
        self.mode = mode
        write_files(folder, files or {})
        self.log_path = folder / "log"
        if config is not None:
            self.write_config(config)
        binds = [part for each in bind for part in ("--bind", each)]
        line = [*command, *base, *binds, *arguments, app]
        options = {"cwd": folder, "env": environment(env), "stdin": subprocess.DEVNULL}
        with open(self.log_path, "ab") as log:
            options |= {"stdout": log, "stderr": log, **popen}
            self.process = subprocess.Popen(line, **options)
        try:
            if listening_in is None:
                self.addresses = self._addresses(len(bind) or 1)
            else:
                if listening_in:
                    self._await_file(listening_in)
                self.addresses = [str(folder / each.removeprefix("unix:")) for each in bind]
            if ready:
                self.wait_ready()
        except BaseException:
            self.kill()
            raise

    def write_config(self, config: Mapping[str, Any]) -> None:
        mode = {} if self.mode == "thread" else {"mode": self.mode}
        (self.folder / "replica.yaml").write_text(yaml.safe_dump({**mode, **config}))

    # What it says.

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_log(self, pattern: str, count: int = 1) -> str:
        """Wait until the log holds `count` matches of a pattern; the last of them."""

        def found() -> list[str]:
            matches = re.findall(pattern, self.log)
            return matches if len(matches) >= count else []

        try:
            return str(wait_for(found, pattern)[-1])
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def _await_file(self, name: str) -> None:
        path = self.folder / name
        wait_for(lambda: path.exists() and "Listening at: " in path.read_text(), "listening")

    def _addresses(self, count: int) -> list[Any]:
        wait_for(
            lambda: "Listening at: " in self.log or self.process.poll() is not None, "listening"
        )
        assert self.process.poll() is None, self.log
        names = re.search(r"Listening at: (.*) \(\d+\)", self.log)[1].split(",")
        assert len(names) == count
        return [self._address(name) for name in names]

    def _address(self, name: str) -> Any:
        if name.startswith("unix:"):
            return str(self.folder / name.removeprefix("unix:"))
        host, _, port = name.removeprefix("http://").rpartition(":")
        return (host.strip("[]"), int(port))

    @property
    def address(self) -> Any:
        return self.addresses[0]

    def wait_ready(self) -> None:
        """Until readyz is 200; on stock gunicorn, until it answers at all."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log
            try:
                return self.get("/-/readyz").status in (200, 404)
            except OSError:
                return False

        wait_for(ready, "ready")

    def wait_closed(self, which: int = 0) -> None:
        """Until it listens no more: nobody holds the socket.

        With little patience: a SYN that is dropped in its end is sent again only a second later.
        """

        def refused() -> bool:
            try:
                Client(self.addresses[which], 0.2).close()
            except (ConnectionRefusedError, FileNotFoundError):
                return True
            except (ConnectionResetError, TimeoutError):
                return False
            return False

        wait_for(refused, "closed")

    # Whom it consists of.

    def children(self, pid: int | None = None) -> list[int]:
        """The pids of a process's living children; the master's without an argument."""
        pid = pid or self.process.pid
        found = []
        for each in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = each.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(each.parent.name))
        return sorted(found)

    @property
    def supervisor(self) -> int:
        """The master's child that was started by exec."""

        def found() -> list[int]:
            return [pid for pid in self.children() if is_supervisor(pid)]

        return int(wait_for(found, "supervisor")[0])

    @property
    def dispatcher(self) -> int:
        """The process that holds the lock of the replica's page; a child of a supervisor."""
        pid, pidfd = wait_for(self._page().find_living, "dispatcher")
        os.close(pidfd)
        return int(pid)

    @property
    def workers(self) -> list[int]:
        return [pid for pid in self.children() if not is_supervisor(pid)]

    def numbers(self) -> Numbers:
        """The replica in numbers, as its dispatcher last wrote them."""
        return self._page().read()

    def _page(self) -> ReplicaPage:
        """The replica's page, which the master holds from `when_ready` on."""
        if self._numbers is None:
            self._numbers = ReplicaPage(wait_for(self._find_page, "the replica's page"))
        return self._numbers

    def _find_page(self) -> int | None:
        for link, target in descriptors(self.process.pid).items():
            if "memfd:replica-numbers" in target:
                with suppress(FileNotFoundError):
                    return os.open(link, os.O_RDWR)
        return None

    def wait_numbers(self, **wanted: int) -> None:
        """Wait until these numbers are so: `waiting=3, running=4`."""
        wait_for(lambda: wanted.items() <= self.numbers()._asdict().items(), str(wanted))

    def wait_in_flight(self, count: int) -> None:
        """Wait until so many requests run or wait."""

        def enough() -> bool:
            numbers = self.numbers()
            return numbers.running + numbers.waiting == count

        wait_for(enough, f"{count} in flight")

    # What can be done to it.

    def tell(self, number: int, pid: int | None = None) -> None:
        os.kill(pid or self.process.pid, number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop it and wait for its end: its exit code."""
        helpers = list(self.children())
        helpers += [child for pid in helpers for child in self.children(pid)]
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        wait_for(lambda: not any(_lives(pid) for pid in helpers), "all helpers gone")
        self.close()
        return code

    def kill(self) -> None:
        """The last resort of a test that failed: every process of it, by pid."""
        pids = [self.process.pid, *self.children()]
        pids += [child for pid in pids[1:] for child in self.children(pid)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.close()

    def close(self) -> None:
        """It has ended: let go of its page."""
        if self._numbers is not None:
            os.close(self._numbers.fd)
            self._numbers = None

    # Requests.

    def connect(self, which: int = 0) -> Client:
        return Client(self.addresses[which])

    def get(self, path: str, which: int = 0, **headers: str) -> Reply:
        """One request on a connection of its own."""
        with self.connect(which) as client:
            return client.get(path, **headers)

    def later(self, path: str, which: int = 0) -> Pending:
        """One request in a thread of its own."""
        return Pending(lambda: self.get(path, which))


@dataclass
class Ended:
    """What a gunicorn said that ended by itself."""

    folder: Path
    code: int
    output: str

    @property
    def listened(self) -> bool:
        return "Listening at" in self.output


def run_to_its_end(
    folder: Path,
    *arguments: str,
    base: tuple[str, ...] = OURS,
    app: tuple[str, ...] = ("served_app:application",),
    env: Mapping[str, str | None] | None = None,
    files: Mapping[str, str] | None = None,
    command: tuple[str, ...] = GUNICORN,
) -> Ended:
    """Run a gunicorn of which we expect that it ends by itself."""
    write_files(folder, files or {})
    line = [*command, *base, "--bind", "127.0.0.1:0", *arguments, *app]
    done = subprocess.run(
        line,
        cwd=folder,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    return Ended(folder, done.returncode, done.stdout)


def show_demo(run: Callable[[], Shown]) -> Shown:
    """Run the demo; up to three times while it says what a machine that stands still makes it."""
    for _ in range(3):
        done = run()
        if done.returncode != 1 or not BUSY.search(f"{done.stdout}{done.stderr}"):
            break
    return done


def all_pids() -> list[int]:
    return [int(each.name) for each in Path("/proc").glob("[0-9]*")]


def descriptors(pid: int) -> dict[Path, str]:
    """What a process has open, by its link in /proc, but for what it closes at this moment."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found[link] = os.readlink(link)
    return found


def environ_of(pid: int) -> bytes:
    """The environment a process was started with; nothing for one that is gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def empty(clients: list[Client], actors: list[Actor], stage: Stage, waiting: int = 6) -> None:
    """Let what runs end, and what waits behind it, and see that all were answered."""
    for actor in actors:
        actor.finish()
    for _ in range(waiting):
        stage.next().finish()
    assert [client.reply().status for client in clients] == [200] * len(clients)
    for client in clients:
        client.close()


def is_supervisor(pid: int) -> bool:
    return b"replica_plugin.supervisor" in _command(pid)


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@dataclass
class Reply:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection. `send` and `reply` control bytes; `get` is a request and its reply."""

    def __init__(self, address: Any, timeout: float = PATIENCE) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        if isinstance(address, tuple) and ":" in address[0]:
            family = socket.AF_INET6
        self.sock = socket.socket(family)
        self.sock.settimeout(timeout)
        self.sock.connect(address)
        self._reader: Any = None

    def makefile(self, mode: str) -> Any:
        """What HTTPResponse reads from: one buffer for all replies, which may come together."""
        if self._reader is None:
            self._reader = _Reader(self.sock.makefile("rb"))
        return self._reader

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes | str) -> Client:
        self.sock.sendall(data.encode("latin-1") if isinstance(data, str) else data)
        return self

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> Client:
        """Send a request, whole."""
        fields = {"Host": "test", **{k.replace("_", "-"): v for k, v in headers.items()}}
        if body is not None:
            fields.setdefault("Content-Length", str(len(body)))
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + (body or b""))

    def reply(self, method: str = "GET") -> Reply:
        """Read one reply. Raises http.client's exceptions, ConnectionError or TimeoutError."""
        response = self.begun_reply(method)
        body = response.read()
        return Reply(response.status, body, dict(response.headers))

    def begun_reply(self, method: str = "GET") -> http.client.HTTPResponse:
        """Read the head of a reply. Raises as `reply`."""
        response = http.client.HTTPResponse(self, method=method)  # type: ignore[arg-type]
        response.begin()
        return response

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask(path, **headers).reply()

    def is_closed(self) -> bool:
        """Wait for the server's end of the connection; False if bytes come instead."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def is_readable(self) -> bool:
        """Whether something lies there now: bytes, or the end."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    def reset(self) -> None:
        """Leave without a good-bye."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        if self._reader is not None:
            self._reader.end()
        self.sock.close()


class _Reader:
    """A file that outlives the responses that read from it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.read, self.read1, self.readinto, self.readline, self.peek, self.flush = (
            file.read, file.read1, file.readinto, file.readline, file.peek, file.flush,
        )  # fmt: skip

    def close(self) -> None:
        pass

    def end(self) -> None:
        self._file.close()


def is_old(used: float) -> bool:
    """Whether a connection that was used then may be closed soon: a machine may stand still."""
    return time.monotonic() - used > 0.5


class Load:
    """Clients that ask all the time, each in a thread of its own; half of them keep alive."""

    def __init__(self, server: Server, path: str = "/hello", clients: int = 8) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._server, self._path = server, path
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(n % 2 == 0, n % len(server.addresses)))
            for n in range(clients)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def go_on(self, count: int) -> None:
        """Until so many more requests have been answered."""
        wanted = self.answered + count
        wait_for(lambda: self.answered >= wanted or self.failures, f"{count} more answers")

    def _run(self, keeps: bool, which: int) -> None:
        client, used = None, 0.0
        while not self._ended.is_set():
            try:
                if client and is_old(used):
                    client.close()
                    client = None
                client = client or self._server.connect(which)
                reply = client.get(self._path, Connection="keep-alive" if keeps else "close")
            except Exception as error:
                self.failures.append(repr(error))
                client = None
                continue
            if reply.status != 200:
                self.failures.append(repr(reply))
            self.answered += 1
            used = time.monotonic()
            if not keeps:
                client.close()
                client = None
        if client is not None:
            client.close()


class Pending:
    """Something that happens in a thread, and its outcome."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._outcome: list[Any] = []
        self._error: BaseException | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome.append(self._action())
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(PATIENCE)
        assert self.done, "no outcome in time"
        if self._error is not None:
            raise self._error
        return self._outcome[0]
