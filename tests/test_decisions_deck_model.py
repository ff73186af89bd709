"""Histories of a replica that is full, so that there is a deck, judged by the model (model.py)."""

from __future__ import annotations

import math

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from test_decisions_model import EXAMPLES, SMALL, STEPS, few, picks, run
from world import Worker, World

from replica_plugin.decisions import Rules

rules = st.builds(
    Rules,
    processes=st.integers(1, 3),
    threads=st.integers(1, 3),
    bound=st.just(40),
    queue_timeout=st.sampled_from([None, None, 1.0]),
    request_timeout=st.sampled_from([None, None, 0.5]),
    grace=st.just(0.5),
)
rarely = st.sampled_from([False] * 5 + [True])


class Decks(RuleBasedStateMachine):
    @initialize(rules=rules)
    def begin(self, rules: Rules) -> None:
        self.world = World(rules)
        self.world.settle()
        self._fill_up()

    def _fill_up(self, registers: bool = True) -> None:
        """As many wait as there is room for on the deck, and more."""
        world = self.world
        for worker in list(world.workers.values()) if registers else ():
            world.register(worker)
            for _ in range(worker.starting):
                world.free(worker)
        for _ in range(max(0, SMALL + 2 - len(world.decisions.waiting))):
            world.arrive()
        for worker in list(world.workers.values()):
            for _ in range(worker.slots):
                world.take(worker)
        world.fill_deck()

    def _worker(self, pick: int) -> Worker:
        workers = list(self.world.workers.values())
        return workers[pick % len(workers)]

    # What happens all the time.

    @rule(pick=picks, which=picks, count=few, heard=st.integers(0, 4), registers=st.booleans())
    def slots_take_and_some_are_heard(
        self, pick: int, which: int, count: int, heard: int, registers: bool
    ) -> None:
        self._fill_up(registers)
        for number in range(count):
            self.world.take_next(self._worker(pick + number), which)
        for number in range(heard):
            self.world.hear(self._worker(pick - number))
        self.world.fill_deck()

    @rule(pick=picks, filled=st.booleans())
    def a_process_is_heard(self, pick: int, filled: bool) -> None:
        self.world.hear(self._worker(pick))
        if filled:
            self.world.fill_deck()

    @rule(pick=picks, which=picks)
    def a_slot_looks_there_in_vain(self, pick: int, which: int) -> None:
        self.world.finish(self._worker(pick), which)

    # What has the deck taken back.

    @rule(pick=picks)
    def a_client_leaves(self, pick: int) -> None:
        decisions = self.world.decisions
        waiting = [*decisions.exempt, *decisions.waiting, *decisions.taken]
        if waiting:
            self.world.go(waiting[pick % len(waiting)])

    @rule(patience=st.sampled_from([math.inf, 0.5]), exempt=rarely)
    def a_request_arrives(self, patience: float, exempt: bool) -> None:
        self.world.arrive(patience, exempt)

    @rule(quarters=st.integers(0, 3))
    def time_passes(self, quarters: int) -> None:
        self.world.now += quarters / 4
        self.world.tick()

    @rule(pick=picks, which=picks, heard=st.booleans())
    def a_process_dies(self, pick: int, which: int, heard: bool) -> None:
        """With a request that it has just taken, if there was one."""
        worker = self._worker(pick)
        self.world.take_next(worker, which, dies=True)
        if worker.alive:
            self.world.die(worker)
        if heard:
            self.deaths_are_noticed()

    @rule()
    def deaths_are_noticed(self) -> None:
        for worker in self.world.unburied:
            self.world.hear_death(worker)
            self.world.reap(worker)
        self.world.manage()

    @rule()
    def who_has_what_is_missing_is_found_out(self) -> None:
        self.world.see_who_took()

    @rule(pick=picks, said=st.booleans())
    def a_process_is_told_to_leave(self, pick: int, said: bool) -> None:
        worker = self._worker(pick)
        self.world.terminate(worker)
        if said:
            self.world.say_leaving(worker)

    @rule(pick=picks, stands=st.booleans())
    def a_process_stands_still_or_goes_on(self, pick: int, stands: bool) -> None:
        (self.world.stall if stands else self.world.turn)(self._worker(pick))

    @rule(rules=rules, exempt=rarely, comes=rarely)
    def hup(self, rules: Rules, exempt: bool, comes: bool) -> None:
        if comes:
            self.world.end_reload()
            self.world.reload(rules, exempt)

    @rule(processes=st.integers(1, 3), pauses=rarely)
    def the_replica_is_resized(self, processes: int, pauses: bool) -> None:
        self.world.end_reload()
        if pauses:
            self.world.resize(0)
        self.world.resize(processes)

    @rule(dies=rarely)
    def the_dispatcher_dies(self, dies: bool) -> None:
        if dies:
            self.world.restart()

    @rule(is_near=st.sampled_from([False] * 20 + [True]))
    def the_end_of_a_stop_is_near(self, is_near: bool) -> None:
        if is_near:
            self.world.tell("give_up")

    @rule()
    def everything_settles(self) -> None:
        world = self.world
        world.settle()
        assert world.decisions.running == 0, "a slot has leaked"
        waits = world.decisions.waiting or world.decisions.taken
        assert not (world.rules.processes and waits), "P1: a request waits for ever"


def test_no_history_with_a_deck_breaks_a_promise() -> None:
    run(EXAMPLES // 2, STEPS, Decks)
