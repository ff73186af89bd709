"""What `Decisions` answers about requests that run for longer than request_timeout."""

from __future__ import annotations

import math

from test_decisions import arrive, join

from replica_plugin.actions import Dismiss, Inspect, Kill, Lost, Send
from replica_plugin.decisions import Decisions, Rules
from replica_plugin.overtime import CALM, GRACE, SILENCE

LIMIT = 5.0
END = LIMIT + GRACE


def replica(processes: int = 2, threads: int = 2, limit: float | None = LIMIT) -> Decisions:
    """All processes have registered, and all their slots wait."""
    rules = Rules(processes, threads, 100, None, limit)
    decisions = Decisions(rules)
    decisions.ruled(rules, range(1, processes + 1), 0.0)
    for age in range(1, processes + 1):
        join(decisions, age, threads)
    return decisions


def succeed(decisions: Decisions, old: int, new: int, now: float) -> None:
    """A process has died; the master has another one, which comes."""
    decisions.died(old, (), now)
    live = decisions.roster.live - {old} | {new}
    decisions.ruled(decisions.rules, live, now)
    join(decisions, new, decisions.rules.threads)


def test_a_request_is_overdue_so_long_after_it_was_sent():
    decisions = replica(1, 1)
    arrive(decisions, 1, 2, now=1.0)
    assert decisions.overdue_at(1) == 6.0
    assert decisions.overdue_at(2) == math.inf
    decisions.done(1, 1, 4.0)
    assert (decisions.overdue_at(1), decisions.overdue_at(2)) == (math.inf, 9.0)


def test_without_request_timeout_nothing_is_overdue():
    decisions = replica(1, 1, limit=None)
    arrive(decisions, 1)
    assert decisions.overdue_at(1) == decisions.next_overdue() == math.inf
    assert decisions.tick(1e9) == []


def test_a_process_that_says_nothing_is_inspected_and_then_killed():
    decisions = replica(1, 2)
    assert arrive(decisions, 1) == [Send(1, 1)]
    assert decisions.next_overdue() == LIMIT + SILENCE
    assert decisions.tick(LIMIT + SILENCE - 0.01) == []
    assert decisions.tick(LIMIT + SILENCE) == [Inspect(1)]
    assert decisions.next_overdue() == END
    assert decisions.tick(END - 0.01) == []
    assert decisions.tick(END) == [Dismiss(1), Kill(1)]
    assert decisions.tick(END + 1) == []


def test_a_process_that_says_so_keeps_its_other_slots_until_the_grace_is_over():
    decisions = replica(1, 2)
    arrive(decisions, 1)
    assert decisions.overdue(1, 1)
    assert decisions.tick(LIMIT + SILENCE) == []
    assert arrive(decisions, 2, now=END - 1) == [Send(2, 1)]
    assert decisions.tick(END) == [Dismiss(1)]
    assert arrive(decisions, 3, now=END) == []
    assert decisions.tick(END + 1) == []
    decisions.done(1, 2, END + 2)
    assert decisions.tick(END + 2) == [Kill(1)]


def test_what_a_process_says_of_requests_that_are_not_its_own_counts_for_nothing():
    decisions = replica(2, 1)
    assert arrive(decisions, 1) == [Send(1, 2)]
    assert not (decisions.overdue(1, 1) or decisions.overdue(2, 2) or decisions.overdue(9, 1))
    assert decisions.overdue(2, 1)


def test_a_request_that_ends_within_its_grace_costs_nothing():
    decisions = replica(1, 1)
    arrive(decisions, 1)
    decisions.overdue(1, 1)
    decisions.tick(LIMIT + SILENCE)
    assert decisions.done(1, 1, END - 0.01) == []
    assert decisions.tick(END) == []
    assert decisions.next_overdue() == math.inf
    assert arrive(decisions, 2, now=END) == [Send(2, 1)]


def test_a_process_of_which_all_slots_are_stuck_is_killed_at_once():
    decisions = replica(1, 2)
    arrive(decisions, 1, 2)
    decisions.overdue(1, 1)
    decisions.overdue(1, 2)
    decisions.tick(LIMIT + SILENCE)
    assert decisions.tick(END) == [Dismiss(1), Kill(1)]


def test_processes_with_slots_that_work_leave_one_at_a_time():
    decisions = replica(2, 2)
    arrive(decisions, 1, 2)
    for age, request in ((2, 1), (1, 2)):
        assert decisions.overdue(age, request)
    decisions.tick(LIMIT + SILENCE)
    assert arrive(decisions, 3, 4, now=END - 1) == [Send(3, 2), Send(4, 1)]
    decisions.done(1, 4, END - 1)
    decisions.done(2, 3, END - 1)
    assert decisions.tick(END) == [Dismiss(1), Kill(1)]
    assert decisions.tick(END + 1) == []
    succeed(decisions, 1, 3, END + 2)
    assert decisions.tick(END + 3) == [Dismiss(2), Kill(2)]


def test_silent_processes_are_not_spared_for_one_another():
    decisions = replica(2, 2)
    arrive(decisions, 1, 2)
    decisions.tick(LIMIT + SILENCE)
    assert decisions.tick(END) == [Dismiss(1), Kill(1), Dismiss(2), Kill(2)]


def test_after_a_freeze_of_all_processes_have_the_rest_of_the_grace_to_say_something():
    """Nobody had a turn: a silence of which the dispatcher learns as late tells nothing."""
    decisions = replica(2, 1)
    arrive(decisions, 1, 2)
    thawed = END + 100
    assert decisions.tick(thawed) == [Inspect(1), Inspect(2)]
    assert decisions.overdue_at(1) == LIMIT
    assert decisions.done(2, 1, thawed) == []
    assert decisions.next_overdue() == thawed + GRACE - SILENCE
    assert decisions.tick(thawed + GRACE - SILENCE - 0.01) == []
    assert decisions.tick(thawed + GRACE - SILENCE) == [Dismiss(1), Kill(1)]


def test_a_process_that_has_a_successor_needs_no_permission():
    decisions = replica(1, 1)
    arrive(decisions, 1)
    decisions.overdue(1, 1)
    decisions.leaving(1)
    decisions.ruled(decisions.rules, [1, 2], 1.0)
    assert join(decisions, 2, 1) == []
    decisions.tick(LIMIT + SILENCE)
    assert decisions.tick(END) == [Kill(1)]


def test_in_any_minute_at_most_p_processes_are_ended_and_then_the_next():
    decisions = replica(1, 1)
    arrive(decisions, 1)
    decisions.tick(LIMIT + SILENCE)
    assert decisions.tick(END) == [Dismiss(1), Kill(1)]
    succeed(decisions, 1, 2, END)
    assert arrive(decisions, 2, now=END) == [Send(2, 2)]
    decisions.tick(END + LIMIT + SILENCE)
    assert decisions.tick(2 * END) == []
    assert decisions.next_overdue() == END + CALM
    assert decisions.tick(END + CALM - 0.01) == []
    assert decisions.tick(END + CALM) == [Dismiss(2), Kill(2)]


def test_with_nobody_left_to_end_the_minute_is_not_waited_for():
    decisions = replica(1, 2)
    arrive(decisions, 1, 2)
    decisions.overdue(1, 1)
    decisions.done(1, 2, LIMIT)
    arrive(decisions, 3, now=END - 1)
    decisions.tick(END)
    decisions.tick(END + CALM + 1)
    assert decisions.next_overdue() > END + CALM + 1


def test_a_killed_process_leaves_504_for_what_was_overdue_and_502_for_the_others():
    decisions = replica(1, 3)
    arrive(decisions, 1)
    arrive(decisions, 2, now=END - LIMIT)
    arrive(decisions, 3, now=END - 1)
    decisions.tick(LIMIT + SILENCE)
    decisions.tick(END)
    assert decisions.died(1, (), END) == [Lost(1, True), Lost(2, True), Lost(3, False)]
    assert decisions.next_overdue() == math.inf


def test_a_process_that_dies_of_itself_leaves_502_for_what_was_overdue():
    decisions = replica(1, 1)
    arrive(decisions, 1)
    decisions.overdue(1, 1)
    assert decisions.died(1, (), END) == [Lost(1, False)]


def test_what_goes_back_to_the_queue_has_its_whole_time_again():
    decisions = replica(1, 1)
    arrive(decisions, 1)
    decisions.died(1, {1}, 4.0)
    decisions.ruled(decisions.rules, [2], 4.0)
    assert decisions.registered(2, 1) == []
    assert decisions.freed(2, 6.0) == [Send(1, 2)]
    assert decisions.overdue_at(1) == 6.0 + LIMIT


def test_a_request_keeps_the_limit_it_began_with_when_that_changes():
    decisions = replica(1, 3)
    arrive(decisions, 1, now=0.0)
    decisions.ruled(Rules(1, 3, 100, None, 1.0), [1], 0.0)
    arrive(decisions, 2, now=1.0)
    decisions.ruled(Rules(1, 3, 100, None, None), [1], 0.0)
    arrive(decisions, 3, now=1.0)
    assert [decisions.overdue_at(n) for n in (1, 2, 3)] == [5.0, 2.0, math.inf]
    assert decisions.next_overdue() == 2.0 + SILENCE
    assert decisions.tick(2.0 + SILENCE) == [Inspect(1)]
    assert decisions.tick(5.0 + SILENCE) == [Inspect(1)]


def test_in_a_stop_what_cannot_be_asked_is_killed_and_what_works_is_not():
    decisions = replica(2, 2)
    arrive(decisions, 1, 2)
    decisions.overdue(1, 2)
    decisions.stop()
    decisions.tick(LIMIT + SILENCE)
    assert decisions.tick(END) == [Dismiss(2), Kill(2)]
