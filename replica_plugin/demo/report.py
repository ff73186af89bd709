"""What the demo tells: progress, which only ever appends, and in the end charts or JSON."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from .burst import LONGEST, SHORTEST, Row
from .chart import choose_glyphs, colour, draw, mark, wants_colour
from .trial import Plan, Trial

WIDEST = 100  # columns
NEXT = "For a project of yours: replica-plugin init"


class Progress:
    """Appends to a stream, be it a terminal, a file or a pipe; without one, to nothing."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def say(self, text: str) -> None:
        if self._stream:
            print(text, end="", file=self._stream, flush=True)

    def mark(self, right: bool) -> None:
        if self._stream:
            glyphs = choose_glyphs(self._stream.encoding)
            self.say(mark(right, glyphs, wants_colour(self._stream)))


def fill(text: str) -> str:
    return textwrap.fill(text, _width())


def introduction(plan: Plan) -> str:
    return fill(
        f"One app on stock gunicorn (gthread) and with replica-plugin, {plan.shape} each. It "
        f"recognizes handwritten digits; a request takes {SHORTEST} to {LONGEST} ms: a simulated "
        "feature fetch (a sleep), then a real prediction."
    )


def charts(stock: Trial, ours: Trial, stream: TextIO) -> str:
    """The worst round of each on one scale, what it shows, and what follows."""
    worst = [(trial, trial.worst()) for trial in (stock, ours)]
    seconds = max(bar.end for trial, rows in worst for bar in trial.bars(rows))
    parts = [_chart(trial, rows, seconds, stream) for trial, rows in worst]
    if broken := ours.broken():
        parts += [fill(f"Promise broken: {fault}.") for fault in broken]
        parts += _busy()
    if not stock.broken():
        parts.append(fill(_luck(stock.plan)))
    return "\n\n".join([*parts, NEXT])


def _chart(trial: Trial, rows: Sequence[Row], seconds: float, stream: TextIO) -> str:
    glyphs = choose_glyphs(stream.encoding)
    legend = f"{glyphs.waiting} waiting, {glyphs.running} running"
    title = fill(f"{trial.server}, the worst round of {len(rows)} requests ({legend}):")
    picture = draw(trial.bars(rows), seconds, _width(), glyphs)
    painted = colour(picture, glyphs) if wants_colour(stream) else picture
    return "\n".join([title, painted, fill(f"{trial.sentence(rows)}.")])


def _busy() -> list[str]:
    """On a machine with more work than CPUs, what a thread did first may be heard of second."""
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cpus:
        return []
    return [fill(f"But the load is {load:.1f} on {cpus} CPUs: try again with less other work.")]


def _luck(plan: Plan) -> str:
    if plan.processes == 1:
        return "Stock gunicorn got every round right: with one process there is one queue."
    return (
        "Stock gunicorn got every round right this time. Which process takes a connection is up "
        "to chance there: try more --rounds."
    )


def as_json(stock: Trial, ours: Trial) -> str:
    servers = [{"server": trial.server, "bursts": _bursts(trial)} for trial in (stock, ours)]
    return json.dumps({**asdict(ours.plan), "servers": servers}, indent=2)


def _bursts(trial: Trial) -> list[dict[str, Any]]:
    return [
        {
            "size": size,
            "sentence": trial.sentence(rows),
            "broken": trial.faults(rows),
            "rows": [asdict(row) for row in rows],
        }
        for size, rounds in trial.rounds.items()
        for rows in rounds
    ]


def _width() -> int:
    return min(WIDEST, shutil.get_terminal_size().columns)
