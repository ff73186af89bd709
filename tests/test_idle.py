"""Ten thousand idle connections cost memory only. `pytest -s tests/test_idle.py` prints how much.

Each is kept alive after a request. The replica's own memory is what counts; that of the kernel is
printed as well, for both ends of a connection, and includes what else the machine does meanwhile.
"""

from __future__ import annotations

import re
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import IN_BOTH_MODES, PATIENCE, Server
from test_soak import pids
from wire import AGAIN

pytestmark = [IN_BOTH_MODES, pytest.mark.slow]

COUNT = 10_000
NEEDED = COUNT + 500  # descriptors, in us and in the dispatcher
MOST = 2048  # bytes of the replica's for a connection; it takes a third of that
CONFIG = {"processes_per_replica": 2, "threads_per_process": 2}


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < NEEDED:
        pytest.skip(f"the machine allows {hard} open files, {NEEDED} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (NEEDED, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def proportional(server: Server) -> int:
    """Bytes of all processes of a replica; what they share counts once (PSS)."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids(server)]
    return sum(1024 * int(re.search(r"^Pss: +(\d+)", text, re.MULTILINE)[1]) for text in texts)


def kernel() -> tuple[int, int]:
    """Bytes of the machine's TCP buffers, and of all that the kernel keeps objects in (slab)."""
    pages = re.search(r"^TCP: .* mem (\d+)$", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    slab = re.search(r"^Slab: +(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(pages[1]) * resource.getpagesize(), 1024 * int(slab[1])


def keep(server: Server) -> socket.socket:
    """A connection that is kept alive after a request."""
    sock = socket.create_connection(server.address, PATIENCE)
    sock.sendall(AGAIN)
    received = b""
    while not received.endswith(b"hello\n"):
        received += sock.recv(4096)
    return sock


def latency(server: Server) -> float:
    """Seconds that a request on a connection of its own takes: the fastest of 300, which other work
    on the machine has not touched.
    """
    times = []
    for _ in range(300):
        begin = time.perf_counter()
        assert server.get("/hello").status == 200
        times.append(time.perf_counter() - begin)
    return min(times)


def test_idle_connections_cost_little_memory_and_slow_no_request_down(start):
    server = start("--keep-alive", "600", config=CONFIG)
    server.wait_numbers(processes=2)
    before = latency(server)
    memory, (buffers, slab) = proportional(server), kernel()
    idle = [keep(server) for _ in range(COUNT)]
    server.wait_numbers(connections=COUNT, running=0)
    grown = proportional(server) - memory
    buffers, slab = (now - then for now, then in zip(kernel(), (buffers, slab)))
    after = latency(server)
    for sock in idle:
        sock.close()
    print(
        f"\n{start.mode} mode, bytes for each of {COUNT} idle connections: the replica "
        f"{grown / COUNT:.0f}, TCP buffers {buffers / COUNT:.0f}, kernel objects of both ends "
        f"{slab / COUNT:.0f}. Another request takes {after * 1e3:.2f} ms, before it took "
        f"{before * 1e3:.2f}."
    )
    assert grown < MOST * COUNT
    assert after < 3 * before
