"""A hundred thousand requests leave descriptors, threads and memory where they began."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from server import BOTH, Server, environment, wait_for
from soak_clients import ANSWERS, REQUESTS

CLIENTS = Path(__file__).parent / "soak_clients.py"
ROUNDS = 100_000 // REQUESTS
WARM_UP = ROUNDS // 10
LONGEST = 300  # seconds, which only ever fail the test
MARGIN = 3 << 10  # KiB; an object of 64 bytes a request takes as much in one of two processes
BLOCKS = 10_000  # a fifth of what one object a request takes there


class Usage(NamedTuple):
    descriptors: int
    threads: int


def pids(server: Server) -> list[int]:
    return [server.process.pid, server.supervisor, server.dispatcher, *server.workers]


def usage(server: Server) -> dict[int, Usage]:
    """What master, supervisor, dispatcher and processes hold."""
    return {
        pid: Usage(len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))
        for pid in pids(server)
    }


def memory(server: Server) -> dict[int, int]:
    """KiB that are a process's own, and no file's."""
    found = {}
    for pid in pids(server):
        status = Path(f"/proc/{pid}/status").read_text()
        found[pid] = int(status.partition("RssAnon:")[2].split()[0])
    return found


def blocks(server: Server) -> dict[int, int]:
    """What Python's objects take in each process; two requests in a row go to both."""
    told = [server.get("/blocks").json for _ in range(2)]
    found = {each["pid"]: each["blocks"] for each in told}
    assert sorted(found) == server.workers
    return found


def is_back(before: dict[int, Usage], after: dict[int, Usage]) -> bool:
    """Or less is held: before, too, a slot may have reported and not yet closed its socket."""
    assert after.keys() == before.keys(), "a process was replaced"
    return all(now <= then for pid in before for now, then in zip(after[pid], before[pid]))


def growth(before: dict[int, int], after: dict[int, int]) -> int:
    assert after.keys() == before.keys(), "a process was replaced"
    return max(after[pid] - before[pid] for pid in before)


def ask(server: Server, rounds: int) -> None:
    """So many rounds over TCP and over the Unix socket, half of them each."""
    clients = [
        subprocess.Popen(
            [sys.executable, str(CLIENTS), json.dumps(address), str(rounds // 2)],
            stdout=subprocess.PIPE,
            env=environment(),
        )
        for address in server.addresses
    ]
    try:
        outcomes = [json.loads(client.communicate(timeout=LONGEST)[0]) for client in clients]
    finally:
        for client in clients:
            client.kill()
            client.wait()
    told = sum(map(Counter, outcomes), Counter())
    assert told == {status: count * (rounds // 2 * 2) for status, count in ANSWERS.items()}
    server.wait_numbers(running=0, waiting=0, connections=0)


@pytest.mark.slow
def test_a_hundred_thousand_requests_leave_nothing_behind(start):
    config = {"processes_per_replica": 2, "threads_per_process": 2}
    server = start("--keep-alive", "30", config=config, bind=BOTH)
    ask(server, WARM_UP)
    before = usage(server), memory(server), blocks(server)
    ask(server, ROUNDS)
    wait_for(lambda: is_back(before[0], usage(server)), "descriptors and threads are back")
    assert growth(before[1], memory(server)) < MARGIN
    assert growth(before[2], blocks(server)) < BLOCKS
