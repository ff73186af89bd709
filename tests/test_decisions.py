"""One situation at a time: what `Decisions` answers. All at once: test_decisions_model.py."""

from __future__ import annotations

import math

import pytest

from replica_plugin.actions import Dismiss, Lost, Refuse, Send, Why
from replica_plugin.decisions import Decisions, Rules
from replica_plugin.request_queue import Queue


def replica(
    processes: int = 2, threads: int = 2, bound: int = 100, queue_timeout: float | None = None
) -> Decisions:
    """All processes have registered, and all their slots wait."""
    rules = Rules(processes, threads, bound, queue_timeout)
    decisions = Decisions(rules)
    decisions.ruled(rules, range(1, processes + 1), 0.0)
    for age in range(1, processes + 1):
        join(decisions, age, threads)
    return decisions


def join(decisions: Decisions, age: int, slots: int) -> list:
    """A process registers, and its slots come to wait."""
    dismissed = decisions.registered(age, slots)
    return dismissed + [action for _ in range(slots) for action in decisions.freed(age, 0.0)]


def arrive(decisions: Decisions, *requests: int, now: float = 0.0) -> list:
    return [action for request in requests for action in decisions.ready(request, now)]


# Starting.


def test_requests_go_to_the_process_that_runs_fewest_and_the_rest_wait():
    decisions = replica(2, 2)
    assert arrive(decisions, 1, 2, 3, 4, 5) == [Send(1, 2), Send(2, 1), Send(3, 2), Send(4, 1)]
    assert repr(decisions) == "<Replica 4/4 running, 1 waiting>"


def test_a_process_that_says_too_often_that_it_is_free_has_a_credit_a_slot():
    decisions = Decisions(Rules(processes=2, threads=1))
    join(decisions, 1, 1)
    assert decisions.freed(1, 0.0) == []
    assert decisions.processes[1].free == 1
    assert arrive(decisions, 1, 2) == [Send(1, 1)]
    assert decisions.freed(1, 0.0) == []
    assert decisions.done(1, 1, 0.0) == [Send(2, 1)]


def test_of_two_idle_processes_the_longest_unused_takes_the_request():
    decisions = replica(2, 1)
    assert arrive(decisions, 1) == [Send(1, 2)]
    assert decisions.done(2, 1, 0.0) == []
    assert arrive(decisions, 2) == [Send(2, 1)]


def test_a_request_that_is_done_makes_room_for_the_one_that_waits_longest():
    decisions = replica(1, 2)
    arrive(decisions, 1, 2, 3, 4)
    assert decisions.done(1, 2, 0.0) == [Send(3, 1)]
    assert decisions.in_flight == 3


def test_a_slot_takes_nothing_before_it_comes_to_wait():
    decisions = Decisions(Rules(1, 1))
    decisions.registered(1, 1)
    assert arrive(decisions, 1) == []
    assert decisions.freed(1, 0.0) == [Send(1, 1)]


def test_what_a_process_says_that_is_not_known_or_not_its_own_changes_nothing():
    decisions = replica(1, 1)
    arrive(decisions, 1)
    assert decisions.freed(9, 0.0) == decisions.leaving(9) == decisions.sendable(9, 0.0) == []
    assert decisions.done(9, 1, 0.0) is decisions.done(1, 2, 0.0) is None
    assert decisions.died(9, [1], 0.0) == []
    assert repr(decisions) == "<Replica 1/1 running, 0 waiting>"


def test_with_the_cap_lowered_nothing_starts_until_fewer_run():
    decisions = replica(2, 2)
    arrive(decisions, 1, 2, 3, 4, 5)
    assert decisions.ruled(Rules(2, 1), [1, 2], 0.0) == []
    assert decisions.done(2, 1, 0.0) == decisions.done(1, 2, 0.0) == []
    assert decisions.done(2, 3, 0.0) == [Send(5, 2)]


def test_with_the_cap_raised_waiting_requests_start():
    decisions = replica(2, 2)
    decisions.ruled(Rules(2, 1), [1, 2], 0.0)
    arrive(decisions, 1, 2, 3, 4)
    assert decisions.ruled(Rules(2, 2), [1, 2], 0.0) == [Send(3, 2), Send(4, 1)]


# Not starting: the bound, the wait limit, clients that leave.


def test_at_the_bound_a_request_is_refused_and_below_it_admitted_again():
    decisions = replica(1, 1, bound=2)
    assert arrive(decisions, 1, 2, 3) == [Send(1, 1), Refuse(3, Why.FULL)]
    decisions.gone(2)
    assert arrive(decisions, 4) == []


def test_lowering_the_bound_evicts_nobody():
    decisions = replica(1, 1)
    arrive(decisions, 1, 2, 3)
    assert decisions.ruled(Rules(1, 1, bound=1), [1], 0.0) == []
    assert decisions.in_flight == 3
    assert arrive(decisions, 4) == [Refuse(4, Why.FULL)]


def test_requests_are_refused_exactly_when_queue_timeout_is_over():
    decisions = replica(1, 1, queue_timeout=0.5)
    arrive(decisions, 1)
    arrive(decisions, 2, 3, now=10.0)
    arrive(decisions, 4, now=10.25)
    assert decisions.next_expiry() == 10.5
    assert decisions.tick(10.4999) == []
    assert decisions.tick(10.5) == [Refuse(2, Why.WAITED), Refuse(3, Why.WAITED)]
    assert decisions.next_expiry() == 10.75


def test_without_queue_timeout_or_with_nothing_waiting_nothing_expires():
    decisions = replica(1, 1)
    arrive(decisions, 1, 2)
    assert decisions.next_expiry() == math.inf
    assert replica(1, 1, queue_timeout=0.5).next_expiry() == math.inf
    assert decisions.tick(1e9) == []


def test_a_request_whose_client_left_while_it_waited_is_not_sent():
    decisions = replica(1, 1)
    arrive(decisions, 1, 2, 3)
    decisions.gone(2)
    assert decisions.done(1, 1, 0.0) == [Send(3, 1)]


# Deaths.


def test_when_a_process_dies_what_it_had_not_read_goes_to_the_head_in_order():
    decisions = replica(1, 3)
    decisions.ruled(Rules(2, 3), [1, 2], 0.0)
    arrive(decisions, 1, 2, 3, 4)
    assert decisions.died(1, {3, 1}, 0.0) == [Lost(2)]
    assert list(decisions.waiting) == [1, 3, 4]
    assert join(decisions, 2, 3) == [Send(1, 2), Send(3, 2), Send(4, 2)]


def test_a_request_that_came_back_from_a_dead_process_keeps_its_wait_limit():
    decisions = replica(1, 1, queue_timeout=5.0)
    arrive(decisions, 1, now=1.0)
    decisions.died(1, {1}, 2.0)
    assert decisions.next_expiry() == 6.0


def test_what_a_dead_process_had_not_read_starts_elsewhere_at_once():
    decisions = replica(2, 1)
    arrive(decisions, 1)
    assert decisions.died(2, {1}, 0.0) == [Send(1, 1)]


def test_a_message_that_does_not_fit_goes_elsewhere_until_there_is_room():
    decisions = replica(2, 2)
    assert arrive(decisions, 1) == [Send(1, 2)]
    assert decisions.unsent(2, 1, 0.0) == [Send(1, 1)]
    assert arrive(decisions, 2, 3) == [Send(2, 1)]
    assert decisions.sendable(2, 0.0) == [Send(3, 2)]


def test_a_stalled_process_is_sent_nothing_until_it_turns_again():
    decisions = replica(2, 2)
    decisions.stalled(2)
    assert arrive(decisions, 1, 2, 3) == [Send(1, 1), Send(2, 1)]
    assert decisions.turning(2, 0.0) == [Send(3, 2)]


def test_what_a_stalled_process_gives_back_goes_elsewhere_at_once_or_to_the_head():
    decisions = replica(2, 2)
    assert arrive(decisions, 1, 2, 3, 4, 5) == [Send(1, 2), Send(2, 1), Send(3, 2), Send(4, 1)]
    decisions.stalled(2)
    assert decisions.returned(2, 3, 0.0) == []
    assert list(decisions.waiting) == [3, 5]
    assert decisions.done(1, 2, 0.0) == [Send(3, 1)]
    assert decisions.running == 3


def test_hundreds_that_come_back_one_after_the_other_move_few_of_those_that_wait(monkeypatch):
    moved = []

    class Counting(Queue):
        def move_to_end(self, key, last=True):
            moved.append(key)
            super().move_to_end(key, last)

    monkeypatch.setattr("replica_plugin.decisions.Queue", Counting)
    decisions = replica(1, 400, bound=1000)
    arrive(decisions, *range(1, 411))
    decisions.stalled(1)
    for request in range(1, 401):
        decisions.returned(1, request, 0.0)
    assert list(decisions.waiting) == list(range(1, 411))
    assert len(moved) < 400 * 12


def test_a_stalled_process_is_usable_and_ready_all_the_same():
    decisions = replica(1, 1)
    decisions.stalled(1)
    assert decisions.roster.is_ready and decisions.roster.is_healthy


def test_after_a_restart_all_slots_count_as_busy_until_they_report():
    decisions = Decisions(Rules(2, 2))
    decisions.expected(1, 2)
    decisions.expected(2, 2)
    decisions.ruled(Rules(2, 2), [1, 2], 0.0)
    assert repr(decisions) == "<Replica 4/4 running, 0 waiting>"
    assert arrive(decisions, 1, 2, 3) == []
    assert decisions.registered(1, 2, owed=2) == []
    assert decisions.freed(1, 0.0) == [Send(1, 1)]
    assert decisions.died(2, (), 0.0) == []
    assert decisions.running == 2
    assert decisions.freed(1, 0.0) == [Send(2, 1)]


def test_a_slot_of_before_that_ends_leaves_its_room_to_others_and_gives_no_credit():
    decisions = Decisions(Rules(1, 2))
    decisions.registered(1, 2, owed=2)
    decisions.ruled(Rules(1, 2), [1, 2], 0.0)
    assert join(decisions, 2, 2) == [Dismiss(1)]
    assert arrive(decisions, 1, 2) == []
    assert decisions.owes(1, 1, 0.0) == [Send(1, 2)]
    assert decisions.owes(1, 1, 0.0) == decisions.owes(1, 2, 0.0) == []  # it is said again, or late
    assert decisions.running == 2
    assert decisions.owes(1, 0, 0.0) == [Send(2, 2)]
    assert decisions.processes[1].free == 0


# Leaving.


def test_room_that_is_found_when_a_process_registers_again_is_used_at_the_next_tick():
    decisions = Decisions(Rules(1, 1))
    decisions.expected(1, 1)
    decisions.ruled(Rules(1, 1), (1, 2), 0.0)
    join(decisions, 2, 1)
    assert arrive(decisions, 1) == []
    assert decisions.registered(1, 1) == [Dismiss(1)]
    assert decisions.tick(0.0) == [Send(1, 2)]


def test_room_is_used_at_once_if_its_process_says_what_it_owes():
    decisions = Decisions(Rules(1, 1))
    decisions.expected(1, 1)
    decisions.ruled(Rules(1, 1), (1, 2), 0.0)
    join(decisions, 2, 1)
    arrive(decisions, 1)
    decisions.registered(1, 1)
    assert decisions.owes(1, 0, 0.0) == [Send(1, 2)]


def test_a_process_that_leaves_stays_until_its_successor_is_ready():
    decisions = replica(2, 1)
    decisions.ruled(Rules(2, 1), [1, 2, 3, 4], 0.0)
    assert decisions.leaving(1) == decisions.leaving(2) == []
    assert arrive(decisions, 1, 2) == [Send(1, 2), Send(2, 1)]
    assert decisions.registered(3, 1) == [Dismiss(1)]
    assert len(decisions.roster.usable) == 2
    assert decisions.registered(4, 1) == [Dismiss(2)]


def test_of_processes_without_successors_one_leaves_at_a_time():
    decisions = replica(3, 1)
    assert decisions.leaving(1) == [Dismiss(1)]
    assert decisions.leaving(2) == []
    decisions.died(1, (), 0.0)
    decisions.ruled(Rules(3, 1), [2, 3, 4], 0.0)
    assert decisions.registered(4, 1) == [Dismiss(2)]


def test_no_process_leaves_below_p_while_another_successor_still_loads():
    decisions = replica(3, 1)
    decisions.ruled(Rules(3, 1), [1, 2, 3, 4, 5, 6], 0.0)
    assert [decisions.leaving(age) for age in (1, 2, 3)] == [[], [], []]
    assert decisions.registered(4, 1) == [Dismiss(1)]
    decisions.died(1, (), 0.0)
    assert decisions.ruled(Rules(3, 1), [2, 3, 4, 6], 0.0) == []  # 5 died while it loaded
    assert decisions.registered(6, 1) == [Dismiss(2)]
    decisions.died(2, (), 0.0)
    assert decisions.ruled(Rules(3, 1), [3, 4, 6], 0.0) == [Dismiss(3)]  # for whom one will come


def test_no_process_leaves_below_p_while_one_that_has_not_ended_keeps_its_place_from_a_successor():
    decisions = replica(1, 1)
    decisions.ruled(Rules(1, 1), [1, 2], 0.0)
    assert join(decisions, 2, 1) == [Dismiss(1)]
    assert decisions.leaving(2) == []
    decisions.died(1, (), 0.0)
    assert decisions.ruled(Rules(1, 1), [2], 0.0) == [Dismiss(2)]


def test_a_process_that_has_not_come_back_after_a_restart_counts_as_a_successor_on_its_way():
    decisions = Decisions(Rules(1, 1))
    decisions.expected(1, 1)
    decisions.expected(2, 1)
    decisions.ruled(Rules(1, 1), [1, 2], 0.0)
    decisions.registered(1, 1, owed=1)
    assert decisions.leaving(1) == []
    assert decisions.registered(2, 1, owed=1) == [Dismiss(1)]


def test_a_dismissed_process_finishes_what_it_runs_and_gets_nothing_more():
    decisions = replica(2, 1)
    arrive(decisions, 1, 2, 3)
    assert decisions.leaving(2) == [Dismiss(2)]
    assert decisions.done(2, 1, 0.0) == []
    assert decisions.done(1, 2, 0.0) == [Send(3, 1)]


def test_the_newest_are_used_when_there_are_more_than_p():
    decisions = replica(2, 1)
    join(decisions, 3, 1)
    assert arrive(decisions, 1, 2, 3) == [Send(1, 3), Send(2, 2)]


def test_a_process_that_p_newer_ones_replace_leaves_whether_or_not_it_has_heard_of_that():
    decisions = replica(2, 1)
    assert decisions.registered(3, 1) == [Dismiss(1)]


# Stopping.


def test_in_a_stop_processes_stay_until_nothing_is_left_and_then_all_leave():
    decisions = replica(2, 1)
    arrive(decisions, 1, 2, 3)
    decisions.stop()
    assert decisions.leaving(1) == decisions.leaving(2) == []
    assert arrive(decisions, 4) == []
    assert decisions.done(2, 1, 0.0) == [Send(3, 2)]
    assert decisions.done(1, 2, 0.0) == [Send(4, 1)]
    decisions.done(2, 3, 0.0)
    decisions.done(1, 4, 0.0)
    assert decisions.drain() == [Dismiss(1), Dismiss(2)]
    assert decisions.registered(3, 1) == [Dismiss(3)]


def test_at_the_end_of_a_stop_what_waits_is_refused():
    decisions = replica(1, 1)
    arrive(decisions, 1, 2, 3)
    decisions.stop()
    assert decisions.give_up() == [Refuse(2, Why.STOPPING), Refuse(3, Why.STOPPING)]
    assert decisions.give_up() == []
    assert repr(decisions) == "<Replica 1/1 running, 0 waiting>"


# What probes and answers say.


def test_ready_means_all_processes_once_and_then_any_until_a_stop_begins():
    decisions = Decisions(Rules(2, 1))
    join(decisions, 1, 1)
    assert not decisions.roster.is_ready
    join(decisions, 2, 1)
    assert decisions.roster.is_ready
    decisions.died(1, (), 0.0)
    assert decisions.roster.is_ready
    decisions.died(2, (), 0.0)
    assert not decisions.roster.is_ready
    decisions.registered(3, 1)
    assert decisions.roster.is_ready
    decisions.stop()
    assert not decisions.roster.is_ready


def test_a_process_counts_as_ready_when_all_its_slots_have_come_to_wait():
    decisions = Decisions(Rules(1, 2))
    decisions.registered(1, 2)
    decisions.freed(1, 0.0)
    assert not decisions.roster.is_ready
    decisions.freed(1, 0.0)
    assert decisions.roster.is_ready


def test_no_processes_wanted_is_not_all_processes_ready():
    decisions = Decisions(Rules(0, 1))
    decisions.ruled(Rules(0, 1), [], 0.0)
    decisions.ruled(Rules(2, 1), [1, 2], 0.0)
    decisions.registered(1, 1)
    assert not decisions.roster.is_ready


def test_healthy_means_that_there_is_a_process():
    decisions = Decisions(Rules(1, 1))
    assert not decisions.roster.is_healthy
    decisions.ruled(Rules(1, 1), [1], 0.0)
    assert decisions.roster.is_healthy and decisions.roster.booting
    decisions.registered(1, 1)
    assert decisions.roster.is_healthy and not decisions.roster.booting
    assert decisions.leaving(1) == [Dismiss(1)]
    assert decisions.roster.is_healthy and not decisions.roster.is_ready  # until it has ended
    decisions.died(1, (), 0.0)
    decisions.ruled(Rules(1, 1), [], 0.0)
    assert not decisions.roster.is_healthy


def test_a_process_that_has_not_come_back_after_a_restart_is_on_its_way():
    decisions = Decisions(Rules(1, 1))
    decisions.expected(1, 1)
    decisions.ruled(Rules(1, 1), [1], 0.0)
    assert decisions.roster.is_healthy and not decisions.roster.is_ready


@pytest.mark.parametrize(
    ("waiting", "each_second", "seconds", "estimate"),
    [
        (0, 10, 100, 1),  # room at once; never less than a second
        (19, 10, 100, 2),  # twenty at ten a second
        (20, 10, 100, 3),  # rounded up
        (99, 1, 100, 60),  # never more than a minute
        (19, 10, 2, 2),  # a short history is not taken for a slow one
    ],
)
def test_retry_after_is_how_long_a_queue_takes_at_the_rate_of_late(
    waiting, each_second, seconds, estimate
):
    decisions = replica(1, 1, bound=10_000)
    decisions.ready(0, 0.0)
    for turn in range(1, each_second * seconds + 1):
        now = turn / each_second
        decisions.ready(turn, now)
        decisions.done(1, turn - 1, now)
    arrive(decisions, *range(20_000, 20_000 + waiting), now=float(seconds))
    assert decisions.retry_after(float(seconds)) == estimate


def test_retry_after_is_a_minute_when_nothing_has_started_or_not_for_long():
    decisions = replica(1, 1)
    assert decisions.retry_after(0.0) == 60
    arrive(decisions, 1, 2)
    assert decisions.retry_after(1000.0) == 60


# An app that cannot be loaded.


def test_nobody_is_dismissed_for_a_successor_that_could_not_load_the_app():
    decisions = replica(2, 1)
    decisions.ruled(Rules(2, 1), [1, 2, 3, 4], 0.0, first=3)
    assert decisions.leaving(1) == decisions.leaving(2) == []
    assert decisions.ruled(Rules(2, 1), [1, 2, 4], 0.0, first=3) == []
    assert decisions.ruled(Rules(2, 1), [1, 2], 0.0, first=3) == []
    assert len(decisions.roster.usable) == 2


def test_those_who_stayed_leave_when_successors_can_load_again():
    decisions = replica(2, 1)
    decisions.ruled(Rules(2, 1), [1, 2, 5, 6], 0.0, first=3)
    assert decisions.leaving(1) == decisions.leaving(2) == []
    assert join(decisions, 5, 1) == [Dismiss(1)]
    assert join(decisions, 6, 1) == [Dismiss(2)]


@pytest.mark.parametrize("killed_first", [True, False])
def test_one_that_is_killed_as_it_loads_keeps_nobody_where_another_has_loaded(killed_first):
    decisions = replica(2, 1)
    decisions.ruled(Rules(2, 1), [1, 2, 3, 4], 0.0, first=3)
    assert decisions.leaving(1) == decisions.leaving(2) == []
    if killed_first:
        assert decisions.ruled(Rules(2, 1), [1, 2, 3], 0.0, first=3) == []
    assert join(decisions, 3, 1) == [Dismiss(1)]
    if not killed_first:
        assert decisions.ruled(Rules(2, 1), [1, 2, 3], 0.0, first=3) == []
    decisions.died(1, (), 0.0)
    assert decisions.ruled(Rules(2, 1), [2, 3], 0.0, first=3) == [Dismiss(2)]


def test_one_that_has_loaded_and_died_keeps_nobody_from_leaving():
    decisions = replica(3, 1)
    decisions.died(2, [], 0.0)
    join(decisions, 4, 1)
    decisions.died(4, [], 0.0)
    decisions.ruled(Rules(2, 1), [1, 3], 0.0, first=4)
    assert decisions.leaving(1) == [Dismiss(1)]


def test_after_a_pause_in_which_all_left_others_begin_what_comes():
    decisions = replica(1, 1)
    decisions.stop()
    assert decisions.drain() == [Dismiss(1)]
    decisions.died(1, [], 0.0)
    decisions.give_up()  # nobody is left
    assert decisions.resume(0.0) == []
    assert join(decisions, 2, 1) == []
    assert arrive(decisions, 1) == [Send(1, 2)]
    assert decisions.roster.is_ready


# A bound that is tried.


def arrive_and_be_spared(decisions: Decisions, *requests: int) -> None:
    for request in requests:
        assert arrive(decisions, request) == [Refuse(request, Why.FULL)]
        assert decisions.spare(request, 0.0) == []


def test_a_dry_run_says_what_is_beyond_the_bound_and_admits_it_then():
    decisions = Decisions(Rules(1, 1, 2, dry_run=True))
    join(decisions, 1, 1)
    assert arrive(decisions, 1, 2) == [Send(1, 1)]
    arrive_and_be_spared(decisions, 3, 4)
    assert decisions.in_flight == 4


def test_a_dry_run_counts_as_if_it_had_refused():
    """Two end; a replica that had refused 3 and 4 would be empty, and admit two again."""
    decisions = Decisions(Rules(1, 1, 2, dry_run=True))
    join(decisions, 1, 1)
    arrive(decisions, 1, 2)
    arrive_and_be_spared(decisions, 3, 4)
    decisions.done(1, 1, 0.0)
    decisions.done(1, 2, 0.0)
    assert arrive(decisions, 5, 6, 7) == [Refuse(7, Why.FULL)]


def test_a_dry_run_that_ends_leaves_the_bound_as_it_is():
    decisions = Decisions(Rules(1, 1, 2, dry_run=True))
    join(decisions, 1, 1)
    arrive(decisions, 1, 2)
    arrive_and_be_spared(decisions, 3)
    decisions.ruled(Rules(1, 1, 2), [1], 0.0)
    decisions.done(1, 1, 0.0)
    assert arrive(decisions, 4) == [Refuse(4, Why.FULL)]


# A wait limit of a request's own.


def test_a_request_with_less_patience_expires_before_those_in_front_of_it():
    decisions = replica(1, 1, queue_timeout=10.0)
    arrive(decisions, 1, 2)
    assert decisions.ready(3, 0.0, 2.0) == decisions.ready(4, 1.0, 0.5) == []
    assert decisions.next_expiry() == 1.5
    assert decisions.tick(1.5) == [Refuse(4, Why.WAITED)]
    assert decisions.tick(2.5) == [Refuse(3, Why.WAITED)]
    assert decisions.next_expiry() == 10.0


def test_more_patience_than_queue_timeout_is_of_no_use():
    decisions = replica(1, 1, queue_timeout=1.0)
    arrive(decisions, 1)
    decisions.ready(2, 0.0, 5.0)
    assert decisions.tick(1.0) == [Refuse(2, Why.WAITED)]
    assert decisions.next_expiry() == math.inf


def test_without_any_patience_a_request_runs_at_once_or_not_at_all():
    decisions = replica(1, 1)
    assert decisions.ready(1, 0.0, 0.0) == [Send(1, 1)]
    assert decisions.ready(2, 0.0, 0.0) == []
    assert decisions.tick(0.0) == [Refuse(2, Why.WAITED)]


def test_a_request_that_is_sent_back_keeps_its_own_limit():
    decisions = replica(2, 1)
    decisions.ready(1, 0.0, 3.0)
    arrive(decisions, 2, 3)
    assert decisions.next_expiry() == math.inf
    decisions.died(2, [1], 1.0)
    assert decisions.next_expiry() == 3.0
    assert decisions.tick(3.0) == [Refuse(1, Why.WAITED)]


# Exempt requests.


def exempt(decisions: Decisions, *requests: int) -> list:
    return [action for r in requests for action in decisions.ready(r, 0.0, exempt=True)]


def with_extra(processes: int = 1, threads: int = 2, bound: int = 2) -> Decisions:
    decisions = Decisions(Rules(processes, threads, bound))
    for age in range(1, processes + 1):
        decisions.registered(age, threads, extra=1)
        for _ in range(threads + 1):
            decisions.freed(age, 0.0)
    return decisions


def test_an_exempt_request_takes_the_extra_slot_beyond_cap_and_bound():
    decisions = with_extra()
    assert arrive(decisions, 1, 2, 3) == [Send(1, 1), Send(2, 1), Refuse(3, Why.FULL)]
    assert exempt(decisions, 4, 5) == [Send(4, 1)]
    assert (decisions.running, decisions.in_flight) == (2, 2)
    assert decisions.done(1, 4, 0.0) == [Send(5, 1)]


def test_the_extra_slot_takes_nothing_that_is_not_exempt():
    decisions = with_extra(bound=9)
    assert arrive(decisions, 1, 2, 3) == [Send(1, 1), Send(2, 1)]
    assert exempt(decisions, 4) == [Send(4, 1)]
    assert decisions.done(1, 4, 0.0) == []


def test_the_extra_slot_takes_nothing_else_while_another_process_is_not_complete_yet():
    decisions = Decisions(Rules(2, 2))
    for age in (1, 2):
        decisions.registered(age, 2, extra=1)
    for _ in range(3):
        decisions.freed(1, 0.0)
    assert arrive(decisions, 1, 2, 3) == [Send(1, 1), Send(2, 1)]


def test_without_an_extra_slot_an_exempt_request_begins_first_and_is_not_in_flight():
    decisions = replica(1, 1, bound=2)
    arrive(decisions, 1, 2)
    assert exempt(decisions, 3) == []
    assert decisions.done(1, 1, 0.0) == [Send(3, 1)]
    assert (decisions.running, decisions.in_flight) == (1, 1)
    assert decisions.done(1, 3, 0.0) == [Send(2, 1)]


def test_sixteen_exempt_requests_may_wait():
    decisions = replica(1, 1)
    arrive(decisions, 1)
    assert exempt(decisions, *range(2, 19)) == [Refuse(18, Why.CROWDED)]


def test_slots_of_a_dispatcher_that_died_count_as_running_what_they_may():
    decisions = Decisions(Rules(1, 2))
    decisions.expected(1, 2)
    assert decisions.running == 2
    decisions.registered(1, 2, owed=3, extra=1)
    arrive(decisions, 1, 2)
    assert decisions.running == 2
    assert decisions.freed(1, 0.0) == []
    assert decisions.freed(1, 0.0) == [Send(1, 1)]
    assert decisions.freed(1, 0.0) == [Send(2, 1)]


def test_an_exempt_request_that_was_not_read_goes_back_to_its_own_queue():
    decisions = with_extra()
    exempt(decisions, 1)
    decisions.died(1, [1], 0.0)
    assert decisions.waits(1)
    assert (len(decisions.waiting), len(decisions.exempt)) == (0, 1)


# The deck. More of it: test_decisions_deck_model.py.


def with_a_deck(queue_timeout: float | None = None) -> Decisions:
    """1 x 1: request 1 runs, and 2 lies on the deck."""
    decisions = replica(1, 1, queue_timeout=queue_timeout)
    decisions._recall = lambda most: {2}
    arrive(decisions, 1, 2)
    assert decisions.for_deck() == [2]
    decisions.on_deck(2)
    assert decisions.for_deck() == []
    return decisions


def test_a_stop_takes_back_what_lies_on_the_deck_for_it_now_ends_its_connection():
    decisions = with_a_deck()
    decisions.stop()
    assert not decisions.offered
    assert decisions.for_deck() == [2]


def test_what_has_waited_long_enough_on_the_deck_is_taken_back_and_refused():
    decisions = with_a_deck(queue_timeout=1.0)
    assert decisions.tick(0.9) == []
    assert list(decisions.offered) == [2]
    assert decisions.tick(1.0) == [Refuse(2, Why.WAITED)]
    assert not (decisions.offered or decisions.taken or decisions.waiting)


def test_what_a_slot_took_just_before_its_wait_was_over_is_not_refused():
    decisions = with_a_deck(queue_timeout=1.0)
    decisions._recall = lambda most: ()
    assert decisions.tick(1.0) == []
    assert list(decisions.taken) == [2]
    assert decisions.done(1, 1, 1.0, took=2) == []
    assert decisions.runs(1, 2)


def test_a_slot_that_looked_too_early_is_sent_the_first_and_the_others_stay_on_the_deck():
    decisions = replica(2, 1)
    deck, asked = [3, 4, 5, 6], []

    def recall(most):
        asked.append(most)
        left, deck[:most] = deck[:most], []
        return left

    decisions._recall = recall
    arrive(decisions, *range(1, 7))
    for request in deck:
        decisions.on_deck(request)
    assert decisions.done(2, 1, 0.0) == [Send(3, 2)]
    assert (asked, list(decisions.offered)) == ([1], [4, 5, 6])
    deck.remove(4)  # a slot of 1 takes it, and has not said so yet, when that of 2 has ended 3
    assert decisions.done(2, 3, 0.0) == [Send(5, 2)]
    assert (list(decisions.taken), list(decisions.offered)) == ([4], [6])
    deck.remove(6)
    assert decisions.done(2, 5, 0.0) == []
    assert (list(decisions.taken), list(decisions.offered)) == ([4, 6], [])
    assert decisions.done(1, 2, 0.0, took=4) == []
    assert decisions.runs(1, 4)


def test_no_deck_while_an_exempt_request_waits_that_would_come_first():
    decisions = with_a_deck()
    assert decisions.ready(3, 0.0, exempt=True) == []
    assert not decisions.offered
    assert decisions.for_deck() == []
    assert decisions.done(1, 1, 0.0) == [Send(3, 1)]


def test_no_deck_beside_a_slot_for_exempt_requests_which_is_to_take_no_other():
    decisions = Decisions(Rules(1, 2))
    decisions.ruled(decisions.rules, [1], 0.0)
    decisions.registered(1, 2, extra=1)
    for _ in range(3):
        decisions.freed(1, 0.0)
    arrive(decisions, 1, 2, 3)
    assert decisions.for_deck() == []


def test_during_drain_delay_a_process_that_is_told_to_leave_stays_unless_it_is_replaced():
    """The stop that follows would end a successor that still loads."""
    decisions = replica(1, 2)
    decisions.roster.draining = True
    assert decisions.leaving(1) == []
    assert arrive(decisions, 1) == [Send(1, 1)]
    decisions.ruled(Rules(1, 2), [1, 2], 0.0)
    assert Dismiss(1) in join(decisions, 2, 2)
