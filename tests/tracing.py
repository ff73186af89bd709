"""A process under strace."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from server import wait_for


@contextmanager
def tracing(pid: int, file: Path, *options: str) -> Iterator[None]:
    """Have strace, with these options, write to a file what all threads of a process ask for."""
    line = ("strace", "-f", "-o", file, *options, "-p", str(pid))
    strace = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: strace.poll() is not None or _is_traced(pid), "strace attached")
        if strace.poll() is not None:
            pytest.skip(f"strace may not: {strace.communicate()[1]}")
        yield
    finally:
        if strace.poll() is None:
            strace.send_signal(signal.SIGINT)
        strace.communicate()


def _is_traced(pid: int) -> bool:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return not any("TracerPid:\t0\n" in (each / "status").read_text() for each in threads)
