"""The command replica-plugin: init, check and demo."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper

from .config import check, templates
from .config.load import load
from .errors import ConfigError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 for a refusal, 2 for bad settings."""
    if sys.stdout is None:
        return _refuse("cannot write to stdout: it is closed")
    if isinstance(sys.stdout, TextIOWrapper):  # whose encoding may lack what a path has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except OSError as error:
        # What is left of the output must not fail at exit again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        has_gone = isinstance(error, BrokenPipeError)  # whoever read it, and needs no words
        return 1 if has_gone else _refuse(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(argv: list[str]) -> int:
    # The demo has options of its own, which argparse would try to understand here.
    if argv[:1] == ["demo"]:
        from . import demo

        return demo.main(argv[1:])
    options = _parser().parse_args(argv)
    return _init() if options.command == "init" else _check(options.file, options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replica-plugin")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("init", help="write replica.yaml and replica_plugin.conf here")
    checker = commands.add_parser("check", help="show the settings in effect, or what is wrong")
    checker.add_argument("file", nargs="?", help="default: what gunicorn would read here")
    checker.add_argument("--json", action="store_true", help="for programs")
    commands.add_parser("demo", help="compare with stock gunicorn", add_help=False)
    return parser


def _version() -> str:
    try:
        return f"replica-plugin {version('replica-plugin')}"
    except PackageNotFoundError:
        return "replica-plugin, not installed"


def _init() -> int:
    try:
        existing = templates.write()
    except OSError as error:
        return _refuse(f"cannot write {error.filename}: {error.strerror}")
    if existing:
        return _refuse(f"already there, nothing written: {', '.join(existing)}")
    print("wrote replica.yaml and replica_plugin.conf")
    print("next: gunicorn -c replica_plugin.conf app:app")
    return 0


def _refuse(text: str) -> int:
    print(f"replica-plugin: {text}", file=sys.stderr)
    return 1


def _check(file: str | None, as_json: bool) -> int:
    try:
        loaded = load(file)
    except ConfigError as error:
        if as_json:
            print(check.as_json(error))
        else:
            print(error, file=sys.stderr)
        return 2
    print(check.as_json(loaded) if as_json else check.report(loaded))
    return 0
