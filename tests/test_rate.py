"""Retry-After, from how fast things happen."""

from __future__ import annotations

import pytest

from replica_plugin.rate import Rate


@pytest.mark.parametrize("events", [0, 1, 1000])
def test_after_any_silence_there_is_an_answer_between_one_second_and_sixty(events):
    rate = Rate()
    for _ in range(events):
        rate.count(0.0)
    told = [rate.seconds_for(1, float(now)) for now in range(0, 20_000, 10)]
    assert set(told) <= set(range(1, 61))
    assert told == sorted(told)
    assert told[-1] == 60
