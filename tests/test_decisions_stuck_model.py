"""Histories in which requests run for too long, judged by the model (model.py)."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from test_decisions_model import EXAMPLES, STEPS, few, picks, run
from world import Worker, World

from replica_plugin.decisions import Rules
from replica_plugin.overtime import CALM

rules = st.builds(
    Rules,
    processes=st.integers(1, 3),
    threads=st.integers(1, 3),
    request_timeout=st.sampled_from([0.25, 1.0]),
    grace=st.sampled_from([0.5, 1.0]),
)


class Overtimes(RuleBasedStateMachine):
    @initialize(rules=rules)
    def begin(self, rules: Rules) -> None:
        self.world = World(rules)
        self.world.settle()

    def _with(self, what: str, pick: int) -> Worker:
        known = self.world.model.processes
        ages = [age for age, each in known.items() if getattr(each, what)]
        return self.world.table[ages[pick % len(ages)]]

    @rule(count=few)
    def requests_arrive_and_are_taken(self, count: int) -> None:
        for _ in range(count):
            self.world.arrive()
        for worker in self.world.workers.values():
            self.world.take(worker)

    @rule(quarters=st.integers(1, 6), heard=st.integers(0, 3))
    def time_passes(self, quarters: int, heard: int) -> None:
        """The attendants of so many processes see what is overdue."""
        self.world.now += quarters / 4
        for worker in list(self.world.workers.values())[:heard]:
            self.world.say_overdue(worker)
        self.world.tick()

    @precondition(lambda self: self.world.model.ends)
    @rule()
    def a_minute_passes(self) -> None:
        self.world.now += CALM
        self.world.tick()

    @precondition(lambda self: any(each.sent for each in self.world.model.processes.values()))
    @rule(pick=picks, which=picks)
    def a_request_ends(self, pick: int, which: int) -> None:
        worker = self._with("sent", pick)
        self.world.take(worker)
        self.world.finish(worker, which)
        self.world.tick()

    @precondition(lambda self: any(each.stuck for each in self.world.model.processes.values()))
    @rule(pick=picks, which=picks)
    def a_request_beside_a_stuck_one_ends(self, pick: int, which: int) -> None:
        self.world.finish(self._with("stuck", pick), which)
        self.world.tick()

    @precondition(lambda self: self.world.unburied)
    @rule(pick=picks)
    def a_death_is_noticed_and_a_successor_comes(self, pick: int) -> None:
        worker = self.world.unburied[pick % len(self.world.unburied)]
        self.world.hear_death(worker)
        self.world.reap(worker)
        self.world.manage()

    @precondition(lambda self: any(each.booting for each in self.world.workers.values()))
    @rule(slots=st.integers(0, 3))
    def processes_register(self, slots: int) -> None:
        for worker in list(self.world.workers.values()):
            self.world.register(worker)
            for _ in range(slots):
                self.world.free(worker)

    @precondition(lambda self: self.world.workers)
    @rule(pick=picks)
    def a_process_is_told_to_leave(self, pick: int) -> None:
        worker = list(self.world.workers.values())[pick % len(self.world.workers)]
        self.world.terminate(worker)
        self.world.say_leaving(worker)

    @rule(rules=rules)
    def hup(self, rules: Rules) -> None:
        self.world.end_reload()
        self.world.reload(rules)

    @rule()
    def everything_settles(self) -> None:
        self.world.settle()
        assert self.world.decisions.running == 0
        assert len(self.world.decisions.roster.usable) == self.world.rules.processes


def test_no_history_with_stuck_requests_breaks_a_promise() -> None:
    run(EXAMPLES // 2, STEPS, Overtimes)
