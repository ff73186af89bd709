"""Overhead: requests a second and CPU per request of a handler that does nothing."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable

from werkzeug.test import EnvironBuilder

from . import alone, bare, served
from .peers import GEVENT, GTHREAD, OURS, STOCK_GEVENT, THREE, UWSGI, Server, serving
from .plan import Run

CONNECTIONS = 16
SHAPES = ((2, 1), (2, 2), (2, 4))
GREEN = (2, 100)  # what gevent mode is for
MAIN = (OURS, GEVENT, UWSGI, GTHREAD, STOCK_GEVENT)
OTHERS = ("sync", "waitress", "granian", "cheroot")
FLOOR, CALLS, ALONE = "without a server", "a call", "alone in one thread"


def cell(p: int, t: int, keep: bool, app: str = "served") -> str:
    which = "Flask" if app == "served" else "bare WSGI"
    return f"{p} x {t}, {'kept-alive' if keep else 'new'}, {which}"


def measure(run: Run) -> None:
    run.part.add(FLOOR, CALLS, {"Flask app, us": call(served.app), "bare app, us": call(bare.app)})
    for name, figures in alone.figures().items():
        run.part.add(ALONE, name, figures)
    for p, t in SHAPES:
        _compare(run, run.among(MAIN + (OTHERS if (p, t) == (2, 2) else ())), p, t, "served")
    _compare(run, run.among((GEVENT, STOCK_GEVENT)), *GREEN, "served")
    _compare(run, run.among(THREE), 2, 2, "bare")


def _compare(run: Run, names: list[str], p: int, t: int, app: str) -> None:
    with serving(names, p, t, app) as servers:
        for keep in (True, False):
            for number in range(run.plan.rounds):
                run.progress.say(cell(p, t, keep, app), f"round {number + 1}")
                for name, server in servers.items():
                    run.part.add(cell(p, t, keep, app), name, wrk(server, keep, run.plan.wrk))


def wrk(
    server: Server, keep: bool, seconds: int, connections: int = CONNECTIONS
) -> dict[str, float]:
    """Requests a second; microseconds of CPU for each, by role, in user and in system mode."""
    header = () if keep else ("-H", "Connection: close")
    line = ("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", *header, server.url)
    said = ""

    def load() -> None:
        nonlocal said
        said = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout

    used = server.cpu_of(load)
    count = int(_number(r"(\d+) requests in", said))
    figures = {
        "requests/s": _number(r"Requests/sec: +([\d.]+)", said),
        "CPU us": sum(map(sum, used.values())) / count * 1e6,
    }
    for role, (user, system) in used.items():
        if user + system:
            figures |= {
                f"{role} user us": user / count * 1e6,
                f"{role} system us": system / count * 1e6,
            }
    if failed := re.search(r"Non-2xx or 3xx responses: (\d+)", said):
        figures["failed"] = float(failed[1])
    return figures


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if not found:
        raise SystemExit(f"wrk did not say {pattern!r}:\n{text}")
    return float(found[1])


def call(app: Callable[..., object], count: int = 5000) -> float:
    """Microseconds of CPU that the app takes for a request without any server: the floor."""
    environ = EnvironBuilder().get_environ()
    times = []
    for _ in range(5):
        begin = time.process_time()
        for _ in range(count):
            for _part in app(dict(environ), lambda *_: None):  # type: ignore[attr-defined]
                pass
        times.append((time.process_time() - begin) / count * 1e6)
    return min(times)
