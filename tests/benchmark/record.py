"""What was measured: for each part, cell, peer and figure the values of all rounds, as JSON.

A part that is run again replaces what it said before; the others stay, so that parts can be run one
at a time. Each carries when, on what and of which commit it was measured.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("gunicorn", "flask", "gevent", "pyuwsgi", "waitress", "granian", "cheroot")

Figures = dict[str, list[float]]


class Record:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.parts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def begin(self, part: str, plan: str) -> Part:
        return Part(self, part, {"plan": plan, **machine()})

    def save(self, part: str, run: Mapping[str, str], cells: Any) -> None:
        self.parts[part] = {"run": dict(run), "cells": cells}
        self._path.write_text(json.dumps(self.parts, indent=1) + "\n")

    def cells(self, part: str) -> dict[str, dict[str, Figures]]:
        found: dict[str, dict[str, Figures]] = self.parts.get(part, {}).get("cells", {})
        return found

    def values(self, part: str, cell: str, peer: str, figure: str) -> list[float]:
        """The values of all rounds; none if it was not measured."""
        return self.cells(part).get(cell, {}).get(peer, {}).get(figure, [])

    def figure(self, part: str, cell: str, peer: str, figure: str) -> float | None:
        values = self.values(part, cell, peer, figure)
        return median(values) if values else None


class Part:
    """A part that is being measured; it is saved when it is complete."""

    def __init__(self, record: Record, name: str, run: Mapping[str, str]) -> None:
        self._record, self._name, self._run = record, name, run
        self._cells: dict[str, dict[str, Figures]] = {}

    def add(self, cell: str, peer: str, figures: Mapping[str, float]) -> None:
        """What one round gave."""
        row = self._cells.setdefault(cell, {}).setdefault(peer, {})
        for name, value in figures.items():
            row.setdefault(name, []).append(float(f"{value:.6g}"))

    def save(self) -> None:
        self._record.save(self._name, self._run, self._cells)


def machine() -> dict[str, str]:
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "machine": f"{_cpus()} CPUs, {_processor()}, Linux {platform.release()}",
        "python": sys.version.split()[0],
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def _commit() -> str:
    line = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not a checkout"


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
