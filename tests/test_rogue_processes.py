"""A process, which runs user code, can say anything: it ends no dispatcher and breaks no cap."""

from __future__ import annotations

import fcntl
import gc
import json
import marshal
import math
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import offering
import pytest
from server import Server, descriptors, environment
from stage import PATIENCE

from replica_plugin.cells import Cells
from replica_plugin.channel import (
    FREE,
    End,
    Job,
    Kind,
    Register,
    Report,
    control_pair,
    pair,
    send,
)
from replica_plugin.connection import Connection
from replica_plugin.decisions import DECK
from replica_plugin.deck import Deck, take
from replica_plugin.processes import TURN, Link, Processes, _is_stream
from replica_plugin.rest import Rest, queued

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


def test_what_a_process_takes_off_the_deck_and_hides_is_run_by_others(start, stage):
    server = rogue(start, TWO)
    with server.connect() as stealing:
        stealing.ask("/steal/x")
        thief = stage.next()
        beside = server.later("/hold/y")
        actor = stage.next()
        waiting = [server.later("/hello") for _ in range(DECK + 2)]
        server.wait_numbers(running=2, waiting=DECK + 2)
        thief.finish()
        assert [each.result().status for each in waiting] == [200] * (DECK + 2)
        assert stealing.reply().status == 200
        actor.finish()
        assert beside.result().status == 200


def test_what_a_process_has_cut_short_on_the_deck_is_run_by_others(start, stage):
    server = rogue(start, TWO)
    dispatcher, workers = server.dispatcher, server.workers
    with server.connect() as cutting:
        cutting.ask("/shorten/x")
        cutter = stage.next()
        beside = server.later("/hold/y")
        actor = stage.next()
        waiting = [server.later("/hello") for _ in range(DECK + 6)]
        server.wait_numbers(running=2, waiting=DECK + 6)
        cutter.finish()
        assert [each.result().status for each in waiting] == [200] * (DECK + 6)
        assert cutting.reply().status == 200
        actor.finish()
        assert beside.result().status == 200
    assert (server.dispatcher, server.workers) == (dispatcher, workers)


def test_a_process_that_shuts_its_channel_is_killed_and_what_it_took_is_run_by_others(start, stage):
    server = rogue(start, TWO)
    dispatcher = server.dispatcher
    hushed = server.later("/hush/x")
    husher = stage.next()
    beside = server.later("/hold/x")
    actor = stage.next()
    waiting = [server.later("/hello") for _ in range(DECK + 6)]
    server.wait_numbers(running=2, waiting=DECK + 6)
    husher.finish()
    server.wait_log("says what no process of ours says: killing it")
    actor.finish()
    assert [each.result().status for each in waiting] == [200] * (DECK + 6)
    assert (beside.result().status, hushed.result().status) == (200, 502)
    server.wait_numbers(slots=2, processes=2, running=0, waiting=0)
    assert server.dispatcher == dispatcher


@pytest.mark.parametrize("code", ["00", "77" * 20, "0100" + "00" * 8 + "ffff0000" + "00" * 8])
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


def test_a_process_that_has_read_more_ahead_than_fits_into_a_job_is_killed(start, stage):
    """Whoever got that job would find it cut short: another process, or the dispatcher."""
    server = rogue(start, TWO)
    dispatcher = server.dispatcher
    beside = server.later("/hold/x")
    actor = stage.next()
    assert server.get("/swell/x").status == 502
    server.wait_log("says what no process of ours says: killing it")
    actor.finish()
    assert beside.result().status == 200
    assert server.dispatcher == dispatcher


@pytest.mark.parametrize("how", ["whole", "rest"])
def test_a_process_that_makes_a_listener_of_a_connection_ends_that_and_no_more(start, how):
    server = rogue(start, ONE)
    dispatcher = server.dispatcher
    with server.connect() as client:
        assert client.ask(f"/listen/{how}").is_closed()
    for _ in range(2):  # the first may get the slot before the dispatcher looks at the connection
        assert server.get("/hello").status == 200
    assert server.dispatcher == dispatcher


@pytest.mark.parametrize("how", ["SHUT_WR", "SHUT_RDWR"])
def test_a_process_that_shuts_the_control_socket_is_served_with_those_that_are_there(start, how):
    server = rogue(start, TWO)
    dispatcher = server.dispatcher
    assert server.get(f"/shut/{how}").status == 200
    server.wait_log(
        "A process has shut the control socket: the replica serves on with the processes it has, "
        "but no other can register until gunicorn is restarted"
    )
    assert server.get("/hello").status == 200
    assert server.dispatcher == dispatcher


def test_a_process_can_only_read_what_master_and_dispatcher_write(start):
    """Nor does it hold what only the master needs: neither by a mapping nor by a descriptor."""
    server = rogue(start, ONE)
    (worker,) = server.workers
    mapped = re.findall(r"(\S+) \S+ \S+ \S+ +/memfd:replica-(\w+)", read(worker, "maps"))
    assert sorted(mapped) == [("r--s", "master"), ("r--s", "numbers"), ("rw-s", "cells")]
    held = {}
    for link, name in descriptors(worker).items():
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

    def may_have(self, slots: int) -> bool:
        return slots <= 2

    def __getattr__(self, name: str):
        return lambda *arguments: self.told.append(name)


class Control:
    """The dispatcher's side of processes, and processes that offer themselves to it."""

    def __init__(self) -> None:
        self.reading, self.writing = control_pair()
        self.epoll = select.epoll()
        self.office = Office()
        self.processes = Processes(self.epoll, self.reading, self.office)
        self.children: list[subprocess.Popen[bytes]] = []

    def hear(self) -> None:
        self.processes.on_event(self.reading.fileno(), 0.0)

    def say(self, message: bytes, *fds: int) -> None:
        send(self.writing, message, *fds)
        self.hear()

    def offer(self, **options: Any) -> subprocess.Popen[bytes]:
        """Have a process make an offer, as offering.py has it."""
        line = [sys.executable, offering.__file__, json.dumps(options)]
        child = subprocess.Popen(
            line, stdin=self.writing, stdout=subprocess.PIPE, env=environment()
        )
        self.children.append(child)
        assert child.stdout.readline() == b"offered\n"
        return child

    def register(self, **options: Any) -> subprocess.Popen[bytes]:
        child = self.offer(**options)
        self.hear()
        return child

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.communicate()
        deck = self.processes.deck
        for each in (self.reading, self.writing, self.epoll, deck.end, deck._front):
            each.close()


@pytest.fixture
def control() -> Iterator[Control]:
    control = Control()
    yield control
    control.close()


def held() -> int:
    """How many there are; garbage that other tests have left is gone before, not in between."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


OFFER = vars(Register(1, 1, 0, False))
ADOPT = {"number": 2, "server": "", "ahead": "", "carry": ""}


@pytest.mark.parametrize(
    ("message", "fds"),
    [
        (b"", 0),
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
        (b"R" + json.dumps({**OFFER, "owed": -1}).encode(), 3),
        (b"R" + json.dumps({**OFFER, "owed": 2}).encode(), 3),
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
    before = held()
    with open("/dev/null") as null:
        control.say(message, *[null.fileno()] * fds)
    assert control.office.told == []
    assert held() == before
    control.register(age=1)
    assert control.office.told == ["on_registered"]


@pytest.mark.parametrize(
    "lie",
    [
        {"slots": 3},
        {"age": -1},
        {"age": 1 << 40},
        {"pidfd": 1},
        {"pidfd": None},
        {"cells": "short"},
        {"cells": "unsealed"},
        {"channel": "stream"},
    ],
    ids=str,
)
def test_an_offer_that_is_not_of_its_sender_or_more_than_it_can_have_is_thrown_away(control, lie):
    before = held()
    control.register(**lie)
    assert control.office.told == []
    assert (control.processes.links, held() - before) == ({}, 1)  # the child's stdout
    control.register(age=1)
    assert control.office.told == ["on_registered"]


@pytest.mark.parametrize("count", [1, 2])
def test_an_offer_in_anothers_name_ends_its_sender_and_not_the_other(control, count):
    good = [control.register(age=age) for age in range(count)]
    before = held()
    liar = control.register(age=0)
    assert liar.wait(PATIENCE) == -signal.SIGKILL
    assert control.office.told == [*["on_registered"] * count, "on_nonsense"]
    assert [link.pid for link in control.processes.links.values()] == [it.pid for it in good]
    assert held() - before == 1
    assert [child.poll() for child in good] == [None] * count


def test_a_process_that_offers_itself_under_a_second_name_is_ended(control):
    control.register(age=1, then={"age": 2})
    assert control.office.told == ["on_registered", "on_nonsense"]
    assert list(control.processes.links) == [1]


def test_a_process_that_offers_itself_again_is_taken_anew(control):
    control.register(age=1, then={"age": 1})
    assert control.office.told == ["on_registered", "on_death", "on_registered"]
    assert len(control.processes.links) == 1


def test_an_offer_of_a_process_that_is_dead_already_is_not_taken(control):
    child = control.offer(age=1)
    child.kill()
    child.wait()
    control.hear()
    assert control.office.told == []


def test_an_event_of_the_last_owner_of_a_number_is_not_the_death_of_a_process(control):
    child = control.register(age=1)
    (link,) = control.processes.links.values()
    control.processes.on_event(link.pidfd, 0.0)
    assert control.office.told == ["on_registered"]
    child.kill()
    child.wait()
    control.processes.on_event(link.pidfd, 0.0)
    assert control.office.told == ["on_registered", "on_death"]


# Connections that are handed back.


def connected(kind: str) -> tuple[socket.socket, ...]:
    """Sockets of this kind, of which the first is handed back."""
    if kind == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            return server.accept()[0], client
    if kind == "listening":
        return (socket.create_server(("127.0.0.1", 0)),)
    if kind == "left":
        ours, client = connected("tcp")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        return (ours,)
    if kind in ("udp", "alone"):
        return (socket.socket(type=socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM),)
    return socket.socketpair(type=getattr(socket, f"SOCK_{kind.upper()}"))


@pytest.mark.parametrize("kind", ["tcp", "stream"])
def test_a_clients_connection_can_be_handed_back(control, kind):
    sockets = connected(kind)
    control.say(b"A" + json.dumps(ADOPT).encode(), sockets[0].fileno())
    assert control.office.told == ["on_adopt"]
    for each in sockets:
        each.close()


@pytest.mark.parametrize("kind", ["listening", "left", "udp", "alone", "dgram", "seqpacket"])
def test_nothing_but_a_clients_connection_can_be_handed_back(control, kind):
    sockets = connected(kind)
    before = held()
    control.say(b"A" + json.dumps(ADOPT).encode(), sockets[0].fileno())
    assert control.office.told == []
    assert held() == before
    for each in sockets:
        each.close()


@pytest.mark.skipif(not hasattr(socket, "AF_VSOCK"), reason="no such sockets")
def test_what_no_listener_of_ours_accepts_cannot_be_handed_back():
    """Such as a stream to another virtual machine, whose protocol has the number 0, too."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        assert not _is_stream(sock)


def test_of_a_socket_that_a_process_has_changed_nothing_is_unread_or_queued_and_nobody_waits():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        conn = Connection(listener, "", "", local=False)
        assert (conn.unread(), queued(listener)) == (0, 0)
    with socket.socket(socket.AF_UNIX) as other:
        assert Connection(other, "", "", local=False).is_stuck()


# How much a process says.


def test_a_process_that_never_stops_talking_leaves_others_their_turns(control):
    control.register(age=1, talks=True)
    (link,) = control.processes.links.values()
    assert control.epoll.poll(PATIENCE)
    told = len(control.office.told)
    control.processes.on_channel(link, select.EPOLLIN, 0.0)
    assert 0 < len(control.office.told) - told <= TURN


def test_as_much_is_read_at_once_as_a_process_has_requests_to_report(control):
    process, theirs = pair()
    pidfd, client = os.pidfd_open(os.getpid()), os.dup(0)
    link = Link(1, os.getpid(), 2, 0, theirs, Cells(2), pidfd)
    control.processes._know(link)
    for request in range(2):
        assert control.processes.send(1, job(request), client)
    for message in (done(0), done(1), FREE, FREE):
        process.send(message)
    heard = []
    for _ in range(3):
        control.processes.on_channel(link, select.EPOLLIN, 0.0)
        heard.append(len(control.office.told))
    assert heard == [2, 3, 4]
    control.processes._on_death(link, 0.0)
    process.close()
    os.close(client)


def job(request: int) -> Job:
    return Job(request, 1, "", "", b"", b"", False, 0.0, math.inf)


def done(request: int) -> bytes:
    return Report(Kind.DONE, request, End.KEEP).encode()


def test_all_that_a_process_said_before_it_died_is_heard(control):
    child = control.register(age=1, fills=True)
    count = int(child.stdout.readline())
    child.wait()
    (link,) = control.processes.links.values()
    control.processes.on_event(link.pidfd, 0.0)
    assert control.office.told == ["on_registered", *["on_report"] * count, "on_death"]


def test_the_control_socket_leaves_others_their_turns(control):
    for _ in range(TURN + 1):
        send(control.writing, b"?")
    control.hear()
    assert control.epoll.poll(0) == [(control.reading.fileno(), select.EPOLLIN)]
    control.hear()
    assert control.epoll.poll(0) == []


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR], ids=["wr", "rdwr"])
def test_of_a_control_socket_that_is_shut_the_end_is_told_once_after_what_was_said(control, how):
    control.offer(age=1)
    control.writing.shutdown(how)
    control.hear()
    assert control.office.told == ["on_registered", "on_control_end"]
    assert control.reading.fileno() not in dict(control.epoll.poll(0))


def test_what_was_cut_short_on_the_deck_is_nobodys_and_its_descriptor_is_closed():
    deck = Deck()
    before = held()
    for _ in range(2):
        send(deck._front, marshal.dumps(tuple(job(1)))[:20], 0)
        assert deck.offer(job(2), 0)
        assert take(deck.end) is None
        assert deck.recall(DECK) == {2}
    for request in (1, 2):
        send(deck._front, marshal.dumps(tuple(job(request)))[:20], 0)
    assert deck.recall(DECK) == set()
    assert held() == before
    deck.end.close()
    deck._front.close()


# What a process leaves to be sent.


def test_the_rest_of_a_response_costs_its_process_as_much_memory_as_it_counts():
    fd = os.memfd_create("rest", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 40)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(ValueError, match="no sealed memory"):
        Rest(fd)
    with pytest.raises(OSError):
        os.close(fd)
