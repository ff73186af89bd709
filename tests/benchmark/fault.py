"""Fault: what is lost, and how long others wait, when something is killed, stopped or reloaded."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from .load import Request, closed_loop
from .peers import CAPPED, OURS, PEERS, Server, serving
from .plan import Run

P, T = 2, 2
IN_FLIGHT = 24
BOOT = 3.0
LATE = 16
SHORT, LONG = "/sleep/0.02", "/sleep/0.2"
KILLED = "a process killed, 24 in flight"
TERM = "TERM, 40 clients"
RELOAD = f"reload, boot of {BOOT:g} s, 8 clients"
CLOSE_LATE = f"{LATE} clients that close 2 s late"
DISPATCHER = "the dispatcher killed, 16 clients"


def measure(run: Run) -> None:
    for number in range(run.plan.less):
        for name in run.among(CAPPED):
            run.progress.say("kill, late clients and TERM", f"round {number + 1}", name)
            with serving([name], P, T) as servers:
                server = servers[name]
                run.part.add(CLOSE_LATE, name, _late(server))
                if server.peer.processes:
                    run.part.add(KILLED, name, _kill_process(server))
                run.part.add(TERM, name, _term(server))
        if OURS in run.peers:
            run.progress.say("kill of the dispatcher", f"round {number + 1}")
            with serving([OURS], P, T) as servers:
                run.part.add(DISPATCHER, OURS, _kill_dispatcher(servers[OURS]))
    for name in run.among(CAPPED):
        if PEERS[name].reload is None:
            continue
        run.progress.say(RELOAD, name)
        with serving([name], P, T, env={"BENCHMARK_BOOT": str(BOOT)}) as servers:
            run.part.add(RELOAD, name, _reload(servers[name]))


def _kill_process(server: Server) -> dict[str, float]:
    """Of 24 clients that ask all the time, those in flight at the kill that got no answer."""
    at = 0.0

    def kill() -> None:
        nonlocal at
        at = time.monotonic()
        os.kill(server.workers[0], signal.SIGKILL)

    requests = closed_loop(server.address, IN_FLIGHT, LONG, 2.5, after=0.7, action=kill)
    hit = [each for each in requests if each.due <= at < each.done]
    return {"lost": float(_lost(hit)), "longest wait s": _longest(requests)}


def _late(server: Server) -> dict[str, float]:
    seconds = 3.0
    requests = closed_loop(server.address, LATE, "/", seconds, linger=2.0)
    return {"answers/s": sum(each.status == 200 for each in requests) / seconds}


def _term(server: Server) -> dict[str, float]:
    """A request is lost if a connection was made for it and no answer came."""
    requests = closed_loop(
        server.address,
        40,
        SHORT,
        5,
        after=1,
        action=lambda: os.kill(server.pid, signal.SIGTERM),
        until_refused=True,
    )
    tried = [each for each in requests if not each.refused and each.done]
    return {"lost": float(_lost(tried))}


def _reload(server: Server) -> dict[str, float]:
    requests = closed_loop(server.address, 8, SHORT, 3.5 * BOOT, after=1, action=server.reload)
    return {"lost": float(_lost(requests)), "longest wait s": _longest(requests)}


def _kill_dispatcher(server: Server) -> dict[str, float]:
    """Until a request begins that was sent after the kill."""
    at = 0.0

    def kill() -> None:
        nonlocal at
        (dispatcher,) = server.having("dispatcher")
        at = time.monotonic()
        os.kill(dispatcher, signal.SIGKILL)

    requests = closed_loop(server.address, 16, SHORT, 3, after=1, action=kill)
    after = [each.began for each in requests if each.status == 200 and each.sent > at]
    return {"next start ms": (min(after) - at) * 1000, "lost": float(_lost(requests))}


def _lost(requests: Sequence[Request]) -> int:
    return sum(each.status != 200 for each in requests)


def _longest(requests: Sequence[Request]) -> float:
    return max(each.took for each in requests)
