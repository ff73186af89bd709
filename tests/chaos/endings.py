"""How the server ends, and what that may cost. Each returns what was wrong."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from server import wait_for

from chaos.faults import Scene

MOMENT = 1.0  # seconds that a stop may last beyond its time
QUICK = 5.0  # seconds in which a quick one is over


def term(scene: Scene) -> list[str]:
    times = scene.ledger.times
    scene.ledger.stopped_at = scene.ledger.refuses_at = time.monotonic() + times.drain
    scene.to_master(signal.SIGTERM)
    return _exit(scene, times.drain + times.graceful + MOMENT)


def quit_(scene: Scene) -> list[str]:
    return _quick(scene, signal.SIGQUIT)


def int_(scene: Scene) -> list[str]:
    return _quick(scene, signal.SIGINT)


def term_then_quit(scene: Scene) -> list[str]:
    scene.to_master(signal.SIGTERM)
    time.sleep(scene.random.random() * 0.5)
    return _quick(scene, signal.SIGQUIT)


def kill_master(scene: Scene) -> list[str]:
    """What is in flight is answered; nothing new is accepted."""
    scene.ledger.stopped_at = scene.ledger.refuses_at = time.monotonic()
    scene.to_master(signal.SIGKILL)
    scene.server.process.wait()
    return _gone_soon(scene)


def upgrade(scene: Scene) -> list[str]:
    """USR2 and a way back, then USR2 and the end of the old master; no client notices."""
    found = []
    new, times = _second_master(scene), scene.ledger.times
    scene.ledger.stopped_at = time.monotonic()  # what is idle or silent is closed
    scene.signal(new, signal.SIGTERM, "new master")
    # Until it is reaped: before that gunicorn ignores another USR2.
    wait_for(lambda: not os.path.exists(f"/proc/{new}"), "the new master's end", 60.0)
    wait_for(lambda: not (scene.server.folder / "pid.2").exists(), "its pidfile's end")
    new = _second_master(scene)
    scene.to_master(signal.SIGTERM)
    found += _exit(scene, times.drain + times.graceful + MOMENT)
    time.sleep(1.0)  # under clients
    scene.ledger.refuses_at = time.monotonic() + times.drain
    scene.signal(new, signal.SIGTERM, "new master")
    wait_for(lambda: not _lives(new), "the new master's end", 60.0)
    return found


ENDS: dict[str, Callable[[Scene], list[str]]] = {
    "term": term,
    "quit": quit_,
    "int": int_,
    "term-quit": term_then_quit,
    "kill": kill_master,
    "upgrade": upgrade,
}


def _quick(scene: Scene, number: int) -> list[str]:
    scene.ledger.quick = True
    scene.ledger.stopped_at = scene.ledger.refuses_at = time.monotonic() - MOMENT
    scene.to_master(number)
    return _exit(scene, QUICK)


def _exit(scene: Scene, longest: float) -> list[str]:
    began = time.monotonic()
    code = scene.server.process.wait(longest + 5)
    lasted = time.monotonic() - began
    found = [] if code == 0 else [f"the exit code is {code}"]
    return found + ([f"the stop took {lasted:.1f} s"] if lasted > longest else [])


def _gone_soon(scene: Scene) -> list[str]:
    from chaos import checks

    longest = scene.ledger.times.graceful + MOMENT
    with suppress(AssertionError):
        wait_for(lambda: not checks.left(scene.server.folder), "nothing left", longest)
    return []  # whoever is left is told by the run


def _second_master(scene: Scene) -> int:
    """USR2, until the new master's processes serve."""
    scene.watcher.masters = 2
    scene.ledger.doubled_at = scene.ledger.doubled_at or time.monotonic()
    scene.expect(scene.watcher.rules, signal.SIGUSR2)
    path, count = scene.server.folder / "pid.2", scene.watcher.rules.processes
    new = int(wait_for(lambda: path.exists() and path.read_text().strip(), "its pidfile"))
    wait_for(lambda: len(scene.server.children(new)) > count, "its processes", 60.0)
    time.sleep(2.0)  # both serve, under clients
    return new


def _lives(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
