"""The semaphore for servers without a dispatcher: fair, bounded, and never short of a permit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from contextlib import suppress

import pytest
from server import Pending, wait_for
from stage import PATIENCE

from replica_plugin.actions import Why
from replica_plugin.gate import Gate, TurnedAwayError


def inside(gate: Gate) -> threading.Event:
    """Somebody who is inside until told to leave."""
    leave = threading.Event()
    entered = threading.Event()

    def stay() -> None:
        gate.enter()
        entered.set()
        leave.wait()
        gate.leave()

    threading.Thread(target=stay, daemon=True).start()
    assert entered.wait(20)
    return leave


def test_as_many_as_there_are_slots_are_inside_and_the_next_waits():
    gate = Gate(2, 10)
    leave = [inside(gate), inside(gate)]
    third = Pending(gate.enter)
    wait_for(lambda: gate.waiting == 1, "one waits")
    assert repr(gate) == "<Gate 2/2 running, 1 waiting>"
    leave[0].set()
    third.result()
    assert (gate.running, gate.waiting) == (2, 0)


def test_those_who_wait_go_in_in_the_order_in_which_they_came():
    gate, order = Gate(1, 100), []

    def enter(name: int) -> None:
        gate.enter()
        order.append(name)
        gate.leave()

    leave = inside(gate)
    pending = []
    for n in range(20):
        pending.append(Pending(lambda n=n: enter(n)))
        wait_for(lambda n=n: gate.waiting == n + 1, "one more waits")
    leave.set()
    for each in pending:
        each.result()
    assert order == list(range(20))
    wait_for(lambda: gate.running == 0, "nobody inside")


def test_a_freed_slot_is_not_taken_past_one_who_waits():
    gate = Gate(1, 2)
    leave = inside(gate)
    waiting = Pending(gate.enter)
    wait_for(lambda: gate.waiting == 1, "one waits")
    leave.set()
    waiting.result()
    newcomer = Pending(gate.enter)
    wait_for(lambda: gate.waiting == 1, "the newcomer waits")
    gate.leave()
    newcomer.result()


def test_above_the_bound_the_next_is_turned_away_at_once():
    gate = Gate(1, 2)
    inside(gate)
    Pending(gate.enter)
    wait_for(lambda: gate.waiting == 1, "one waits")
    with pytest.raises(TurnedAwayError) as turned:
        gate.enter()
    assert turned.value.why is Why.FULL
    assert gate.waiting == 1


def test_whoever_waits_too_long_is_turned_away_and_leaves_the_queue():
    gate = Gate(1, 5, timeout=0.01)
    leave = inside(gate)
    with pytest.raises(TurnedAwayError) as turned:
        gate.enter()
    assert (turned.value.why, gate.waiting, gate.running) == (Why.WAITED, 0, 1)
    leave.set()
    wait_for(lambda: gate.running == 0, "nobody inside")
    gate.enter()


class Turn:
    """A turn whose waiter is made to go one way: what a race does, made certain."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Not for waiting: that of a waiter has a timeout of its own."""
        return self.wait() if self._lock.locked() else self._lock.acquire()

    def wait(self) -> bool:
        raise NotImplementedError

    def release(self) -> None:
        self._lock.release()


def test_a_slot_handed_over_at_the_deadline_is_taken(monkeypatch):
    class LateTurn(Turn):
        """It says that its time is over though the slot came just then."""

        def wait(self) -> bool:
            self._lock.acquire(timeout=20)
            return False

    gate = Gate(1, 5, timeout=0.01)
    leave = inside(gate)
    monkeypatch.setattr("replica_plugin.gate.new_turn", LateTurn)
    late = Pending(gate.enter)
    wait_for(lambda: gate.waiting == 1, "one waits")
    leave.set()
    late.result()
    assert (gate.running, gate.waiting) == (1, 0)


def test_a_waiter_that_is_interrupted_leaves_no_slot_behind(monkeypatch):
    class InterruptedTurn(Turn):
        def wait(self) -> bool:
            raise KeyboardInterrupt

    gate = Gate(1, 5)
    leave = inside(gate)
    with monkeypatch.context() as patch:
        patch.setattr("replica_plugin.gate.new_turn", InterruptedTurn)
        with pytest.raises(KeyboardInterrupt):
            gate.enter()
    assert gate.waiting == 0
    leave.set()
    wait_for(lambda: gate.running == 0, "nobody inside")


def test_a_waiter_that_is_interrupted_as_it_gets_a_slot_passes_it_on(monkeypatch):
    class InterruptedTurn(Turn):
        def wait(self) -> bool:
            self._lock.acquire(timeout=20)
            raise KeyboardInterrupt

    gate = Gate(1, 5)
    leave = inside(gate)
    monkeypatch.setattr("replica_plugin.gate.new_turn", InterruptedTurn)
    interrupted = Pending(gate.enter)
    wait_for(lambda: gate.waiting == 1, "one waits")
    leave.set()
    with pytest.raises(KeyboardInterrupt):
        interrupted.result()
    assert (gate.running, gate.waiting) == (0, 0)


def test_leaving_in_the_middle_of_entering_neither_blocks_nor_loses_the_slot(monkeypatch):
    """The collector runs a `__del__` anywhere: here in `enter`, which has the lock."""
    gate = Gate(1, 5)
    gate.enter()
    monkeypatch.setattr(gate, "_queue", LeavesWhenAdded(gate))
    Pending(gate.enter).result()
    assert (gate.running, gate.waiting) == (1, 0)


class LeavesWhenAdded(OrderedDict):
    """A queue in which the one who is inside leaves when another one comes to wait."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def __setitem__(self, turn: object, value: None) -> None:
        self._gate.leave()
        super().__setitem__(turn, value)


PRELOADED = """
from replica_plugin.gate import Gate
gate = Gate(1, 5)  # by an app that the master has loaded
from gevent import monkey
monkey.patch_all()
import gevent

def come():
    gate.enter()
    gevent.sleep(0)
    gate.leave()

gevent.joinall([gevent.spawn(come) for _ in range(3)], raise_error=True)
print(gate.running, gate.waiting)
"""


def test_greenlets_wait_for_each_other_though_gevent_has_patched_behind_the_import():
    command = [sys.executable, "-c", PRELOADED]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.stdout, ended.stderr) == ("0 0\n", "")


def ended(child: int) -> tuple[int, int] | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return (pid, status) if pid else None


def test_a_forked_child_begins_with_nobody_inside():
    """Threads of the parent do not live on in it, nor does whoever had the lock."""
    gate = Gate(1, 5)
    inside(gate)
    with gate._lock:
        child = os.fork()
        if not child:
            signal.alarm(10)  # it waits for ever for a lock that its parent has
            with suppress(BaseException):
                gate.enter()
                os._exit(0 if (gate.running, gate.waiting) == (1, 0) else 1)
            os._exit(2)
    _, status = wait_for(lambda: ended(child), "the child's end")
    assert os.waitstatus_to_exitcode(status) == 0


def test_no_slot_is_lost_when_many_come_wait_give_up_and_leave():
    gate = Gate(3, 6, timeout=0.0005)
    crowd = Crowd(gate)
    everybody = [Pending(lambda: crowd.come(2_000)) for _ in range(8)]
    for each in everybody:
        each.result()
    assert crowd.high <= 3
    assert (gate.running, gate.waiting) == (0, 0)


class Crowd:
    """Callers of a gate, and the most of them that were inside at once."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._count = threading.Lock()
        self._now = self.high = 0

    def come(self, times: int) -> None:
        for _ in range(times):
            with suppress(TurnedAwayError):
                self._gate.enter()
                with self._count:
                    self._now += 1
                    self.high = max(self.high, self._now)
                time.sleep(0)  # others may run: they are to find the gate full
                with self._count:
                    self._now -= 1
                self._gate.leave()
