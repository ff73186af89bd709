"""`python tests/benchmark`: measure what is asked for, and write it down in docs/."""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from . import fault, growth, overhead, overload, page, start, waiting
from .peers import BIN, PEERS
from .plan import FULL, QUICK, Run
from .progress import Progress
from .record import ROOT, Record
from .targets import targets

PARTS: Mapping[str, Callable[[Run], None]] = {
    "start": start.measure,
    "waiting": waiting.measure,
    "overhead": overhead.measure,
    "overload": overload.measure,
    "growth": growth.measure,
    "fault": fault.measure,
}
TAKES = {"start": 80, "waiting": 850, "overhead": 380, "overload": 230, "growth": 330, "fault": 260}
"""Seconds of a part in a full run."""

FILES = 65536
DOCS = ROOT / "docs"


def main() -> None:
    options = _options()
    plan = QUICK if options.quick else FULL
    record = Record(options.results)
    if not options.page:
        _check_tools(options.peers)
        _want_many_files()
        parts = {name: TAKES[name] / (6 if options.quick else 1) for name in options.only}
        progress = Progress(parts)
        for name in parts:
            begun = time.monotonic()
            progress.begin(name)
            part = record.begin(name, plan.name)
            PARTS[name](Run(plan, options.peers, part, progress))
            part.save()
            print(
                f"{name}: {time.monotonic() - begun:.0f} s, in {options.results}", file=sys.stderr
            )
    page.write(record, options.results.with_suffix(".md"))
    for target in targets(record):
        print(f"{target.verdict.strip('*'):12}  {target.text}: {target.figure}")


def _options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python tests/benchmark", description=__doc__)
    split = str.split
    parser.add_argument(
        "--only",
        type=lambda text: split(text, ","),
        default=list(PARTS),
        metavar="PART,...",
        help=f"measure these parts only, and leave the others as they are: {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few minutes instead of half an hour"
    )
    parser.add_argument(
        "--peers",
        type=lambda text: split(text, "+"),
        default=list(PEERS),
        metavar="PEER+...",
        help=f"measure these only: {', '.join(PEERS)}",
    )
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page anew")
    parser.add_argument(
        "--results",
        type=Path,
        default=DOCS / "benchmark.json",
        help="the file of the results, beside which the page and its pictures are",
    )
    options = parser.parse_args()
    for given, known in ((options.only, PARTS), (options.peers, PEERS)):
        if unknown := [each for each in given if each not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return options


def _check_tools(peers: list[str]) -> None:
    missing = [] if shutil.which("wrk") else ["wrk (apt-get install wrk)"]
    for peer in peers:
        program = Path(PEERS[peer].line("127.0.0.1:0", 1, 1, "app")[0])
        if not program.exists():
            missing.append(f"{program.relative_to(BIN)} (pip install -e '.[benchmark]')")
    if missing:
        sys.exit(f"Not installed: {', '.join(missing)}")


def _want_many_files() -> None:
    """For many connections; servers inherit it. Root may ask for more than the hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, max(hard, FILES)))
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
