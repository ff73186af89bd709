"""The page: what stands between its two marks is made of the record, the rest by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from . import overhead, overload, waiting
from .chart import bars
from .numbers import short, with_spread
from .peers import OURS, PEERS
from .record import PACKAGES, Figures, Record
from .targets import targets

BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
SHARES = ("begin at once", "pair")
LATE_MS = 1.0
FAILED = "failed"
Rows = list[list[str]]
TITLES = {
    "start": "Start",
    "waiting": "Waiting",
    "overhead": "Overhead",
    "overload": "Overload",
    "growth": "Growth",
    "fault": "Fault",
}


def write(record: Record, page: Path) -> None:
    """Put the record's tables, targets and pictures into the page."""
    for name, picture in _pictures(record).items():
        (page.parent / f"benchmark-{name}.svg").write_text(picture)
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page}: the lines {BEGIN!r} and {END!r} must stand in it")
    page.write_text(before + begin + "\n".join(_results(record)) + "\n" + end + after)


def _results(record: Record) -> Iterator[str]:
    yield from ("", "## Targets", "", "| target | figure | reached |", "|---|---|---|")
    for each in targets(record):
        yield f"| {each.text} | {each.figure} | {each.verdict} |"
    yield ""
    for part in [name for name in TITLES if name in record.parts]:
        yield from (f"## {TITLES[part]}", "", _run_line(record.parts[part]["run"]), "")
        if part in _pictures(record):
            yield from (f"![{SHOWN[part][1]}](benchmark-{part}.svg)", "")
        if part == "overhead":
            yield from _breakdown(record)
        for columns, rows in _tables(record.cells(part)):
            yield from (f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}")
            yield from (f"| {' | '.join(row)} |" for row in rows)
            yield ""
        yield from _lateness(record.cells(part))


def _run_line(run: Mapping[str, str]) -> str:
    versions = ", ".join(f"{name} {run[name]}" for name in ("python", *PACKAGES) if name in run)
    return (
        f"{run['date']}, commit {run['commit']}, {run['plan']} run on {run['machine']}; {versions}."
    )


def _tables(cells: Mapping[str, Mapping[str, Figures]]) -> Iterator[tuple[list[str], Rows]]:
    """Cells with the same figures share a table; failures have a column where there are some."""
    tables: dict[tuple[str, ...], list[tuple[str, str, Figures]]] = {}
    for cell, peers in cells.items():
        rows = [(cell, name, each) for name, each in peers.items() if name != waiting.GENERATOR]
        figures = tuple(dict.fromkeys(f for row in rows for f in row[2] if _is_shown(f)))
        tables.setdefault(figures, []).extend(rows)
    for figures, rows in tables.items():
        if any(any(each.get(FAILED, [])) for _, _, each in rows):
            figures = (*figures, FAILED)
        values = ([_value(f, each.get(f, [])) for f in figures] for _, _, each in rows)
        yield (
            ["", "", *figures],
            [[cell, name, *row] for (cell, name, _), row in zip(rows, values, strict=True)],
        )


def _is_shown(figure: str) -> bool:
    """User and system mode are only in the breakdown."""
    return figure != FAILED and not figure.endswith((" user us", " system us"))


def _value(figure: str, values: list[float]) -> str:
    if not values:
        return ""
    if figure.startswith(SHARES) and len(values) > 1 and set(values) <= {0, 1}:
        return f"{sum(values):g} of {len(values)}"
    return with_spread(values)


def _breakdown(record: Record) -> Iterator[str]:
    """Where the CPU of a request goes: the columns add up to the last but one."""
    roles = [
        f"{role} {mode} us"
        for role in ("master", "supervisor", "dispatcher", "worker")
        for mode in ("user", "system")
    ]
    yield from (
        f"| us of CPU per request | | {' | '.join(r.removesuffix(' us') for r in roles)} | sum |",
    )
    yield f"|{'---|' * (len(roles) + 3)}"
    for cell, peers in record.cells("overhead").items():
        for name in [each for each in peers if each.startswith(OURS) and "CPU us" in peers[each]]:
            values = [
                sum(peers[name].get(role, [0])) / len(peers[name]["CPU us"]) for role in roles
            ]
            yield f"| {cell} | {name} | {' | '.join(map(short, values))} | {short(sum(values))} |"
    floor = record.figure("overhead", overhead.FLOOR, overhead.CALLS, "Flask app, us") or 0
    yield from ("", f"Of that, calling the Flask app takes {short(floor)} us.", "")


def _lateness(cells: Mapping[str, Mapping[str, Figures]]) -> Iterator[str]:
    """How accurate the open-loop generator was."""
    runs = [each[waiting.GENERATOR] for each in cells.values() if waiting.GENERATOR in each]
    if not runs:
        return
    found = {
        name: [value for each in runs for value in each[f"sent late, {name}"]]
        for name in ("p50", "p99", "max")
    }
    bad = sum(value > LATE_MS * 1000 for value in found["p99"])
    yield (
        f"How late requests were sent, in us, over {len(found['max'])} runs: "
        + "; ".join(f"{name} {with_spread(values)}" for name, values in found.items())
        + f". In {bad} runs the p99 was above {LATE_MS:g} ms."
    )
    yield ""


CELLS = {
    "waiting": [str(cell) for cell in waiting.MAIN],
    "overhead": [overhead.cell(p, t, keep) for p, t in overhead.SHAPES for keep in (True, False)],
    "overload": [overload.cell(times) for times in overload.TIMES],
}
SHOWN = {
    "waiting": ("p99", "p99 from arrival to answer, divided by an ideal queue's (log scale)"),
    "overhead": ("requests/s", "Requests a second, for a view that does nothing"),
    "overload": ("goodput/s", "Answers within 1 s, a second (capacity: 400)"),
}
"""What a part's picture shows: of these cells this figure, under this title."""


def _pictures(record: Record) -> dict[str, str]:
    """Those for which there are figures."""
    found = {}
    for part, (figure, title) in SHOWN.items():
        bars_of = {cell: _bars(record, part, cell, figure) for cell in CELLS[part]}
        if groups := {cell: each for cell, each in bars_of.items() if each}:
            ratio = part == "waiting"
            found[part] = bars(title, groups, start=0.9 if ratio else 0, logarithmic=ratio)
    return found


def _bars(record: Record, part: str, cell: str, figure: str) -> dict[str, float]:
    values = {peer: record.figure(part, cell, peer, figure) for peer in PEERS}
    return {peer: value for peer, value in values.items() if value is not None}
