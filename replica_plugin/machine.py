"""What the machine allows, held against what the settings ask for.

Each line names the number that is too low, what to raise it to, and what holds until then.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SPARE = 64
"""Descriptors of the dispatcher that are not for connections, beside those for processes."""

EACH = 8
"""And for each process: four, which one that registers brings, and as many for its successor."""

OWN = 64
"""Descriptors that a process has without requests: logs, channel, what the app opens."""

_SOMAXCONN = Path("/proc/sys/net/core/somaxconn")


class Machine(NamedTuple):
    """Limits of open files, of which the dispatcher takes the hard one; longest backlog."""

    soft: int
    hard: int
    backlog: int | None


def spare(limit: int, processes: int) -> int:
    """How many of so many descriptors connections leave to others: a quarter, if all are few."""
    return min(SPARE + EACH * processes, limit // 4)


def read() -> Machine:
    """This machine, for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    backlog = None
    with suppress(OSError, ValueError):
        backlog = int(_SOMAXCONN.read_text())
    return Machine(soft, hard, backlog)


def shortages(machine: Machine, bound: int, processes: int, slots: int, backlog: int) -> list[str]:
    """What cannot be honoured. `bound` and `processes` of the replica, `slots` of each process."""
    found = []
    room = machine.hard - spare(machine.hard, processes)
    if room < bound and machine.hard >= 0:  # -1 is no limit
        needed = bound + min(SPARE + EACH * processes, bound // 3 + 1)
        found.append(
            f"Open files: the hard limit ({machine.hard}) is too low for max_replica_concurrency "
            f"({bound}). Raise it to {needed} (ulimit -Hn, LimitNOFILE= of systemd, --ulimit "
            f"nofile= of docker) or lower max_replica_concurrency to {room}. Until then the "
            f"replica takes about {room} connections at a time; more wait in the backlog."
        )
    if 0 <= machine.hard < 4 * EACH * processes:
        found.append(
            f"Open files: the hard limit ({machine.hard}) is too low for {processes} processes. "
            f"Raise it to {4 * EACH * processes} or more, or lower processes_per_replica. Until "
            "then processes that start may have to wait for connections to end before they get "
            "requests."
        )
    if 0 <= machine.soft < slots + OWN:
        what, or_else = f"{slots} slots", ", or lower threads_per_process"
        if slots == 1:
            what, or_else = "a slot", ""
        found.append(
            f"Open files: the soft limit ({machine.soft}) is too low for {what} in a process. "
            f"Raise it to {slots + OWN} or more (ulimit -n){or_else}. Until then requests for "
            "which no process has a descriptor wait for one, and get 503 if none is about to be "
            "free."
        )
    if machine.backlog is not None and machine.backlog < backlog:
        found.append(
            f"Backlog: net.core.somaxconn ({machine.backlog}) is less than gunicorn's backlog "
            f"({backlog}). Raise it (sysctl -w net.core.somaxconn={backlog}), or set --backlog "
            f"{machine.backlog}. Until then the kernel holds {machine.backlog} connections for a "
            "dispatcher that is busy or starts again, and lets others try once more."
        )
    return found
