"""A hundred thousand requests leave descriptors, threads and memory where they began."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from server import Server

ROUNDS, CLIENTS, BATCH = 250, 4, 100  # 100,000 requests, on connections that are kept and new


def grown(server: Server) -> dict[str, tuple[int, int, int]]:
    """Descriptors, threads and KiB of memory of every process of the replica."""
    return {str(pid): usage(pid) for pid in (server.supervisor, server.dispatcher, *server.workers)}


def usage(pid: int) -> tuple[int, int, int]:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    fds = len(os.listdir(f"/proc/{pid}/fd"))
    return fds, int(status["Threads"]), int(status["VmRSS"].split()[0])


def ask_many(server: Server, rounds: int, failures: list[str]) -> None:
    """Batches of pipelined requests, each batch on a connection that ends with it."""
    keep = b"GET /hello HTTP/1.1\r\nHost: test\r\n\r\n"
    last = b"GET /hello HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    for n in range(rounds):
        with server.connect(n % 2) as client:
            client.send(keep * (BATCH - 1) + last)
            received = bytearray()
            while part := client.sock.recv(65536):
                received += part
            if received.count(b"HTTP/1.1 200 OK\r\n") != BATCH:
                failures.append(bytes(received[-300:]).decode())


def ask(server: Server, rounds: int) -> None:
    failures: list[str] = []
    threads = [
        threading.Thread(target=ask_many, args=(server, rounds, failures)) for _ in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    server.wait_numbers(running=0, waiting=0, connections=0)


@pytest.mark.slow
def test_a_hundred_thousand_requests_leave_nothing_behind(start):
    config = {"processes_per_replica": 2, "threads_per_process": 2}
    server = start("--keep-alive", "5", config=config, bind=("127.0.0.1:0", "unix:sock"))
    ask(server, 10)
    before = grown(server)
    ask(server, ROUNDS)
    after = grown(server)
    assert before.keys() == after.keys()
    for pid, (fds, threads, memory) in before.items():
        assert after[pid][:2] == (fds, threads)
        assert after[pid][2] <= memory + 2048, f"{pid}: {memory} KiB grew to {after[pid][2]} KiB"
