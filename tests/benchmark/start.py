"""Start: do p*t requests all begin at once, and do CPU-bound ones get a process each?"""

from __future__ import annotations

import time
from collections.abc import Sequence

from .load import Clients, Request, burst
from .peers import CAPPED, Server, serving
from .plan import Run

HOLD = 0.01  # seconds that each request of a burst sleeps, for each of them
SETTLE = 0.02  # seconds for a server to note that the last burst is over
PAIR = 0.03  # seconds of CPU for each of two requests
P, T = 2, 2


def measure(run: Run) -> None:
    with serving(run.among(CAPPED), P, T) as servers:
        for number in range(run.plan.bursts):
            if number % 10 == 0:
                run.progress.say(f"burst {number + 1} of {run.plan.bursts}")
            for name, server in servers.items():
                for keep in (False, True):
                    how = "kept-alive" if keep else "new"
                    share = float(all_at_once(server, P * T, keep))
                    run.part.add(f"{P} x {T}", name, {f"begin at once, {how}": share})
                if server.peer.processes:
                    run.part.add(
                        f"{P} x {T}", name, {"pair in two processes": float(apart(server))}
                    )


def all_at_once(server: Server, count: int, keep: bool) -> bool:
    """Whether the last of a burst began before the first had ended."""
    hold = HOLD * count
    with Clients(server.address, keep) as clients:
        if keep:
            burst(clients, count, f"/sleep/{hold}")
        return _together(_settled(clients, count, f"/sleep/{hold}"), hold)


def _settled(clients: Clients, count: int, path: str) -> list[Request]:
    time.sleep(SETTLE)
    return burst(clients, count, path)


def _together(requests: Sequence[Request], hold: float) -> bool:
    if any(each.status != 200 for each in requests):
        return False
    began = [each.began for each in requests]
    return max(began) < min(began) + hold


def apart(server: Server) -> bool:
    with Clients(server.address) as clients:
        pair = _settled(clients, 2, f"/burn/{PAIR}")
    return all(each.status == 200 for each in pair) and pair[0].pid != pair[1].pid
