"""The semaphore for servers without a dispatcher: fair, bounded, and never short of a permit."""

from __future__ import annotations

import threading

import pytest
from server import Pending, wait_for

from replica_plugin.decisions import Why
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


def test_a_slot_handed_over_at_the_deadline_is_taken(monkeypatch):
    """An Event that says its time was over though it was set just then: the race, made certain."""

    class LateEvent(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            super().wait(20)
            return False

    gate = Gate(1, 5, timeout=0.01)
    leave = inside(gate)
    monkeypatch.setattr("replica_plugin.gate.threading.Event", LateEvent)
    late = Pending(gate.enter)
    wait_for(lambda: gate.waiting == 1, "one waits")
    leave.set()
    late.result()
    assert (gate.running, gate.waiting) == (1, 0)


def test_a_waiter_that_is_interrupted_leaves_no_slot_behind(monkeypatch):
    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    gate = Gate(1, 5)
    leave = inside(gate)
    with monkeypatch.context() as patch:
        patch.setattr("replica_plugin.gate.threading.Event", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            gate.enter()
    assert gate.waiting == 0
    leave.set()
    wait_for(lambda: gate.running == 0, "nobody inside")
