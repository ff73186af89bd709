"""The app of a chaos run: it does what the path says, and notes what it runs.

    /ACTION/NUMBER/ARGUMENT, or /exempt?NUMBER

It writes lines to one file that all processes append to (`EVENT NUMBER PID TIME ...`), each in
one write within a page of memory, so that a killed process leaves whole lines:

    LOADED 0       the app is loaded; with the process's threads
    BEGUN n        a request has begun;  ENDED n  and its response's body is closed
    FATAL n        it is about to end its process
    EXCEEDED n     it found a promise broken; with which

Who runs is known by the kernel: each request holds a lock on a byte of its own, which ends with
its process, however that dies. A count is what two looks have in common: no byte is locked twice,
so all of these were locked at the moment between them, and no count is ever too high.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from replica_plugin import stats

_FLOCK = struct.Struct("@hhqqi0q")  # type, whence, start, length, pid
PART = 1 << 16
LINE = 128  # bytes of each; so none crosses a page, between two of which a write can be killed


class Presence:
    """Numbers that are present, in all processes together; a number is used once."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._own: set[int] = set()

    def enter(self, number: int) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2 * number)
        self._own.add(number)

    def leave(self, number: int) -> None:
        """May be called again."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, 2 * number)
        self._own.discard(number)

    def here(self) -> int:
        """How many are present in this process."""
        return len(self._own)

    def count(self) -> int:
        return len(self._look() & self._look())

    def _look(self) -> set[int]:
        return set(self._own) | set(self._others())

    def _others(self) -> Iterator[int]:
        start = 0
        while True:
            ask = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 0, 0)
            kind, _, found, length, _ = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, ask))
            if kind == fcntl.F_UNLCK:
                return
            yield found // 2
            start = found + length


class Limits:
    """What may be at this moment: written by the run, read by each request that begins."""

    SIZE = 3 * 8

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, self.SIZE)
        self._words = memoryview(mmap.mmap(fd, self.SIZE)).cast("q")
        os.close(fd)

    def write(self, cap: int, processes: int, bound: int) -> None:
        self._words[0], self._words[1], self._words[2] = cap, processes, bound

    @property
    def cap(self) -> int:
        return self._words[0]

    @property
    def processes(self) -> int:
        return self._words[1]

    @property
    def bound(self) -> int:
        return self._words[2]


def right_body(action: str, number: int, argument: str, sent: bytes) -> bytes:
    """What the answer to a request is."""
    digest = hashlib.sha1(sent).hexdigest()
    line = f"{number} {action} {argument} {digest}\n".encode()
    if action not in ("large", "stream", "late"):
        return line
    size = int(argument) << 10
    return (line * (size // len(line) + 1))[:size]


def grip(seconds: float) -> None:
    """Keep the GIL for so long, in a call that no signal ends, and use no CPU."""
    libc = ctypes.PyDLL(None)
    mutex = ctypes.create_string_buffer(128)
    libc.pthread_mutex_lock(mutex)
    until = time.time() + seconds
    end = struct.pack("@qq", int(until), int(until % 1 * 1e9))
    libc.pthread_mutex_timedlock(mutex, end)


def deaf(seconds: float) -> None:
    """Go on, whatever is raised."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(BaseException):
            time.sleep(0.05)


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def child(_: str) -> None:
    """A child that holds all we have, and may outlive us."""
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).usleep(200_000)  # not Python's sleep, which would be gevent's
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def orphan(_: str) -> None:
    """A child that holds all we have, outlives the request, and cannot be told to end."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if os.fork() == 0:
                ctypes.CDLL(None).usleep(1_500_000)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def fail(_: str) -> None:
    raise RuntimeError("the app fails, as it was asked to")


ACTIONS: dict[str, Callable[[str], Any]] = {
    "nap": lambda ms: time.sleep(int(ms) / 1000),
    "burn": lambda ms: spin(int(ms) / 1000),
    "child": child,
    "orphan": orphan,
    "command": lambda _: subprocess.run(["true"], check=True),
    "fail": fail,
    "oversleep": lambda s: time.sleep(float(s)),
    "grip": lambda s: grip(float(s)),
    "deaf": lambda s: deaf(float(s)),
    "spin": lambda s: spin(float(s)),
    "exit": lambda code: os._exit(int(code)),
    "segfault": lambda _: ctypes.string_at(0),
    "abort": lambda _: os.abort(),
}
FATAL = ("exit", "segfault", "abort")


class Request:
    """One request, from `begin` to `end`; `end` may be interrupted, and called again."""

    def __init__(self, app: App, number: int, counts: bool) -> None:
        self._app = app
        self.number = number
        self._counts = counts
        self._ended = False

    def begin(self) -> None:
        app = self._app
        app.note("BEGUN", self.number)
        if self._counts:
            app.running.enter(self.number)
        self._check(app)

    def _check(self, app: App) -> None:
        running, cap = app.running.count(), app.limits.cap
        if running > cap:
            app.note("EXCEEDED", self.number, f"cap: {running} run, {cap} may")
        here = app.running.here()
        if here > app.threads:
            app.note("EXCEEDED", self.number, f"threads: {here} run here, {app.threads} may")
        flights = [_in_flight() for _ in range(3)]  # two numbers, which may be read half-written
        if min(flights) > app.limits.bound:
            app.note(
                "EXCEEDED",
                self.number,
                f"bound: {min(flights)} in flight, {app.limits.bound} may be",
            )

    def end(self) -> None:
        self._app.running.leave(self.number)
        if not self._ended:
            self._ended = True
            self._app.note("ENDED", self.number)


def _in_flight() -> int:
    found = stats.of_replica()
    return found.in_flight if found else 0


class Body:
    """A response of which the request is not done until it is closed."""

    def __init__(self, request: Request, parts: Iterator[bytes]) -> None:
        self._request = request
        self._parts = parts

    def __iter__(self) -> Iterator[bytes]:
        return self._parts

    def close(self) -> None:
        _end_surely(self._request)


def _end_surely(request: Request) -> None:
    """An interrupt comes once at most, be it in here."""
    try:
        request.end()
    finally:
        request.end()


class App:
    def __init__(
        self, folder: Path, threads: int, has_extra: bool, version: str, staggered: bool = True
    ) -> None:
        self.threads = threads
        self._has_extra = has_extra
        self._version = version
        self.running = Presence(folder / "running")
        self.limits = Limits(folder / "limits")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._events = os.open(folder / "events", flags, 0o600)
        loaded = Presence(folder / "loaded")
        loaded.enter(os.getpid())
        if staggered and loaded.count() > self.limits.processes + 1:
            why = f"stagger_init: {loaded.count()} have the app, {self.limits.processes} + 1 may"
            self.note("EXCEEDED", 0, why)
        self._loaded = loaded
        self.note("LOADED", 0, str(threads))

    def note(self, event: str, number: int, more: str = "") -> None:
        line = f"{event} {number} {os.getpid()} {time.monotonic():.6f} {more}"
        os.write(self._events, line.encode()[: LINE - 1].ljust(LINE - 1) + b"\n")

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/exempt":
            action, number, argument = "nap", int(environ["QUERY_STRING"]), "5"
            request = Request(self, number, not self._has_extra)
        else:
            _, action, name, argument = environ["PATH_INFO"].split("/", 3)
            number = int(name)
            request = Request(self, number, True)
        handed_over = False
        try:
            try:
                request.begin()
                answer = self._answer(environ, start_response, action, number, argument)
                if isinstance(answer, list):
                    return answer
                handed_over = True
                return Body(request, answer)
            finally:
                if not handed_over:
                    request.end()
        finally:
            if not handed_over:
                request.end()

    def _answer(
        self, environ: Any, start_response: Any, action: str, number: int, argument: str
    ) -> Any:
        sent = environ["wsgi.input"].read()
        if action in FATAL:
            self.note("FATAL", number, action)
        if action in ACTIONS:
            ACTIONS[action](argument)
        body = right_body(action, number, argument, sent)
        headers = [("Content-Type", "text/plain"), ("X-Version", self._version)]
        if action in ("stream", "late"):
            start_response("200 OK", headers)
            return _parts(body, action)
        start_response("200 OK", [*headers, ("Content-Length", str(len(body)))])
        return [body]


def _parts(body: bytes, action: str) -> Iterator[bytes]:
    for at in range(0, len(body), PART):
        yield body[at : at + PART]
        time.sleep(0.002)
    if action == "late":
        raise RuntimeError("the app fails late, as it was asked to")


def make(folder: str, version: str, preload: bool) -> Callable[[Any, Any], Any]:
    """The app, in a worker of ours; if it is preloaded, each makes it with its first request."""
    if not preload:
        return _make(folder, version, True)
    made: list[App] = []
    lock = threading.Lock()

    def application(environ: Any, start_response: Any) -> Any:
        with lock:
            if not made:
                made.append(_make(folder, version, False))
        return made[0](environ, start_response)

    return application


def _make(folder: str, version: str, staggered: bool) -> App:
    from replica_plugin import hook

    master = hook.master()
    assert master is not None
    settings = master.settings
    threads = settings.threads_per_process
    has_extra = settings.mode == "thread" and threads > 1
    return App(Path(folder), threads, has_extra, version, staggered)
