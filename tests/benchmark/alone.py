"""A slot, and the dispatcher, each alone in one thread, with their other ends played here.

What they cost then has no wake-ups, no GIL and no scheduler in it, and the instructions that
valgrind counts are the same from run to run. `python -m benchmark.alone slot 1000` prints
microseconds of CPU per request.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gunicorn.config import Config
from gunicorn.glogging import Logger

from replica_plugin import cells, channel, pages, processes
from replica_plugin.client_socket import ClientSocket
from replica_plugin.decisions import Rules
from replica_plugin.dispatcher import Dispatcher, Frame
from replica_plugin.journal import Journal
from replica_plugin.listeners import Listening
from replica_plugin.overdue import Watch
from replica_plugin.rules import Privileges, Serving, Wishes
from replica_plugin.settled import Settled, settle
from replica_plugin.slot import Slot

from .bare import app
from .peers import environment

REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n\r\n"
CLOSING = REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
WARM = 50
LOOK = 20e-6  # seconds that pass under valgrind, whenever somebody looks at the clock
COUNTED = 200  # requests
MARK = os.getloadavg  # valgrind writes down what it has counted when this is called
TURNS = 10  # in which the dispatcher must have done what it is to do
QUIET = {"loglevel": "error"}


def slot() -> Callable[[int], None]:
    """What has a slot serve its nth request, of the app without Flask, kept alive."""
    config = Config()
    config.set("worker_class", "replica_plugin.thread_worker.ThreadWorker")
    config.set("threads", 2)
    settle()
    settled = Settled(config)
    worker: Any = SimpleNamespace(
        cfg=settled, log=Logger(settled), wsgi=app, serving=True, client_socket=ClientSocket,
        count_request=lambda: None, room_for_rest=lambda: 1 << 23,
        may_take=lambda: False,
    )  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    served, address = listener.accept()
    theirs, ours = channel.pair()
    end = channel.ProcessEnd(theirs, theirs)
    interrupter: Any = SimpleNamespace(here=threading.get_ident)
    one = Slot(worker, 0, cells.Cells(1), Watch(1, interrupter, lambda: None))

    def serve(number: int) -> None:
        client.send(REQUEST)
        job = channel.Job(number, 1, address, listener.getsockname(), b"", b"", False, 0.0, 1e18)
        channel.send_job(ours, job, served.fileno())
        one.take(end)
        assert client.recv(4096).startswith(b"HTTP/1.1 200"), "the slot has not served it"
        ours.recv(4096)

    return serve


def dispatcher(keep: bool = True) -> Callable[[int], None]:
    """What has a dispatcher hand out its nth request, and take the connection back."""
    listener = Listening(fileno=socket.create_server(("127.0.0.1", 0)).detach())
    listener.setblocking(False)
    control, process = channel.control_pair()
    page, nudge = pages.MasterPage(), os.eventfd(0)
    wishes = Wishes(
        rules=Rules(), serving=Serving(), live=(1,), first=1, most_threads=1,
        graceful_timeout=30.0, logging=QUIET,
        privileges=Privileges(os.getuid(), os.getgid(), False),
    )  # fmt: skip
    page.write(wishes.encode())
    kept = (page, pages.ReplicaPage())
    frame = Frame((listener,), control, *kept, nudge, os.pidfd_open(os.getppid()), os.getppid())
    one = Dispatcher(frame, wishes, Journal(QUIET))
    ours, theirs = channel.pair()
    offer = channel.Register(age=1, slots=1, owed=0, leaving=False)
    channel.send_register(
        process, offer, theirs.fileno(), cells.Cells(1).fd, os.pidfd_open(os.getpid())
    )
    _until(one.turn, ours)
    ours.send(channel.FREE)
    one.turn()
    client = socket.create_connection(listener.getsockname())
    one.turn()

    def serve(number: int) -> None:
        nonlocal client
        if not keep:
            client = socket.create_connection(listener.getsockname())
            one.turn()
        client.send(REQUEST if keep else CLOSING)
        data, fds = _until(one.turn, ours)
        os.read(fds[0], 4096)
        os.close(fds[0])
        end = channel.End.KEEP if keep else channel.End.CLOSE
        request = channel.decode_job(data).request
        ours.send(channel.Report(channel.Kind.DONE, request, end).encode())
        one.turn()
        if not keep:
            client.close()

    return serve


def _until(turn: Callable[[], None], end: socket.socket) -> tuple[bytes, list[int]]:
    """Let the dispatcher turn until it has sent something."""
    for _ in range(TURNS):
        turn()
        with suppress(BlockingIOError):
            return channel.receive_now(end)
    raise AssertionError("the dispatcher says nothing")


KINDS: dict[str, Callable[[], Callable[[int], None]]] = {
    "slot": slot,
    "dispatcher, kept-alive": dispatcher,
    "dispatcher, new": lambda: dispatcher(keep=False),
}


def figures() -> dict[str, dict[str, float]]:
    """CPU per request and, where there is valgrind, thousands of instructions, of each kind."""
    found = {kind: {"CPU us": float(_run(kind, 2000).stdout)} for kind in KINDS}
    if shutil.which("valgrind"):
        for kind in KINDS:
            found[kind]["thousand instructions"] = count(kind) / 1000
    return found


def count(kind: str) -> float:
    """Instructions per request, as valgrind counts them."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts")
        tool = ("--tool=callgrind", f"--dump-before={MARK.__name__}")
        _run(kind, COUNTED, "valgrind", *tool, f"--callgrind-out-file={counts}")
        between = counts.with_suffix(".2").read_text()
    found = re.search(r"^totals: (\d+)", between, re.MULTILINE)
    assert found, between
    return int(found[1]) / COUNTED


def _run(kind: str, requests: int, *before: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*before, sys.executable, "-m", "benchmark.alone", kind, str(requests)),
        cwd=Path(__file__).parents[1],
        env={**environment(), "PYTHONHASHSEED": "0"},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )


def main(kind: str, requests: int) -> None:
    try:
        os.pidfd_open(os.getpid())
    except OSError:  # valgrind does not know it; and it is slow, which must not show
        os.pidfd_open = lambda *_: os.eventfd(0)
        processes._is_of = lambda *_: True
        processes.is_dead = lambda pidfd: False
        calls = itertools.count()
        time.monotonic = lambda: next(calls) * LOOK
    serve = KINDS[kind]()
    for number in range(1, WARM):
        serve(number)
    MARK()
    begin = time.process_time()
    for number in range(WARM, WARM + requests):
        serve(number)
    taken = time.process_time() - begin
    MARK()
    print(taken / requests * 1e6)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
