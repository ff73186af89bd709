"""How the dispatcher is scheduled: it interrupts nobody while much happens."""

from __future__ import annotations

import errno
import os
import signal

import pytest
from server import Server, wait_for
from test_deaths import ONE
from wire import request

from replica_plugin import scheduling
from replica_plugin.scheduling import BUSY, SPAN, Scheduling, may_choose

PROBE = request("/-/healthz")
set_policy = os.sched_setscheduler


@pytest.fixture
def chosen(monkeypatch) -> list[int]:
    """The policies that were asked for; the last one holds."""
    chosen: list[int] = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, _: chosen.append(policy))
    monkeypatch.setattr(
        os, "sched_getscheduler", lambda _: chosen[-1] if chosen else os.SCHED_OTHER
    )
    return chosen


def test_who_sees_many_events_a_second_interrupts_nobody_until_there_are_few(chosen):
    one, now = Scheduling(True), 1000.0
    one.tick(now)
    for many in (False, True, True, False, False, True):
        now += 2 * SPAN
        one.events += int(BUSY * 2 * SPAN) + (1 if many else -1)
        one.tick(now)
        assert one.is_busy is many
    assert chosen == [os.SCHED_BATCH, os.SCHED_OTHER, os.SCHED_BATCH]


def test_what_the_operator_has_chosen_for_a_dispatcher_that_runs_stays(chosen):
    one, now = Scheduling(True), 1000.0
    one.tick(now)
    for events in (1_000_000, 0, 1_000_000):
        now += 1.0
        one.events += events
        one.tick(now)
        chosen[1:] = [os.SCHED_IDLE]
    assert chosen == [os.SCHED_BATCH, os.SCHED_IDLE]
    assert not one.is_busy


def test_a_moment_is_too_short_to_tell_and_counts_with_what_follows(chosen):
    one, now = Scheduling(True), 1000.0
    one.tick(now)
    for _ in range(10):
        now += SPAN / 4
        one.events += int(BUSY * SPAN / 2)
        one.tick(now)
    assert chosen == [os.SCHED_BATCH]


def test_who_may_not_choose_asks_for_nothing(chosen):
    one = Scheduling(False)
    one.events += 1_000_000
    one.tick(1000.0)
    assert chosen == []


def trial(policy: int) -> bool:
    """What a process scheduled so finds."""
    pid = os.fork()
    if not pid:
        try:
            set_policy(0, policy, os.sched_param(0))
            os._exit(may_choose())
        finally:
            os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_what_the_operator_has_chosen_stays():
    assert trial(os.SCHED_OTHER)
    assert not trial(os.SCHED_IDLE)


def test_where_the_system_does_not_let_it_choose_all_stays_as_it_is(monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "sched_setscheduler", refused)
    one = Scheduling(may_choose())
    one.tick(1000.0)
    one.events += 1_000_000
    one.tick(1001.0)


def test_a_sandbox_that_kills_who_chooses_kills_a_child_that_tries(monkeypatch):
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_OTHER)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: os.kill(os.getpid(), signal.SIGSYS))
    assert not may_choose()


def test_without_room_for_a_child_nobody_chooses(monkeypatch):
    def scarce():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(scheduling.os, "fork", scarce)
    assert not may_choose()


@pytest.mark.skipif(
    os.sched_getscheduler(0) != os.SCHED_OTHER, reason="the tests are scheduled in another way"
)
def test_only_the_dispatcher_lets_others_go_first_and_only_while_much_happens(start):
    server: Server = start("--keep-alive", "60", config=ONE)
    assert os.sched_getscheduler(server.dispatcher) == os.SCHED_OTHER
    clients = [server.connect().sock for _ in range(64)]
    seen = []

    def probe_at_once() -> bool:
        for sock in clients:
            sock.send(PROBE)
        for sock in clients:
            sock.recv(4096)
            seen.append(os.sched_getscheduler(server.dispatcher))
        return os.SCHED_BATCH in seen

    wait_for(probe_at_once, "the dispatcher lets others go first")
    wait_for(
        lambda: os.sched_getscheduler(server.dispatcher) == os.SCHED_OTHER, "it comes at once again"
    )
    others = [server.supervisor, *server.workers]
    assert {os.sched_getscheduler(pid) for pid in others} == {os.SCHED_OTHER}
