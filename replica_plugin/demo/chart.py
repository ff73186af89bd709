"""The demo's picture in plain text: one bar a request over a time axis."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from .bars import Bar, tick_step

NARROWEST = 20  # columns a bar needs to say anything
TICK_DISTANCE = 8  # columns; a label takes at most 6


@dataclass(frozen=True)
class Glyphs:
    waiting: str
    running: str
    rule: str
    tick: str
    right: str
    wrong: str


UNICODE = Glyphs("░", "█", "─", "┬", "✓", "✗")
ASCII = Glyphs(".", "#", "-", "+", "y", "n")
YELLOW, GREEN, RED, RESET = "\x1b[33m", "\x1b[32m", "\x1b[31m", "\x1b[0m"


def choose_glyphs(encoding: str | None) -> Glyphs:
    """Take the Unicode glyphs if `encoding` has them, else ASCII."""
    try:
        "░█─┬✓✗".encode(encoding or "ascii")
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


def mark(right: bool, glyphs: Glyphs, coloured: bool) -> str:
    """One round, in one column."""
    glyph, code = (glyphs.right, GREEN) if right else (glyphs.wrong, RED)
    return f"{code}{glyph}{RESET}" if coloured else glyph


def draw(bars: Sequence[Bar], seconds: float, width: int, glyphs: Glyphs) -> str:
    """Draw a burst in at most `width` columns, which end after `seconds`."""
    indent = max(len(bar.lane) for bar in bars) + 2
    columns = max(NARROWEST, width - indent)
    cell = seconds / columns
    lines = [f"{bar.lane:<{indent}}{_line(bar, cell, columns, glyphs)}" for bar in bars]
    return "\n".join([*lines, *(" " * indent + line for line in _axis(cell, columns, glyphs))])


def _line(bar: Bar, cell: float, columns: int, glyphs: Glyphs) -> str:
    """Each column shows the state at the middle of its time."""
    if bar.idle:
        return "(idle)"
    middles = ((column + 0.5) * cell for column in range(columns))
    return "".join(_state(bar, time, glyphs) for time in middles).rstrip()


def _state(bar: Bar, time: float, glyphs: Glyphs) -> str:
    if bar.sent <= time < bar.begin:
        return glyphs.waiting
    return glyphs.running if bar.begin <= time < bar.end else " "


def _axis(cell: float, columns: int, glyphs: Glyphs) -> tuple[str, str]:
    step = tick_step(TICK_DISTANCE * cell * 1000)
    ticks = {round(number * step / cell / 1000): number * step for number in range(columns)}
    rule, labels = "", ""
    for column in range(columns):
        rule += glyphs.tick if column in ticks else glyphs.rule
        label = f"{ticks[column]} ms" if column in ticks else ""
        if label and column + len(label) <= columns:
            labels = f"{labels:<{column}}{label}"
    return rule, labels
