"""Who is dead, as pidfds say it."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys

import pytest

from replica_plugin.heritage import is_dead

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
