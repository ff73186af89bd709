"""A process, which runs user code, can say anything: it ends no dispatcher and breaks no cap."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import Server

from replica_plugin.channel import Register, pair, send, send_register
from replica_plugin.pages import Cells
from replica_plugin.processes import Processes

ONE = {"processes_per_replica": 1, "threads_per_process": 1}
TWO = {"processes_per_replica": 2, "threads_per_process": 1}


def rogue(start, config) -> Server:
    return start(config=config, app="rogue_app:application")


def test_a_process_can_report_no_request_but_its_own(start, stage):
    server = rogue(start, ONE)
    dispatcher = server.dispatcher
    with server.connect() as claiming:
        claiming.ask("/claim/x")
        actor = stage.next()
        waiting = [server.later("/hello") for _ in range(2)]
        server.wait_numbers(running=1, waiting=2)
        actor.finish()
        assert [each.result().status for each in waiting] == [200] * 2
        assert claiming.reply().status == 200
    assert server.dispatcher == dispatcher


@pytest.mark.parametrize("code", ["00", "77" * 20, "0100" + "00" * 8 + "ffff0000"])
def test_a_process_that_says_nonsense_is_killed_and_replaced(start, stage, code):
    server = rogue(start, TWO)
    dispatcher = server.dispatcher
    assert server.get(f"/nonsense/{code}").status == 502
    server.wait_log("says what no process of ours says: killing it")
    server.wait_numbers(slots=2, processes=2)
    pending = [server.later("/hold/x") for _ in range(2)]
    for actor in stage.take(2):
        actor.finish()
    assert [each.result().status for each in pending] == [200] * 2
    assert server.dispatcher == dispatcher


def test_a_process_can_only_read_what_master_and_dispatcher_write(start):
    """Nor does it hold what only the master needs: neither by a mapping nor by a descriptor."""
    server = rogue(start, ONE)
    (worker,) = server.workers
    mapped = re.findall(r"(\S+) \S+ \S+ \S+ +/memfd:replica-(\w+)", read(worker, "maps"))
    assert sorted(mapped) == [("r--s", "master"), ("r--s", "numbers"), ("rw-s", "cells")]
    held = {}
    for link in Path(f"/proc/{worker}/fd").iterdir():
        name = os.readlink(link)
        flags = int(read(worker, f"fdinfo/{link.name}").split("flags:")[1].split()[0], 8)
        held.setdefault(name.partition(" ")[0], set()).add(flags & os.O_ACCMODE)
    assert held["/memfd:replica-master"] == held["/memfd:replica-numbers"] == {os.O_RDONLY}
    assert "/memfd:replica-load" not in held
    assert "anon_inode:[eventfd]" not in held


def read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


# What comes on the control socket.


class Office:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __getattr__(self, name: str):
        return lambda *arguments: self.told.append(name)


class Control:
    """The dispatcher's side of processes, and a process that offers itself to it."""

    def __init__(self) -> None:
        self.reading, self.writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.epoll = select.epoll()
        self.office = Office()
        self.processes = Processes(self.epoll, self.reading, self.office)
        self.child = subprocess.Popen(["sleep", "60"])
        self.pidfd = os.pidfd_open(self.child.pid)
        self.cells = Cells(1)
        self.channel, self.theirs = pair()

    def hear(self) -> None:
        self.processes.on_event(self.reading.fileno(), select.EPOLLIN, 0.0)

    def register(self) -> None:
        offer = Register(self.child.pid, 1, 1, False, False)
        send_register(self.writing, offer, self.theirs.fileno(), self.cells.fd, self.pidfd)
        self.hear()

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self.pidfd)
        os.close(self.cells.fd)
        for each in (self.reading, self.writing, self.channel, self.theirs, self.epoll):
            each.close()


@pytest.fixture
def control() -> Iterator[Control]:
    control = Control()
    yield control
    control.close()


OFFER = vars(Register(1, 1, 1, False, False))
ADOPT = {"number": 2, "client": "", "server": "", "ahead": "", "carry": ""}


@pytest.mark.parametrize(
    ("message", "fds"),
    [
        (b"", 1),
        (b"?", 0),
        (b"R", 3),
        (b"R{", 3),
        (b"R[]", 3),
        (b"R" + b"[" * 50_000, 3),
        (b"R\xff", 3),
        (b"R" + json.dumps(OFFER).encode(), 2),
        (b"R" + json.dumps(OFFER).encode(), 3),  # which are no channel, cells and pidfd
        (b"R" + json.dumps({**OFFER, "slots": 0}).encode(), 3),
        (b"R" + json.dumps({**OFFER, "slots": 1e99}).encode(), 3),
        (b"R" + json.dumps({**OFFER, "age": None}).encode(), 3),
        (b"R" + json.dumps({**OFFER, "version": 0}).encode(), 3),
        (b"A" + json.dumps(ADOPT).encode(), 1),  # which is no socket
        (b"A" + json.dumps(ADOPT).encode(), 2),
        (b"A" + json.dumps({**ADOPT, "ahead": 1}).encode(), 1),
        (b"A" + json.dumps({**ADOPT, "ahead": "\u20ac"}).encode(), 1),
        (b"A{}", 1),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_is_no_offer_is_thrown_away_with_its_descriptors(control, message, fds):
    before = len(os.listdir("/proc/self/fd"))
    with open("/dev/null") as null:
        send(control.writing, message, *[null.fileno()] * fds)
        control.hear()
    assert control.office.told == []
    assert len(os.listdir("/proc/self/fd")) == before
    control.register()
    assert control.office.told == ["on_registered"]


def test_an_offer_of_a_process_that_is_dead_already_is_not_taken(control):
    control.child.kill()
    control.child.wait()
    control.register()
    assert control.office.told == []


def test_an_event_of_the_last_owner_of_a_number_is_not_the_death_of_a_process(control):
    control.register()
    (link,) = control.processes.links.values()
    control.processes.on_event(link.pidfd, select.EPOLLIN, 0.0)
    assert control.office.told == ["on_registered"]
    control.child.send_signal(signal.SIGKILL)
    control.child.wait()
    control.processes.on_event(link.pidfd, select.EPOLLIN, 0.0)
    assert control.office.told == ["on_registered", "on_death"]
