"""One run: a server, a crowd, faults for some minutes, and the verdict."""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from server import Server, wait_for

from chaos import checks, clients, endings, faults, network
from chaos.app import Limits
from chaos.clients import Crowd
from chaos.faults import Scene
from chaos.ledger import Ledger, Times
from chaos.rules import Judge

CONFIG = """\
from replica_plugin import overtime
overtime.GRACE = {grace}
from replica_plugin.conf import *

def when_ready(server):
    server.cfg.set("daemon", True)  # which is when gunicorn heeds WINCH; it is none

on_reload = when_ready
"""
COMMAND = (str(Path(sys.executable).parent / "gunicorn"),)
SETTLED = 60.0  # seconds in which everything that was begun has to be over
SHOWN = 20  # problems that are printed


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    if not network.has_moved():
        obstacle = network.obstacle()
        if not obstacle:
            suite = str(Path(__file__).parent)
            network.move([sys.executable, suite, *arguments, f"--seed={options.seed}"])
        print(f"No connections are cut, since there is no network of our own: {obstacle}")
    chosen = (f"--{name} {value}" for name, value in vars(options).items())
    command = " ".join(["python tests/chaos", *chosen])
    print(command, flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    run = ChaosRun(options, folder)
    try:
        problems = run.play()
    except BaseException:
        run.kill()
        print(f"The log, and what the app noted: {folder}\nAgain: {command}")
        raise
    for problem in problems[:SHOWN]:
        print(f"\nPROBLEM {problem}")
    run.report()
    if problems:
        print(f"\n{len(problems)} problems. The log, and what the app noted: {folder}")
        print(f"Again: {command}")
        return 1
    shutil.rmtree(folder)
    print("All accounted for.")
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/chaos", description="Chaos for a replica.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() // 1000 % 1_000_000)
    parser.add_argument("--mode", choices=("thread", "gevent"), default="thread")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=50.0, help="clients a second")
    parser.add_argument("--preload", type=int, choices=(0, 1), help="else the seed chooses")
    parser.add_argument("--drain", type=float, help="drain_delay; else the seed chooses")
    parser.add_argument("--end", choices=list(endings.ENDS), help="else the seed chooses")
    options = parser.parse_args(arguments)
    chosen = random.Random(f"{options.seed} variant")
    variant = {
        "preload": int(chosen.random() < 0.3),
        "drain": chosen.choice((0.0, 1.0)),
        "end": chosen.choice(list(endings.ENDS)),
    }
    for name, value in variant.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


class ChaosRun:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self.ledger = Ledger(Times(drain=options.drain))
        self._faults: Counter[str] = Counter()
        self._watcher: checks.Watcher | None = None

    def play(self) -> list[str]:
        """The problems that were found."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        scene = self._begin()
        found = self._quiet_then(scene)
        found += self._stop(scene)
        scene.crowd.close()
        scene.watcher.close()
        log = scene.server.log
        found += self._start_again(scene)
        self.ledger.read_runs((self._folder / "events").read_text().splitlines())
        found += scene.watcher.unasked() + scene.watcher.exceeded() + scene.crowd.errors
        judge = Judge(self.ledger)
        found += checks.tracebacks(log)
        found += checks.unexplained(log, judge.doomed() | scene.watcher.causes.keys())
        return found + judge.problems()

    def _begin(self) -> Scene:
        options, times, net = self._options, self.ledger.times, network.Network()
        cap = options.processes * options.threads
        numbers = options.processes, options.threads, cap + 20
        config = faults.settings(options.mode, *numbers, bool(options.preload), times)
        limits = Limits(self._folder / "limits")
        limits.write(cap, options.processes, cap + 20)
        (self._folder / "events").touch()
        server = self._server(config)
        self._watcher = watcher = checks.Watcher(server, self.ledger, self._folder, limits)
        rate = min(options.rate, 15.0 * cap)
        crowd = Crowd(self.ledger, server.addresses, net, options.seed, rate)
        return Scene(server, crowd, watcher, self.ledger, config, options.seed)

    def _server(self, config: dict[str, Any], port: int = 0) -> Server:
        times = self.ledger.times
        app = faults.APP.format(
            before="", folder=str(self._folder), version="1", preload=config["preload"]
        )
        files = {"served.py": app, "chaotic.py": CONFIG.format(grace=times.grace)}
        return Server(
            self._folder,
            *("--timeout", "60", "--graceful-timeout", f"{times.graceful:g}"),
            *("--keep-alive", f"{times.keepalive:g}"),
            *("--max-requests", "400", "--max-requests-jitter", "200", "--pid", "pid"),
            config=config,
            base=("-c", "chaotic.py"),
            bind=(f"127.0.0.1:{port}", "unix:sock"),
            app="served:application",
            files=files,
            command=COMMAND,  # `python -m gunicorn` cannot be upgraded: its argv is no script
            mode="thread",  # the configuration says it
            env={"CHAOS": str(self._folder), "HOME": str(self._folder)},
        )

    def _quiet_then(self, scene: Scene) -> list[str]:
        """A quiet time, a wild one, and another quiet one, which must be as the first."""
        scene.crowd.send(clients.plain, 40, "large", "900")
        self._settle(scene)
        before = checks.usage(scene.server)
        scene.crowd.come()
        self._harass(scene)
        scene.crowd.pause()
        self._settle(scene)
        scene.write_app()
        old = scene.server.workers
        scene.reload(scene.first)
        wait_for(lambda: not set(old) & set(scene.server.workers), "new processes", SETTLED)
        self._settle(scene)
        scene.crowd.send(clients.plain, 40, "large", "900")
        self._settle(scene)
        return checks.growth(before, checks.usage(scene.server))

    def _harass(self, scene: Scene) -> None:
        end = time.monotonic() + 60 * self._options.minutes
        while time.monotonic() < end:
            mix = dict(faults.MIX)
            for fault in faults.OF_THE_APP if self._options.preload else ():
                del mix[fault]
            fault = scene.random.choices(list(mix), list(mix.values()))[0]
            self._faults[fault.__name__] += 1
            fault(scene)
            time.sleep(scene.random.choice((0, 0.3, 1, 2)))

    def _settle(self, scene: Scene) -> None:
        """Until nothing goes on, and all processes are there."""
        scene.crowd.pause()
        server, rules = scene.server, scene.watcher.rules

        def settled() -> bool:
            now = server.numbers()
            return (
                (now.running, now.waiting, now.connections) == (0, 0, 0)
                and now.processes == rules.processes == len(server.workers)
                and now.slots == rules.cap
            )

        wait_for(settled, f"a settled replica; {server.numbers()}, {server.workers}", SETTLED)
        assert server.get("/-/readyz").status == 200
        wait_for(lambda: server.numbers().connections == 0, "the probe's end")

    def _stop(self, scene: Scene) -> list[str]:
        """The end, under clients that come on and on."""
        scene.crowd.come()
        time.sleep(1.5)
        found = endings.ENDS[self._options.end](scene)
        scene.crowd.pause()
        try:
            wait_for(lambda: not checks.left(self._folder), "no process left", 5.0)
        except AssertionError:
            found.append(f"processes are left: {checks.left(self._folder)}")
            self.kill()
        return found

    def _start_again(self, scene: Scene) -> list[str]:
        """In the same place, with what the last one may have left there."""
        again = self._server(scene.first, scene.server.address[1])
        code = again.stop()
        return [f"the exit code after a new start is {code}"] if code else []

    def report(self) -> None:
        """What has happened, in numbers."""
        print(f"\n{len(self.ledger.entries)} requests")
        for reason, count in Judge(self.ledger).outcomes().most_common():
            print(f"{count:7} {reason}")
        print(f"{sum(self._faults.values())} faults")
        for name, count in self._faults.most_common():
            print(f"{count:7} {name.replace('_', ' ')}")
        died = Counter(d.role for d in self.ledger.deaths)
        print(f"deaths: {dict(died)}")
        judge = Judge(self.ledger)
        print(f"order: {len(judge.waits)} waited so long that it could be checked")
        restarts = [round(1000 * seconds) for seconds in sorted(judge.restarts())]
        if restarts:
            middle = restarts[len(restarts) // 2]
            print(f"next begin after a dispatcher: p50 {middle} ms, longest {restarts[-1]} ms")

    def kill(self) -> None:
        """Whatever is left, by pid."""
        for pid in checks.left(self._folder):
            os.kill(pid, signal.SIGKILL)
        if self._watcher is not None:
            self._watcher.close()
