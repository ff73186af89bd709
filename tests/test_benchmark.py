"""What the benchmark computes. That it runs is seen by running it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from benchmark import alone, overhead, page, waiting
from benchmark.ideal import poisson, services, sojourns
from benchmark.numbers import percentile, short, spread, with_spread
from benchmark.record import Record
from benchmark.targets import targets
from benchmark.waiting import Cell

MANY = 200_000  # requests of a simulated queue


def erlang_c(servers: int, load: float) -> float:
    """The share of requests that wait in an M/M/c queue; load in 0 to 1 of what c servers can do.

    Source: A. K. Erlang's second formula.
    """
    offered = servers * load
    waits = offered**servers / math.factorial(servers) / (1 - load)
    return waits / (sum(offered**n / math.factorial(n) for n in range(servers)) + waits)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (4, 0.5), (4, 0.75)])
def test_the_ideal_queue_takes_as_long_as_erlangs_formula_says(servers, load):
    arrivals = poisson(rate=servers * load, seconds=MANY / (servers * load), seed=1)
    took = sojourns(arrivals, services("exponential", 1.0, len(arrivals), seed=1), servers)
    expected = 1 + erlang_c(servers, load) / (servers * (1 - load))
    assert sum(took) / len(took) == pytest.approx(expected, rel=0.03)


def test_in_the_ideal_queue_the_fifth_request_at_four_servers_waits_for_the_first_to_end():
    took = sojourns([0.0] * 5, [4.0, 3.0, 2.0, 5.0, 1.0], servers=4)
    assert took == [4.0, 3.0, 2.0, 5.0, 3.0]


@pytest.mark.parametrize("kind", ["constant", "exponential", "heavy-tailed"])
def test_service_times_have_the_mean_that_was_asked_for(kind):
    assert sum(services(kind, 0.03, MANY, seed=1)) / MANY == pytest.approx(0.03, rel=0.03)


def test_a_heavy_tail_varies_more_than_an_exponential_one():
    def variation(kind: str) -> float:
        values = services(kind, 1.0, MANY, seed=1)
        return sum((each - 1) ** 2 for each in values) / MANY

    assert variation("exponential") == pytest.approx(1, rel=0.1)
    assert variation("heavy-tailed") == pytest.approx(math.e**1.44 - 1, rel=0.3)


def test_requests_arrive_at_random_at_the_rate_that_was_asked_for():
    times = poisson(rate=100, seconds=2000, seed=1)
    assert times == sorted(times)
    assert len(times) == pytest.approx(200_000, rel=0.01)
    gaps = [after - before for before, after in pairwise(times)]
    assert sum(gap > 0.01 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, rel=0.01)


def test_a_seed_gives_the_same_load_again_and_another_seed_another_one():
    cell = Cell(75)
    assert cell.schedule(5, seed=1) == cell.schedule(5, seed=1)
    assert cell.schedule(5, seed=1) != cell.schedule(5, seed=2)


def test_a_cell_asks_for_its_share_of_what_the_slots_can_do():
    asked, *_ = Cell(75, slots=4, mean=0.02).schedule(1000, seed=1)
    assert len(asked) / 1000 == pytest.approx(0.75 * 4 / 0.02, rel=0.01)


@pytest.mark.parametrize(
    ("percent", "value"), [(50, 50), (99, 99), (99.9, 100), (100, 100), (0, 1)]
)
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(percent, value):
    assert percentile(range(100, 0, -1), percent) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1"),
        (0.0123, "0.0123"),
        (1.2345, "1.23"),
        (12.345, "12.3"),
        (12345.6, "12,346"),
    ],
)
def test_a_figure_is_written_with_three_digits_that_count(value, text):
    assert short(value) == text


def test_a_figure_of_several_rounds_is_their_median_with_the_extremes():
    assert with_spread([3.0, 1.0, 2.0]) == "2 (1 to 3)"
    assert with_spread([2.0, 2.0]) == "2"
    assert spread([3.0, 1.0, 2.0]) == 1.0


@pytest.mark.parametrize("kind", alone.KINDS)
def test_what_is_measured_alone_serves_a_request(kind):
    serve = alone.KINDS[kind]()
    for number in (1, 2, 3):
        serve(number)


# The record, and what is made of it.


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "benchmark.json")


def waited(record: Record, ours: list[float], uwsgi: list[float]) -> None:
    part = record.begin("waiting", "quick")
    for cell in waiting.MAIN:
        for name, values in (("ours", ours), ("uWSGI", uwsgi)):
            for value in values:
                part.add(str(cell), name, {"mean": value, "p99": value})
    part.save()


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [([1.04, 1.05, 1.06], "yes"), ([1.05, 1.06, 1.07], "yes"), ([1.08, 1.09, 1.10], "**no**")],
)
def test_a_wait_reaches_its_target_within_the_spread_of_uwsgis(record, ours, verdict):
    waited(record, ours, [1.03, 1.05, 1.07])
    found = [each for each in targets(record) if "75 % load: mean not above" in each.text]
    assert [each.verdict for each in found] == [verdict]


def test_of_an_empty_record_no_target_is_measured(record):
    assert {each.verdict for each in targets(record)} == {"not measured"}


def test_a_comparison_with_a_peer_that_was_left_out_is_not_measured(record):
    part = record.begin("overhead", "quick")
    for p, t in overhead.SHAPES:
        for keep in (True, False):
            figures = {"requests/s": 13.0, "CPU us": 1.0}
            part.add(overhead.cell(p, t, keep), "ours", figures)
            part.add(overhead.cell(p, t, keep), "gthread", {**figures, "requests/s": 10.0})
    part.save()
    found = {each.text: each.figure for each in targets(record) if "beside" in each.text}
    assert found["requests/s beside gthread's, in the worst cell: at least 1"] == "1.30"
    assert found["aim: requests/s beside uWSGI's, in the median of the cells: 1"] == ""


def test_a_part_that_is_measured_again_replaces_itself_and_no_other(record, tmp_path):
    for name, value in (("start", 1.0), ("fault", 2.0), ("start", 3.0)):
        part = record.begin(name, "quick")
        part.add("cell", "ours", {"figure": value})
        part.save()
    again = Record(tmp_path / "benchmark.json")
    assert again.values("start", "cell", "ours", "figure") == [3.0]
    assert again.values("fault", "cell", "ours", "figure") == [2.0]


def test_the_page_is_written_anew_between_its_marks_only(record, tmp_path):
    written = tmp_path / "benchmark.md"
    written.write_text(f"# By hand\n\n{page.BEGIN}old\n{page.END}\n## By hand, too\n")
    waited(record, [1.0], [1.0])
    page.write(record, written)
    text = written.read_text()
    assert text.startswith("# By hand\n")
    assert text.endswith("## By hand, too\n")
    assert "old" not in text
    assert "| 75 %, exponential, sleep, new | ours | 1 | 1 |" in text
    page.write(record, written)
    assert written.read_text() == text
