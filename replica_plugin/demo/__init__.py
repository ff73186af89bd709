"""`replica-plugin demo`: start a real replica, send it two bursts, draw when each request ran.

With p processes of t threads the bursts are p*t - 1 and p*t + 1 requests. The picture, the
sentences and the exit code come from the times the requests report, not from the settings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from .burst import LONGEST, SHORTEST, Row, faults, name_slots, send, sentence
from .chart import choose_glyphs, colour, draw, wants_colour
from .server import DemoError, Server, handling

PACKAGES = {"flask": "flask", "sklearn": "scikit-learn"}
ARGUMENTS = ["-c", "python:replica_plugin.conf", "replica_plugin.demo.app:app"]
MOST = 8  # more bars than 8 x 8 + 1 nobody reads
WIDEST = 100


def main(argv: Sequence[str]) -> int:
    """Run the demo; return 0 if the bursts went as p*t promises, 1 if not, 2 if it cannot run."""
    options = _parse(argv)
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        names = " and ".join(missing)
        print(f"The demo needs {names}: pip install 'replica-plugin[demo]'", file=sys.stderr)
        return 2
    if not options.json:
        _introduce(options.processes, options.threads)
    try:
        with handling(_leave):
            bursts = _observe(options.processes, options.threads)
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    report = _print_json if options.json else _print_charts
    return report(bursts, options.processes, options.threads)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="replica-plugin demo",
        description="Start a real replica, send it one request less and one more than it runs "
        "at a time, and draw when each of them ran.",
    )
    counts = range(1, MOST + 1)
    hint = f"1 to {MOST} (default: 2)"
    parser.add_argument("--processes", type=int, choices=counts, default=2, metavar="N", help=hint)
    parser.add_argument("--threads", type=int, choices=counts, default=2, metavar="N", help=hint)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead")
    return parser.parse_args(argv)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _introduce(processes: int, threads: int) -> None:
    text = (
        f"Starting a replica of {_count(processes, 'process', 'processes')} x "
        f"{_count(threads, 'thread', 'threads')} that recognizes handwritten digits. "
        f"A request takes {SHORTEST} to {LONGEST} ms: a simulated feature fetch (a sleep), "
        "then a real prediction."
    )
    print(textwrap.fill(text, _width()), flush=True)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _width() -> int:
    return min(WIDEST, shutil.get_terminal_size().columns)


def _observe(processes: int, threads: int) -> list[list[Row]]:
    slots = processes * threads
    with tempfile.TemporaryDirectory(prefix="replica-demo-") as name:
        folder = Path(name)
        settings = f"processes_per_replica: {processes}\nthreads_per_process: {threads}\n"
        (folder / "replica.yaml").write_text(settings)
        with Server(ARGUMENTS, folder) as server:
            # Processes load the app one after another.
            port = server.wait_until_ready(seconds=30 + 10 * processes)
            return [_burst(server, port, size) for size in (max(1, slots - 1), slots + 1)]


def _burst(server: Server, port: int, size: int) -> list[Row]:
    try:
        return send(port, size)
    except (OSError, HTTPException, ValueError) as error:
        raise server.failure(f"A request of the burst of {size} failed: {error!r}") from error


def _print_charts(bursts: list[list[Row]], processes: int, threads: int) -> int:
    glyphs = choose_glyphs(sys.stdout.encoding)
    coloured = wants_colour(sys.stdout)
    names = name_slots([row for rows in bursts for row in rows])
    broken = False
    for rows in bursts:
        chart = draw(rows, names, _width(), glyphs)
        wrong = faults(rows, names, processes, threads)
        broken = broken or bool(wrong)
        print(f"\n{colour(chart, glyphs) if coloured else chart}\n")
        for line in [sentence(rows, names), *(f"Promise broken: {fault}" for fault in wrong)]:
            print(textwrap.fill(f"{line}.", _width()))
    return 1 if broken else 0


def _print_json(bursts: list[list[Row]], processes: int, threads: int) -> int:
    names = name_slots([row for rows in bursts for row in rows])
    wrong = [faults(rows, names, processes, threads) for rows in bursts]
    told = [
        {"sentence": sentence(rows, names), "broken": broken, "rows": [asdict(row) for row in rows]}
        for rows, broken in zip(bursts, wrong, strict=True)
    ]
    print(json.dumps({"processes": processes, "threads": threads, "bursts": told}, indent=2))
    return 1 if any(wrong) else 0
