"""Decisions beside a naive model, in a fake world, through random histories.

A rule is one thing that clients, processes, the master or the clock can do next. The model
judges every single action (model.py); here is only what has to be true in the end.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from world import Worker, World

from replica_plugin import decisions
from replica_plugin.decisions import Rules

EXAMPLES = 400
STEPS = 60
SMALL = 4  # so many lie on the deck, that more wait than lie there
picks = st.integers(0, 11)
few = st.integers(1, 6)
patience = st.lists(st.sampled_from([math.inf, 0.0, 0.25, 0.5, 2.0]), max_size=6)
rules = st.builds(
    Rules,
    processes=st.integers(1, 3),
    threads=st.integers(1, 3),
    bound=st.integers(1, 12),
    queue_timeout=st.sampled_from([None, 0.5, 1.0]),
    dry_run=st.sampled_from([False, False, False, True]),
    request_timeout=st.sampled_from([None, 0.25, 0.25, 1.0]),
    grace=st.sampled_from([0.5, 1.0]),
)


class Histories(RuleBasedStateMachine):
    @initialize(rules=rules, exempt=st.booleans(), booted=st.booleans(), busy=st.integers(0, 12))
    def begin(self, rules: Rules, exempt: bool, booted: bool, busy: int) -> None:
        self.world = World(rules, exempt)
        if booted:
            self.world.settle()
            for _ in range(busy):
                self.world.arrive()

    def _worker(self, pick: int) -> Worker:
        """One of those the master has forked; the oldest for 0."""
        return self._one_of(self.world.workers.values(), pick)

    def _one_of(self, some: Any, pick: int) -> Any:
        several = list(some)
        return several[pick % len(several)]

    # Clients and the clock.

    @precondition(lambda self: not self.world.decisions.roster.drained)
    @rule(count=few, patience=patience)
    def requests_arrive(self, count: int, patience: list[float]) -> None:
        for each in [*patience, *[math.inf] * count][:count]:
            self.world.arrive(each)

    @precondition(lambda self: not self.world.decisions.roster.drained)
    @rule(count=st.sampled_from([1, 1, 2, 3, 18]), patience=patience)
    def exempt_requests_arrive(self, count: int, patience: list[float]) -> None:
        for each in [*patience, *[math.inf] * count][:count]:
            self.world.arrive(each, exempt=True)

    @precondition(lambda self: self.world.decisions.in_flight or self.world.decisions.exempt)
    @rule(pick=picks)
    def a_client_leaves(self, pick: int) -> None:
        world, decisions = self.world, self.world.decisions
        waiting = [*decisions.exempt, *decisions.waiting, *decisions.taken]
        if waiting:
            world.go(self._one_of(waiting, pick))

    @rule(quarters=st.integers(0, 4), tick=st.booleans())
    def time_passes(self, quarters: int, tick: bool) -> None:
        self.world.now += quarters / 4
        if tick:
            self.world.tick()

    # Processes.

    @precondition(lambda self: self.world.workers)
    @rule(pick=picks, welcomed=st.sampled_from([True, True, True, False]), slots=st.integers(0, 3))
    def a_process_registers(self, pick: int, welcomed: bool, slots: int) -> None:
        worker = self._worker(pick)
        self.world.register(worker, welcomed)
        for _ in range(slots):
            self.world.free(worker)

    @precondition(lambda self: self.world.workers)
    @rule(pick=picks)
    def slots_come_to_wait(self, pick: int) -> None:
        worker = self._worker(pick)
        self.world.welcome(worker)
        for _ in range(worker.starting):
            self.world.free(worker)

    @precondition(lambda self: self.world.workers)
    @rule(pick=picks, take=st.integers(0, 4), finish=st.integers(0, 4), which=picks)
    def a_process_works(self, pick: int, take: int, finish: int, which: int) -> None:
        worker = self._worker(pick)
        for _ in range(take):
            self.world.take(worker)
        for _ in range(finish):
            self.world.finish(worker, which)

    @rule(count=few)
    def everybody_works(self, count: int) -> None:
        for worker in list(self.world.workers.values()):
            for _ in range(count):
                self.world.take(worker)
                self.world.finish(worker)
        self.world.fill_deck()

    @rule()
    def the_deck_is_filled(self) -> None:
        self.world.fill_deck()

    @precondition(lambda self: self.world.workers and self.world.deck)
    @rule(pick=picks, which=picks, count=few, dies=st.sampled_from([False] * 5 + [True]))
    def slots_take_off_the_deck(self, pick: int, which: int, count: int, dies: bool) -> None:
        for number in range(count):
            last = number == count - 1
            self.world.take_next(self._worker(pick + number), which, dies and last)

    @precondition(lambda self: any(each.reports for each in self.world.workers.values()))
    @rule(pick=picks)
    def a_process_is_heard(self, pick: int) -> None:
        self.world.hear(self._worker(pick))

    @precondition(lambda self: self.world.decisions.taken)
    @rule()
    def all_are_heard(self) -> None:
        self.world.see_who_took()

    @precondition(lambda self: self.world.workers)
    @rule(pick=picks, said=st.booleans())
    def a_process_is_told_to_leave(self, pick: int, said: bool) -> None:
        worker = self._worker(pick)
        self.world.terminate(worker)
        if said:
            self.world.say_leaving(worker)

    @precondition(lambda self: any(each.told for each in self.world.workers.values()))
    @rule(said=st.booleans())
    def processes_leave(self, said: bool) -> None:
        for worker in list(self.world.workers.values()):
            if said:
                self.world.say_leaving(worker)
            self.world.leave(worker)

    @precondition(lambda self: any(each.dismissed for each in self.world.workers.values()))
    @rule(pick=picks, count=few)
    def slots_end(self, pick: int, count: int) -> None:
        dismissed = [each for each in self.world.workers.values() if each.dismissed]
        for _ in range(count):
            self.world.end_slot(self._one_of(dismissed, pick))

    @precondition(lambda self: self.world.workers)
    @rule(pick=picks, haunted=st.booleans())
    def a_process_is_killed(self, pick: int, haunted: bool) -> None:
        worker = self._worker(pick)
        worker.haunted = haunted
        if worker.alive:
            self.world.die(worker)

    @precondition(lambda self: any(each.booting for each in self.world.workers.values()))
    @rule(pick=picks)
    def a_process_cannot_load(self, pick: int) -> None:
        booting = [each for each in self.world.workers.values() if each.booting]
        self.world.fail(self._one_of(booting, pick))

    @precondition(lambda self: self.world.unburied)
    @rule(pick=picks, heard=st.sampled_from(["dispatcher", "master", "both", "master first"]))
    def a_death_is_noticed(self, pick: int, heard: str) -> None:
        worker = self._one_of(self.world.unburied, pick)
        if heard in ("dispatcher", "both"):
            self.world.hear_death(worker)
        if heard != "dispatcher":
            self.world.reap(worker)
            self.world.manage()
        if heard == "master first":
            self.world.hear_death(worker)

    @precondition(lambda self: self.world.workers)
    @rule(pick=picks)
    def a_channel_fills(self, pick: int) -> None:
        self.world.fill(self._worker(pick))

    @precondition(lambda self: any(each.full for each in self.world.workers.values()))
    @rule(pick=picks)
    def a_channel_has_room(self, pick: int) -> None:
        full = [each for each in self.world.workers.values() if each.full]
        self.world.make_room(self._one_of(full, pick))

    @precondition(lambda self: self.world.workers)
    @rule(pick=picks)
    def a_process_stalls(self, pick: int) -> None:
        self.world.stall(self._worker(pick))

    @precondition(lambda self: self.world.workers)
    @rule(pick=picks)
    def a_process_gives_back_what_it_has_not_begun(self, pick: int) -> None:
        self.world.give_back(self._worker(pick))

    @precondition(lambda self: any(each.stalled for each in self.world.workers.values()))
    @rule(pick=picks)
    def a_process_turns_again(self, pick: int) -> None:
        stalled = [each for each in self.world.workers.values() if each.stalled]
        self.world.turn(self._one_of(stalled, pick))

    @precondition(lambda self: any(each.told for each in self.world.workers.values()))
    @rule()
    def those_who_wait_for_a_dispatcher_give_up(self) -> None:
        for worker in self.world.workers.values():
            self.world.orphan(worker)

    # The master, and the dispatcher's death.

    @rule(at_once=st.booleans())
    def the_page_is_read(self, at_once: bool) -> None:
        self.world.read()
        self.world.reads_at_once = at_once

    @precondition(lambda self: not self.world.stopped)
    @rule(rules=rules, exempt=st.booleans())
    def hup(self, rules: Rules, exempt: bool) -> None:
        self.world.end_reload()
        self.world.reload(rules, exempt)

    @precondition(lambda self: not self.world.stopped)
    @rule()
    def hup_with_the_same_rules(self) -> None:
        self.world.end_reload()
        self.world.reload(
            replace(self.world.rules, processes=max(1, self.world.rules.processes)),
            self.world.has_exempt,
        )

    @precondition(lambda self: not self.world.stopped)
    @rule(change=st.sampled_from([1, 1, -1, -1, 0]))
    def ttin_ttou_winch(self, change: int) -> None:
        self.world.end_reload()
        processes = self.world.rules.processes
        self.world.resize(max(1, min(4, processes + change)) if change else 0)

    @rule()
    def the_master_looks_after_its_processes(self) -> None:
        self.world.manage()

    @rule()
    def the_dispatcher_dies(self) -> None:
        self.world.restart()

    @rule()
    def everything_settles(self) -> None:
        self.world.settle()
        self._is_settled()

    @precondition(lambda self: not self.world.stopped)
    @rule(chance=picks)
    def stop(self, chance: int) -> None:
        if chance == 11:
            self.world.stop()

    @precondition(lambda self: self.world.decisions.roster.stopping)
    @rule()
    def the_end_of_a_stop_is_near(self) -> None:
        self.world.tell("give_up")
        self.world.drain()

    # In the end.

    def _is_settled(self) -> None:
        world, decisions = self.world, self.world.decisions
        assert decisions.running == 0, "a slot has leaked"
        if world.stopped:
            return
        p = world.rules.processes
        assert not (p and (decisions.waiting or decisions.exempt)), "P1: a request waits for ever"
        assert len(world.workers) == len(decisions.roster.usable) == p, (
            "P7: one that was told to leave is here"
        )
        assert decisions.processes.keys() == world.workers.keys()
        told = any(each.told for each in world.workers.values())
        assert not told or decisions.roster.cannot_load, "P7: one that was told to leave is here"

    def teardown(self) -> None:
        if sys.exc_info()[0]:  # the history has failed already, or was cut short
            return
        world = self.world
        world.settle()
        self._is_settled()
        world.stop()
        world.settle()
        world.tell("give_up")
        world.settle()
        assert not world.workers and not world.decisions.processes, "P7: all are dismissed"
        assert world.decisions.running == 0
        ends = set(world.requests.values())
        assert ends <= {"answered", "refused", "lost", "gone", "reset"}, "P6: each ends once"


def run(examples: int, steps: int, histories: type[RuleBasedStateMachine] = Histories) -> None:
    how = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    with patch.object(decisions, "DECK", SMALL):
        run_state_machine_as_test(histories, settings=how)


def test_no_history_breaks_a_promise() -> None:
    run(EXAMPLES, STEPS)


@pytest.mark.slow
def test_no_history_that_is_twice_as_long_breaks_a_promise() -> None:
    """As many events as the shorter histories have."""
    run(EXAMPLES // 2, 2 * STEPS)
