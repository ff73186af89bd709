"""Waits that are all equally long."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from replica_plugin.deadlines import Deadlines


def test_items_expire_when_their_time_is_over_and_not_before_oldest_first():
    deadlines: Deadlines[str] = Deadlines(2.0)
    deadlines.start("a", 10.0)
    deadlines.start("b", 11.0)
    deadlines.start("c", 11.0)
    assert deadlines.due == 12.0
    assert list(deadlines.expired(11.999)) == []
    assert list(deadlines.expired(12.0)) == ["a"]
    assert list(deadlines.expired(13.0)) == ["b", "c"]
    assert (len(deadlines), deadlines.due) == (0, math.inf)


def test_an_item_that_is_started_again_waits_anew_behind_the_others():
    deadlines: Deadlines[str] = Deadlines(2.0)
    deadlines.start("a", 10.0)
    deadlines.start("b", 11.0)
    deadlines.start("a", 12.0)
    assert len(deadlines) == 2
    assert list(deadlines.expired(14.0)) == ["b", "a"]


def test_an_item_that_is_stopped_does_not_expire_and_stopping_twice_is_no_error():
    deadlines: Deadlines[str] = Deadlines(2.0)
    deadlines.start("a", 10.0)
    assert "a" in deadlines
    deadlines.stop("a")
    deadlines.stop("a")
    assert "a" not in deadlines
    assert list(deadlines.expired(99.0)) == []


def test_without_a_time_nothing_expires():
    deadlines: Deadlines[str] = Deadlines(None)
    deadlines.start("a", 10.0)
    assert deadlines.due == math.inf
    assert list(deadlines.expired(1e9)) == []
    assert "a" in deadlines


def test_a_new_time_holds_for_waits_that_have_begun():
    deadlines: Deadlines[str] = Deadlines(None)
    deadlines.start("a", 10.0)
    deadlines.last(1.0)
    assert deadlines.due == 11.0


def test_an_item_may_be_started_again_while_those_expired_are_looked_at():
    deadlines: Deadlines[str] = Deadlines(2.0)
    deadlines.start("a", 10.0)
    deadlines.start("b", 10.0)
    for item in deadlines.expired(12.0):
        deadlines.start(item, 12.0)
    assert len(deadlines) == 2
    assert deadlines.due == 14.0


def test_an_item_may_stop_another_one_while_those_expired_are_looked_at():
    deadlines: Deadlines[str] = Deadlines(2.0)
    deadlines.start("a", 10.0)
    deadlines.start("b", 10.0)
    seen = []
    for item in deadlines.expired(12.0):
        seen.append(item)
        deadlines.stop("b")
    assert seen == ["a"]


acts = st.tuples(st.sampled_from(["start", "stop", "expire"]), st.integers(0, 5), st.integers(0, 3))


@settings(deadline=None)
@given(st.lists(acts, max_size=40))
def test_they_are_what_a_dictionary_of_times_is(history):
    deadlines: Deadlines[int] = Deadlines(4)
    since: dict[int, int] = {}
    now = 0
    for act, item, pause in history:
        now += pause
        if act == "start":
            deadlines.start(item, now)
            since[item] = now
        elif act == "stop":
            deadlines.stop(item)
            since.pop(item, None)
        else:
            due = {each: at for each, at in since.items() if at + 4 <= now}
            expired = list(deadlines.expired(now))
            assert set(expired) == due.keys() and len(expired) == len(due)
            assert [due[each] for each in expired] == sorted(due.values())
            since = {each: at for each, at in since.items() if each not in due}
        assert deadlines.due <= min(since.values(), default=math.inf) + 4
        assert len(deadlines) == len(since) and all(each in deadlines for each in since)
