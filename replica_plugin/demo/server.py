"""A gunicorn started as a child, told its port by the log, and stopped whatever happens.

1. From the fork on, every way out of `with Server(...)` ends the child: signals are held back
   until its process id is known, so that none can hit between.
2. The child has a session of its own: Ctrl-C reaches us only, and we stop it in good order.
3. Every wait has a deadline and watches for the child's early exit; a failure carries the log.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import FrameType, TracebackType

from ..errors import ReplicaError

LISTENING = re.compile(r"Listening at: http://127\.0\.0\.1:(\d+)")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FOREIGN = ("REPLICA_", "GUNICORN_", "WEB_CONCURRENCY")
PAUSE = 0.02  # seconds
GRACE = 5  # seconds
LOG_LINES = 40


class DemoError(ReplicaError):
    """Something the user of the demo is told as it stands."""


@contextmanager
def handling(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let `handler` have the signals that end a program, those ignored (nohup) excepted."""
    taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Server:
    """gunicorn with `arguments` in `folder`, on a free port, for the time of a `with`."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self._folder = folder
        self._log = folder / "server.log"
        self._command = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0"]
        self._command += ["--graceful-timeout", str(GRACE), *arguments]
        self._dismissed = False

    def __enter__(self) -> Server:
        seen: list[int] = []
        try:
            with handling(lambda number, frame: seen.append(number)):
                self._child = self._start()
                self.pid = self._child.pid
            for number in seen:
                signal.raise_signal(number)
            return self
        except BaseException:
            if hasattr(self, "pid"):
                self._stop()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def dismiss(self) -> None:
        """Begin to stop, without waiting for it."""
        if not self._dismissed:
            self._dismissed = True
            self._child.terminate()

    def _stop(self) -> None:
        try:
            self.dismiss()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(2 * GRACE)
        finally:
            if self._child.poll() is None:
                os.killpg(self.pid, signal.SIGKILL)
                self._child.wait()

    def wait_until_ready(self, seconds: float) -> int:
        """Wait until the replica is ready and return its port."""
        deadline = time.monotonic() + seconds
        port = self._wait("listening", self._find_port, deadline)
        self._wait("ready", lambda: _is_ready(port), deadline)
        return port

    def wait_until_logged(self, text: str, times: int, seconds: float) -> int:
        """Wait until `text` stands in the log so many times; return the port."""
        deadline = time.monotonic() + seconds
        port = self._wait("listening", self._find_port, deadline)
        self._wait("ready", lambda: self._read_log().count(text) >= times, deadline)
        return port

    def failure(self, reason: str) -> DemoError:
        """Make an error of `reason` and the end of the server's log."""
        lines = self._read_log().splitlines()[-LOG_LINES:]
        return DemoError("\n  ".join([f"{reason}. The server's log:", *lines]))

    def _wait(self, state: str, look: Callable[[], int], deadline: float) -> int:
        while True:
            code = self._child.poll()
            if code is not None:
                raise self.failure(f"The server ended with exit code {code} before it was {state}")
            found = look()
            if found:
                return found
            if time.monotonic() > deadline:
                raise self.failure(f"The server is not {state} in time")
            time.sleep(PAUSE)

    def _find_port(self) -> int:
        found = LISTENING.search(self._read_log())
        return int(found[1]) if found else 0

    def _read_log(self) -> str:
        return self._log.read_text(errors="replace")


def _is_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/-/readyz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _environment() -> dict[str, str]:
    """Ours, without what would configure the server; a checkout stays importable elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    home = Path(__file__).resolve().parent.parent
    # Installed packages must not come before the standard library, as PYTHONPATH does.
    if home.name not in ("site-packages", "dist-packages"):
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), kept.get("PYTHONPATH")]))
    return kept
