"""Growth: against p and t, idle connections and queue depth; and what it takes in memory."""

from __future__ import annotations

import fcntl
import math
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

from .load import Address, Clients, burst
from .numbers import percentile
from .overhead import wrk
from .peers import CAPPED, OURS, THREE, Server, serving
from .plan import Run
from .processes import pss_by_role
from .start import all_at_once
from .waiting import MEAN, Cell, ratios

CONNECTIONS = 64  # of wrk: as many as the largest replica has slots
BURSTS = 5
P, T = 2, 2
HIGH = 1024  # where descriptors of idle connections begin: select() takes none above it
IDLE_SERVER = ("--keep-alive", "3600")
STOPPED = ("--timeout", "3600")  # of processes that are stopped for a while
PACE = 3000  # requests a second with which a queue is filled
PROBES = 100
SPARE = 300  # descriptors for anything but waiting requests
DEEPEST = 30000  # max_replica_concurrency of the replica with a deep queue


def measure(run: Run) -> None:
    for p, t in run.plan.shapes:
        with serving(run.among(THREE), p, t) as servers:
            for number in range(run.plan.less):
                run.progress.say(shape(p, t), f"round {number + 1}")
                for name, server in servers.items():
                    run.part.add(shape(p, t), name, _all_figures(run, server, p * t, number))
    if OURS in run.peers:
        _idle(run)
        for wanted in run.plan.depths:
            depth, cell = _possible(wanted)
            run.progress.say(cell)
            env = {"REPLICA_MAX_REPLICA_CONCURRENCY": str(DEEPEST)}
            with serving([OURS], P, T, more=STOPPED, env=env) as servers:
                run.part.add(cell, OURS, _deep(servers[OURS], depth))
    for name in run.among(CAPPED):
        run.progress.say("memory", name)
        with serving([name], P, T) as servers:
            wrk(servers[name], keep=False, seconds=1)
            run.part.add("memory, MiB", name, _memory(servers[name]))


def shape(p: int, t: int) -> str:
    return f"{p} x {t}"


def idle_cell(count: int) -> str:
    return f"{count:,} idle connections"


def _all_figures(run: Run, server: Server, slots: int, number: int) -> dict[str, float]:
    """Start, waiting and overhead in one row."""
    figures = {}
    starts = [float(all_at_once(server, slots, keep=False)) for _ in range(BURSTS)]
    figures["begin at once"] = mean(starts)
    cell = Cell(75, slots=slots, mean=MEAN * math.sqrt(slots / (P * T)))
    waited, _ = ratios(server, cell, run.plan.rest, number)
    figures |= {"mean": waited["mean"], "p99": waited["p99"]}
    for keep, how in ((True, "kept-alive"), (False, "new")):
        cost = wrk(server, keep, run.plan.wrk, CONNECTIONS)
        figures |= {f"requests/s, {how}": cost["requests/s"], f"CPU us, {how}": cost["CPU us"]}
    return figures


# Idle connections: one replica for each number of them, so that rounds alternate.


def _idle(run: Run) -> None:
    counts = list(run.plan.idle)
    with _idling(counts) as servers:
        for number in range(run.plan.less):
            for count, server in servers.items():
                run.progress.say(idle_cell(count), f"round {number + 1}")
                run.part.add(idle_cell(count), OURS, _all_figures(run, server, P * T, number))
        memory = {
            count: sum(map(sum, pss_by_role(each.roles).values()))
            for count, each in servers.items()
        }
    for count in counts[1:]:
        each = (memory[count] - memory[counts[0]]) / count * 1024
        run.part.add(idle_cell(count), OURS, {"KiB a connection": each})


@contextmanager
def _idling(counts: list[int]) -> Iterator[Mapping[int, Server]]:
    if not counts:
        yield {}
        return
    *others, last = counts
    with (
        serving([OURS], P, T, more=IDLE_SERVER) as servers,
        _connected(servers[OURS].address, last),
        _idling(others) as found,
    ):
        yield {**found, last: servers[OURS]}


@contextmanager
def _connected(address: Address, count: int) -> Iterator[None]:
    """So many kept-alive connections, each of which has had an answer."""
    idle = []
    try:
        for _ in range(count):
            with socket.create_connection(address, 10) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: benchmark\r\n\r\n")
                assert sock.recv(65536).startswith(b"HTTP/1.1 200")
                number = fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, HIGH)
            idle.append(socket.socket(fileno=number))
        yield
    finally:
        for sock in idle:
            sock.close()


# Queue depth.


def _possible(depth: int) -> tuple[int, str]:
    """How deep a queue can be: a waiting request takes a descriptor, of ours and of theirs."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE
    if depth <= most:
        return depth, f"{depth:,} waiting"
    return most, f"{most:,} waiting (as many as open files allow)"


def _deep(server: Server, depth: int) -> dict[str, float]:
    """Stop the processes, let so many wait, ask the probes, and let the processes go on."""
    (dispatcher,) = server.having("dispatcher")
    address = server.address  # asking before others take the descriptors that select() can
    with Clients(address, keep=True) as asking, Clients(address) as clients:
        _tell(server, signal.SIGSTOP)
        start, before, requests = time.monotonic(), _ran(dispatcher), []
        for number in range(P * T + depth):
            while clients.serve(start + number / PACE):
                pass
            requests.append(clients.send("/", start + number / PACE))
        burst(asking, 1, "/-/healthz")  # comes after them
        filled = _ran(dispatcher)
        figures = {"probe p99 ms": _probe(asking)}
        _tell(server, signal.SIGCONT)
        asked = _ran(dispatcher)
        while clients.outstanding and clients.serve(time.monotonic() + 60):
            pass
        drained = _ran(dispatcher)
    if not depth:
        return figures
    done = [each.done for each in requests if each.status == 200]
    return {
        **figures,
        "admission us": (filled - before) / depth * 1e6,
        "dispatch us": (drained - asked) / depth * 1e6,
        "drained/s": len(done) / (max(done) - min(done)),
        "failed": float(len(requests) - len(done)),
    }


def _tell(server: Server, number: int) -> None:
    for pid in server.workers:
        os.kill(pid, number)


def _probe(clients: Clients) -> float:
    asked = [burst(clients, 1, "/-/healthz")[0] for _ in range(PROBES)]
    assert all(each.status == 200 for each in asked)
    return percentile([each.took for each in asked], 99) * 1000


def _ran(pid: int) -> float:
    """Seconds that a process of one thread has run; finer than its ticks."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _memory(server: Server) -> dict[str, float]:
    by_role = pss_by_role(server.roles)
    figures = {role: sum(each) / len(each) for role, each in by_role.items()}
    return {**figures, "whole": sum(map(sum, by_role.values()))}
