"""What was aimed at, and whether it was reached: from the record alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import truediv
from statistics import median

from . import fault, growth, overhead, overload, waiting
from .numbers import short, spread
from .peers import GEVENT, GTHREAD, OURS, STOCK_GEVENT, UWSGI
from .record import Record

DEFINITE = 0.05  # what is nearer to each other than that is the same


@dataclass(frozen=True)
class Target:
    """`reached` is None for what was not measured."""

    text: str
    figure: str
    reached: bool | None

    @property
    def verdict(self) -> str:
        return {True: "yes", False: "**no**", None: "not measured"}[self.reached]


def targets(record: Record) -> list[Target]:
    groups = (_start, _waiting, _overhead, _gevent, _overload, _growth, _fault)
    return [target for group in groups for target in group(record)]


def _target(
    text: str, value: float | None, good: Callable[[float], bool], more: str = ""
) -> Target:
    if value is None:
        return Target(text, "", None)
    return Target(text, f"{short(value)}{more}", good(value))


def _start(record: Record) -> Iterator[Target]:
    for how in ("new", "kept-alive"):
        values = record.values("start", "2 x 2", OURS, f"begin at once, {how}")
        share = sum(values) / len(values) if values else None
        yield _target(
            f"bursts of p*t that all begin at once, {how}: all", share, lambda each: each == 1
        )


def _waiting(record: Record) -> Iterator[Target]:
    for cell in waiting.MAIN:
        for figure in ("mean", "p99"):
            text = f"{cell.load} % load: {figure} not above uWSGI's by more than the spread"
            yield _not_above(record, cell, figure, text, OURS, UWSGI)
        p99 = record.figure("waiting", str(cell), OURS, "p99")
        yield _target(
            f"{cell.load} % load: p99 within 6 % of ideal", p99, lambda each: each <= 1.06
        )
    for cell in (*waiting.MAIN, *waiting.KEPT):
        text = f"gevent mode, {cell}: p99 not above thread mode's by more than the spread"
        yield _not_above(
            record, cell, waiting.OWN_SLEEP, f"{text}, each of its own sleep", GEVENT, OURS
        )
        yield _not_above(record, cell, "p99", text, GEVENT, OURS)


def _not_above(
    record: Record, cell: waiting.Cell, figure: str, text: str, one: str, other: str
) -> Target:
    mine, theirs = (record.values("waiting", str(cell), each, figure) for each in (one, other))
    if not mine or not theirs:
        return Target(text, "", None)
    more, room = median(mine) - median(theirs), max(spread(mine), spread(theirs))
    figures = f"{short(median(mine))} against {short(median(theirs))}, spread {short(room)}"
    return Target(text, figures, more <= room)


def ratios(
    record: Record, part: str, cells: list[str], figure: str, one: str, other: str
) -> list[float]:
    """For each cell, the median of the ratios of each round: of one peer to another."""
    found = []
    for cell in cells:
        above, below = (record.values(part, cell, each, figure) for each in (one, other))
        if above and below:
            found.append(median(map(truediv, above, below)))
    return found


def _cells(*keeps: bool) -> list[str]:
    return [overhead.cell(p, t, keep) for p, t in overhead.SHAPES for keep in keeps]


def _overhead(record: Record) -> Iterator[Target]:
    def compared(figure: str, other: str) -> list[float]:
        return ratios(record, "overhead", _cells(True, False), figure, OURS, other)

    rate, cpu = compared("requests/s", GTHREAD), compared("CPU us", GTHREAD)
    least, middle = (min(rate), median(rate)) if rate else (None, None)
    yield _target(
        "requests/s beside gthread's, in the worst cell: at least 1", least, lambda each: each >= 1
    )
    yield _target("in the median of the cells: at least 1.3", middle, _at_least(1.3))
    most = max(cpu) if cpu else None
    yield _target(
        "CPU per request beside gthread's, in the worst cell: below 1", most, lambda each: each < 1
    )
    aim = compared("requests/s", UWSGI)
    yield _target(
        "aim: requests/s beside uWSGI's, in the median of the cells: 1",
        median(aim) if aim else None,
        _at_least(1),
    )


def _gevent(record: Record) -> Iterator[Target]:
    for keep, least in ((False, 0.9), (True, 0.8)):
        cells = [*_cells(keep), overhead.cell(*overhead.GREEN, keep)]
        found = ratios(record, "overhead", cells, "requests/s", GEVENT, STOCK_GEVENT)
        how = "kept-alive" if keep else "new"
        yield _target(
            f"gevent mode, {how}: requests/s beside stock gevent's, worst cell: at least {least}",
            min(found) if found else None,
            _at_least(least),
            f" (2 x 1, 2 x 2, 2 x 4, 2 x 100: {', '.join(map(short, found))}; the aim is 1)",
        )


def _at_least(least: float) -> Callable[[float], bool]:
    return lambda each: each >= least


def _overload(record: Record) -> Iterator[Target]:
    one, four = (record.figure("overload", overload.cell(n), OURS, "goodput/s") for n in (1, 4))
    share = four / one if one and four else None
    yield _target(
        "goodput at 4 times capacity, beside 1 times: above 0.97", share, lambda each: each > 0.97
    )
    late = record.figure("overload", overload.cell(4), OURS, "refused p99 ms")
    yield _target(
        "refusals at 4 times capacity: p99 under 10 ms", late, lambda each: each < 10, " ms"
    )


def _growth(record: Record) -> Iterator[Target]:
    for how in ("kept-alive", "new"):
        small, large = (
            record.figure("growth", growth.shape(*shape), OURS, f"CPU us, {how}")
            for shape in ((2, 2), (16, 4))
        )
        yield _target(
            f"CPU per request at 16 x 4 beside 2 x 2, {how}: within 10 %",
            large / small if small and large else None,
            lambda each: each <= 1.1,
        )
    yield from _idle(record)


def _idle(record: Record) -> Iterator[Target]:
    """Each figure with the most idle connections beside the same with none."""
    cells = record.cells("growth")
    counts = [n for n in (0, 1000, 10000) if growth.idle_cell(n) in cells]
    if len(counts) < 2:
        yield Target("no figure depends on the number of idle connections", "", None)
        return
    none, most = (cells[growth.idle_cell(n)][OURS] for n in (counts[0], counts[-1]))
    for figure, before in none.items():
        after = most[figure]
        change = median(after) - median(before)
        same = abs(change) <= max(DEFINITE * median(before), spread(before), spread(after))
        said = f"{short(median(before))} with none, {short(median(after))} with {counts[-1]:,}"
        yield Target(f"idle connections do not change: {figure}", said, same)


def _fault(record: Record) -> Iterator[Target]:
    for cell in (fault.TERM, fault.RELOAD):
        values = record.values("fault", cell, OURS, "lost")
        yield _target(f"{cell}: none lost", max(values) if values else None, lambda each: each == 0)
    values = record.values("fault", fault.DISPATCHER, OURS, "next start ms")
    yield _target(
        f"{fault.DISPATCHER}: the next request begins within 100 ms",
        max(values) if values else None,
        lambda each: each <= 100,
        " ms",
    )
