"""`flask replica check` and `flask replica init`: what `replica-plugin` says and does.

Flask imports this for each of its commands, so it imports nothing but click; and runs it
without loading the app, which may not be there yet.
"""

from __future__ import annotations

import sys

import click


@click.group()
def replica() -> None:
    """Settings of the replica that serves this app."""


@replica.command()
def init() -> None:
    """Write replica.yaml and replica_plugin.conf here."""
    _run("init")


@replica.command()
@click.argument("file", required=False)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def check(file: str | None, as_json: bool) -> None:
    """Show the settings in effect, or what is wrong.

    FILE is what gunicorn would read here, unless it is given.
    """
    _run("check", *(["--json"] if as_json else []), *(["--", file] if file else []))


def _run(*arguments: str) -> None:
    from .cli import main

    sys.exit(main(arguments))
