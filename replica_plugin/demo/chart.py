"""The demo's picture: one bar a request over a time axis, in plain text."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from .burst import Row, Slot

NARROWEST = 20  # columns a bar needs to say anything
TICK_DISTANCE = 8  # columns; a label takes at most 6


@dataclass(frozen=True)
class Glyphs:
    waiting: str
    running: str
    rule: str
    tick: str


UNICODE = Glyphs("░", "█", "─", "┬")
ASCII = Glyphs(".", "#", "-", "+")
YELLOW, GREEN, RESET = "\x1b[33m", "\x1b[32m", "\x1b[0m"


def choose_glyphs(encoding: str | None) -> Glyphs:
    """Take the Unicode glyphs if `encoding` has them, else ASCII."""
    try:
        "░█─┬".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


def wants_colour(stream: TextIO) -> bool:
    """Only on a terminal, and not against NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def colour(chart: str, glyphs: Glyphs) -> str:
    """Paint waiting yellow and running green."""
    for glyph, code in ((glyphs.waiting, YELLOW), (glyphs.running, GREEN)):
        chart = re.sub(f"{re.escape(glyph)}+", rf"{code}\g<0>{RESET}", chart)
    return chart


def draw(rows: Sequence[Row], names: Mapping[Slot, str], width: int, glyphs: Glyphs) -> str:
    """Draw a burst in at most `width` columns; a slot's requests stand below each other."""
    indent = max(len(name) for name in names.values()) + 2
    columns = max(NARROWEST, width - indent)
    start = min(row.sent for row in rows)
    cell = (max(row.end for row in rows) - start) / columns
    order = list(names)
    bars = [
        f"{names[row.slot]:<{indent}}{_bar(row, start, cell, columns, glyphs)}"
        for row in sorted(rows, key=lambda row: (order.index(row.slot), row.begin))
    ]
    axis = [" " * indent + line for line in _axis(cell * 1000, columns, glyphs)]
    return "\n".join([_title(len(rows), glyphs), *bars, *axis])


def _title(size: int, glyphs: Glyphs) -> str:
    requests = f"{size} request{'s' if size > 1 else ''}"
    return f"{requests} sent together ({glyphs.waiting} waiting, {glyphs.running} running):"


def _bar(row: Row, start: float, cell: float, columns: int, glyphs: Glyphs) -> str:
    """Each column shows the state at the middle of its time."""
    middles = (start + (column + 0.5) * cell for column in range(columns))
    return "".join(_state(row, time, glyphs) for time in middles).rstrip()


def _state(row: Row, time: float, glyphs: Glyphs) -> str:
    if row.sent <= time < row.begin:
        return glyphs.waiting
    return glyphs.running if row.begin <= time < row.end else " "


def _axis(cell_ms: float, columns: int, glyphs: Glyphs) -> tuple[str, str]:
    step = _step(cell_ms)
    ticks = {round(number * step / cell_ms): number * step for number in range(columns)}
    rule, labels = "", ""
    for column in range(columns):
        rule += glyphs.tick if column in ticks else glyphs.rule
        label = f"{ticks[column]} ms" if column in ticks else ""
        if label and column + len(label) <= columns:
            labels = f"{labels:<{column}}{label}"
    return rule, labels


def _step(cell_ms: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... ms that leaves room between ticks."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if step >= TICK_DISTANCE * cell_ms:
                return step
        power *= 10
