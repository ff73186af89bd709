"""`replica-plugin demo`: one app on stock gunicorn and on a replica, and when each request ran.

Both have p processes of t threads and get the same bursts of p*t and of p*t + 1 requests. What is
told and drawn, and the exit code, come from the times the requests report, not from the settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from .contest import compare
from .report import Progress, as_json, charts, introduction
from .server import DemoError, handling
from .svg import picture
from .trial import Plan, Trial

PACKAGES = {"flask": "flask", "sklearn": "scikit-learn"}
MOST = 8  # more bars than 8 x 8 + 1 nobody reads
MOST_ROUNDS = 30  # each has a mark on one line


def main(argv: Sequence[str]) -> int:
    """Run the demo; return 0 if the replica kept its promises, 1 if not, 2 if it cannot run."""
    options = _parse(argv)
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        names = " and ".join(missing)
        print(f"The demo needs {names}: pip install 'replica-plugin[demo]'", file=sys.stderr)
        return 2
    plan = Plan(options.processes, options.threads, options.rounds)
    progress = Progress(None if options.json else sys.stdout)
    progress.say(f"{introduction(plan)}\n\n")
    try:
        with handling(_leave):
            stock, ours = compare(plan, progress)
    except DemoError as error:
        progress.say("\n")
        print(error, file=sys.stderr)
        return 1
    except SystemExit:
        progress.say("\n")
        raise
    print(as_json(stock, ours) if options.json else f"\n\n{charts(stock, ours, sys.stdout)}")
    drawn = not options.svg or _draw(options.svg, stock, ours)
    return 0 if drawn and not ours.broken() else 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="replica-plugin demo",
        description="Serve one app with stock gunicorn and with replica-plugin, send both as many "
        "requests as they have threads, then one more, and show when each of them ran.",
        epilog="Needs nothing but free ports on 127.0.0.1, and leaves nothing behind.",
    )
    for name, default, most, meaning in (
        ("processes", 2, MOST, "of each server"),
        ("threads", 2, MOST, "of each process"),
        ("rounds", 10, MOST_ROUNDS, "how often each burst is sent"),
    ):
        hint = f"{meaning}, 1 to {most} (default: {default})"
        number = _up_to(most)
        parser.add_argument(f"--{name}", type=number, default=default, metavar="N", help=hint)
    parser.add_argument("--json", action="store_true", help="print all requests as JSON instead")
    parser.add_argument("--svg", type=_file, metavar="FILE", help="draw a picture for a page, too")
    return parser.parse_args(argv)


def _up_to(most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if text.isdecimal() and 1 <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be 1 to {most}, not {text}")

    return number


def _file(name: str) -> Path:
    """A place to write to, looked at before anybody waits for what shall stand there."""
    path = Path(name)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a folder, name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}, make it first")
    return path


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _draw(path: Path, stock: Trial, ours: Trial) -> bool:
    try:
        path.write_text(picture(stock, ours), encoding="utf-8")
    except OSError as error:
        print(f"replica-plugin: cannot write {path}: {error.strerror}", file=sys.stderr)
        return False
    return True
