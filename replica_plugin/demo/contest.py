"""Stock gunicorn and a replica beside each other: the same app, the same numbers, the same bursts.

1. Before the first burst that counts, every process of both has loaded the app, and both have had
   one burst to warm up.
2. They are never asked at the same time, so neither disturbs the other.
3. Every request comes on a new connection.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path

from .burst import Row, send, sent_together
from .report import Progress, fill
from .server import DemoError, Server
from .trial import Plan, Trial

NAME_COLUMNS, SHARE_COLUMNS = 24, 18
TRIES = 10
APP = "replica_plugin.demo.app:app"
LOADED = "This process has loaded the app"
# Every gunicorn reads this: in a file, other than in options, it passes over what it does not know.
# The control socket, which would be in the user's home, came with 25.1.
STOCK = f"""\
worker_class = "gthread"
workers = {{processes}}
threads = {{threads}}
control_socket_disable = True
def post_worker_init(worker):
    worker.log.info("{LOADED}")
"""
OURS = """\
processes_per_replica: {processes}
threads_per_process: {threads}
"""


@dataclass(frozen=True)
class Contestant:
    """A server that is ready, and what becomes of the bursts it gets."""

    server: Server
    port: int
    trial: Trial

    def burst(self, size: int) -> list[Row]:
        """Send one; again, if it was not sent together."""
        for _ in range(TRIES):
            rows = self._send(size)
            if sent_together(rows):
                return rows
        raise DemoError(
            f"This machine is too busy to send {size} requests together, "
            f"{TRIES} times in a row: try again with less other work"
        )

    def _send(self, size: int) -> list[Row]:
        try:
            return send(self.port, size)
        except (OSError, HTTPException, ValueError) as error:
            reason = f"A request of a burst of {size} failed: {error!r}"
            raise self.server.failure(reason) from error


def compare(plan: Plan, progress: Progress) -> tuple[Trial, Trial]:
    """Run the contest; return what stock gunicorn and what the replica made of it."""
    with (
        tempfile.TemporaryDirectory(prefix="replica-demo-") as folder,
        _contestants(plan, Path(folder), progress) as contestants,
    ):
        for contestant in contestants:
            contestant.burst(plan.slots)
        progress.say(" ready.\n")
        for size in plan.sizes:
            progress.say(f"\n{fill(f'{plan.claim(size)}:')}\n")
            for contestant in contestants:
                _ask(contestant, size, plan, progress)
        stock, ours = (contestant.trial for contestant in contestants)
    return stock, ours


@contextmanager
def _contestants(plan: Plan, folder: Path, progress: Progress) -> Iterator[list[Contestant]]:
    """Start both at the same time, and stop them at the end."""
    progress.say("Starting both (each process trains its model) ...")
    stock_folder = _folder(folder / "stock", "stock.py", STOCK, plan)
    our_folder = _folder(folder / "ours", "replica.yaml", OURS, plan)
    with (
        Server(["-c", "stock.py", APP], stock_folder) as stock,
        Server(["-c", "python:replica_plugin.conf", APP], our_folder) as ours,
    ):
        try:
            stock_port = stock.wait_until_logged(LOADED, plan.processes, plan.patience)
            our_port = ours.wait_until_ready(plan.patience)
            yield [
                Contestant(stock, stock_port, Trial(f"stock gunicorn {version('gunicorn')}", plan)),
                Contestant(ours, our_port, Trial("replica-plugin", plan)),
            ]
        finally:
            stock.dismiss()  # Each takes a second to stop; so both take it at the same time.
            progress.say("\nStopping both ...")


def _folder(folder: Path, name: str, settings: str, plan: Plan) -> Path:
    folder.mkdir()
    text = settings.format(processes=plan.processes, threads=plan.threads)
    (folder / name).write_text(text)
    return folder


def _ask(contestant: Contestant, size: int, plan: Plan, progress: Progress) -> None:
    trial = contestant.trial
    progress.say(f"  {trial.server:<{NAME_COLUMNS}}")
    for _ in range(plan.rounds):
        progress.mark(trial.add(contestant.burst(size)))
    progress.say(f"{trial.share(size):>{SHARE_COLUMNS}}\n")
