"""Who is dead, as pidfds say it."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

from replica_plugin import heritage
from replica_plugin.heritage import is_dead, open_child

HIGH = 1100  # which select.select takes for none


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= HIGH, reason="ulimit -n")
def test_a_death_is_seen_by_a_master_with_many_files_open():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    low = os.pidfd_open(child.pid)
    pidfd = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, HIGH)
    assert not is_dead(pidfd)
    child.communicate(b"\n")
    assert is_dead(pidfd, 10)
    os.close(low)
    os.close(pidfd)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    waits = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(waits, stdin=subprocess.PIPE) as process:
        yield process


def opens(pid: int, parent: int) -> bool:
    pidfd = open_child(pid, parent)
    if pidfd is not None:
        os.close(pidfd)
    return pidfd is not None


def test_only_a_living_child_of_the_parent_is_believed(child):
    assert opens(child.pid, os.getpid())
    assert not opens(child.pid, os.getppid())
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not opens(child.pid, os.getpid())


def test_a_process_that_proc_hides_is_believed_while_it_lives(child, monkeypatch):
    """As with hidepid=2, for one that has another user, or has given up root's privileges."""

    def hides(path: str, mode: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(heritage, "open", hides, raising=False)
    assert opens(child.pid, os.getppid())
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not opens(child.pid, os.getppid())
