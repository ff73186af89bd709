"""Servers that are not gunicorn, on port 0, with what a Server (server.py) can do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from server import Server, environment, wait_for, write_files


class OtherServer(Server):
    """A server that was started by this line, and says by this pattern at which port."""

    def __init__(
        self,
        folder: Path,
        *line: str,
        listening: str,
        config: Mapping[str, Any] | None = None,
        env: Mapping[str, str | None] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.mode = "thread"
        self.log_path = folder / "log"
        self.write_config(config or {})
        write_files(folder, files or {})
        options = {"cwd": folder, "env": environment(env), "stdin": subprocess.DEVNULL}
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, **options)
        try:
            self.addresses = [("127.0.0.1", self._port(listening))]
        except BaseException:
            self.kill()
            raise

    def _port(self, listening: str) -> int:
        def found() -> re.Match[str] | None:
            assert self.process.poll() is None, self.log
            return re.search(listening, self.log)

        return int(wait_for(found, listening)[1])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Tell all its processes: werkzeug's reloader does not tell the one that serves.

        What it was for is over then, and how it ends is its own: uWSGI once did not, all CPUs busy.
        """
        for pid in self.children():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        try:
            return super().stop(number)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode
