"""What a request costs that does not depend on time: system calls and instructions.

The bounds are in cost_bounds.py. How often somebody is woken is left to chance, and not counted:
threads by each other, the dispatcher by one event or by two at once. Other noise only ever adds,
the heartbeat of an idle second say, so that the least of a few attempts counts.
"""

from __future__ import annotations

import platform
import re
import shutil
import signal
from importlib.metadata import version
from pathlib import Path

import pytest
from benchmark import alone
from cost_bounds import INSTRUCTIONS, SYSTEM_CALLS
from server import Server, wait_for
from tracing import tracing

REQUESTS = 100
ATTEMPTS = 3
WAITS = {"epoll_wait", "epoll_pwait", "futex", "restart_syscall"}
COUNTED_WITH = ("3.11", "27.0")
LINE = re.compile(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(?:\d+ +)?(\w+)$", re.M)


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize(("mode", "threads", "connections"), SYSTEM_CALLS, scope="module")
def test_a_request_makes_no_more_system_calls_than_recorded(mode, threads, connections, start):
    config = {"processes_per_replica": 1, "threads_per_process": threads}
    server = start(config=config)
    counted = [calls_per_request(server, connections) for _ in range(ATTEMPTS)]
    bounds = SYSTEM_CALLS[mode, threads, connections]
    for who, bound, attempts in zip(("process", "dispatcher"), bounds, zip(*counted)):
        least = min(attempts, key=in_each)
        assert in_each(least) <= bound, f"{who}: {sorted(least.items())}"


def in_each(calls: dict[str, float]) -> int:
    """What is done in each request; and not once in a while, for a heartbeat or another look."""
    return sum(round(each) for each in calls.values())


def calls_per_request(server: Server, connections: str) -> list[dict[str, float]]:
    """By name, of process and dispatcher."""
    pids = (server.workers[0], server.dispatcher)
    files = [server.folder / f"calls{pid}" for pid in pids]
    with server.connect() as client:
        client.get("/hello")
        with tracing(pids[0], files[0], "-c"), tracing(pids[1], files[1], "-c"):
            for _ in range(REQUESTS):
                if connections == "new":
                    ask_once(server, pids[1])
                else:
                    assert client.get("/hello").status == 200
    return [read_counts(file) for file in files]


def ask_once(server: Server, dispatcher: int) -> None:
    """A request that is there when its connection is accepted; until the dispatcher closes it."""
    server.tell(signal.SIGSTOP, dispatcher)
    wait_for(lambda: state(dispatcher) in "tT", "dispatcher stopped")
    with server.connect() as client:
        client.ask("/hello", Connection="close")
        server.tell(signal.SIGCONT, dispatcher)
        assert client.reply().status == 200
        assert client.is_closed()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def read_counts(file: Path) -> dict[str, float]:
    counts = {name: int(count) / REQUESTS for count, name in LINE.findall(file.read_text())}
    assert counts.pop("total") > 1
    return {name: each for name, each in counts.items() if name not in WAITS}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("valgrind"), reason="needs valgrind")
@pytest.mark.skipif(
    (platform.python_version()[:4], version("gunicorn")[:4]) != COUNTED_WITH,
    reason="the bounds are for Python {} and gunicorn {}".format(*COUNTED_WITH),
)
@pytest.mark.parametrize("what", INSTRUCTIONS)
def test_a_request_takes_no_more_instructions_than_recorded(what):
    assert alone.count(what) / 1000 <= INSTRUCTIONS[what]
