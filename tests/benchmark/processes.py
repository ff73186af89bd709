"""What /proc says of a server's processes, by what they are for: their role."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


def children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in (PROC / f"{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    return [pid, *(each for child in children(pid) for each in tree(child))]


def command(pid: int) -> str:
    try:
        return (PROC / f"{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def roles(master: int) -> dict[int, str]:
    """Master, worker; and of ours, supervisor and dispatcher. A server may be one process only."""
    found = {}
    for pid in tree(master):
        if pid == master:
            found[pid] = "master"
        elif "replica_plugin.supervisor" in command(pid):
            found[pid] = "dispatcher" if "supervisor" in found.values() else "supervisor"
        else:
            found[pid] = "worker"
    return found if len(found) > 1 else {master: "worker"}


def cpu(pids: Iterable[int]) -> dict[int, tuple[float, float]]:
    """Seconds of CPU so far, in user and in system mode."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            fields = (PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
            found[pid] = (int(fields[11]) / TICK, int(fields[12]) / TICK)
    return found


def cpu_by_role(
    named: Mapping[int, str], before: Mapping[int, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """What the processes of each role have used since `before`."""
    found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for pid, now in cpu(named).items():
        user, system = found[named[pid]]
        found[named[pid]] = (user + now[0] - before[pid][0], system + now[1] - before[pid][1])
    return dict(found)


def pss(pid: int) -> float:
    """MiB of memory, with what is shared divided among those who share it."""
    text = (PROC / f"{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.M)
    assert found
    return int(found[1]) / 1024


def pss_by_role(named: Mapping[int, str]) -> dict[str, list[float]]:
    found = defaultdict(list)
    for pid, role in named.items():
        found[role].append(pss(pid))
    return dict(found)
