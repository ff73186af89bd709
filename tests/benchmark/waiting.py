"""Waiting: how long requests that come at random take, beside an ideal queue fed the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from .ideal import poisson, services, sojourns
from .load import Request, lateness, open_loop
from .numbers import percentile
from .peers import CAPPED, GEVENT, THREE, Server, serving
from .plan import Run

MEAN = 0.03  # seconds of service
P, T = 2, 2
GENERATOR = "load generator"
OWN_SLEEP = "p99, of its own sleep"
SLEEPS = 50
Arrivals = list[tuple[float, str]]


@dataclass(frozen=True)
class Cell:
    """`slots` are the servers of the ideal queue: CPU-bound requests have but the CPUs."""

    load: int  # in percent of what the slots can do
    service: str = "exponential"
    work: str = "sleep"
    keep: bool = False
    slots: int = P * T
    mean: float = MEAN

    def __str__(self) -> str:
        how = "kept-alive" if self.keep else "new"
        return f"{self.load} %, {self.service}, {self.work}, {how}"

    def schedule(
        self, seconds: float, seed: int, overslept: float = 0.0
    ) -> tuple[Arrivals, list[float], list[float]]:
        """What to ask for and when, and what the ideal queue takes for each; and if each sleeps
        longer than it was asked to, by so many seconds."""
        times = poisson(self.load / 100 * self.slots / self.mean, seconds, seed)
        durations = services(self.service, self.mean, len(times), seed)
        asked = [
            (at, f"/{self.work}/{each:.6f}") for at, each in zip(times, durations, strict=True)
        ]
        longer = [each + overslept for each in durations]
        return asked, sojourns(times, durations, self.slots), sojourns(times, longer, self.slots)


MAIN = [Cell(75), Cell(90)]
SLEEPING = [
    Cell(50),
    Cell(95),
    *(Cell(load, service) for service in ("constant", "heavy-tailed") for load in (75, 90)),
]
KEPT = [Cell(load, keep=True) for load in (75, 90)]
BURNING = [Cell(load, work="burn", slots=2) for load in (50, 75)]


def measure(run: Run) -> None:
    with serving(run.among(CAPPED), P, T) as servers:
        longer = {name: oversleep(server) for name, server in servers.items()}
        for name, seconds in longer.items():
            run.part.add("one request", name, {"sleeps longer by us": seconds * 1e6})
        _cells(run, MAIN, servers, run.plan.rounds, run.plan.main, longer)
        some = {name: servers[name] for name in run.among(THREE)}
        _cells(run, SLEEPING, some, run.plan.less, run.plan.rest, longer)
        some = {name: servers[name] for name in run.among((*THREE, GEVENT))}
        _cells(run, KEPT, some, run.plan.less, run.plan.rest, longer)
    with serving(run.among(THREE), P, 1) as servers:
        _cells(run, BURNING, servers, run.plan.less, run.plan.rest, {})


def _cells(
    run: Run,
    cells: Sequence[Cell],
    servers: Mapping[str, Server],
    rounds: int,
    seconds: float,
    longer: Mapping[str, float],
) -> None:
    for cell in cells:
        for number in range(rounds):
            for name, server in servers.items():
                if cell.keep and name == "uWSGI":
                    continue  # its http-socket keeps no connection
                run.progress.say(cell, f"round {number + 1}", name)
                figures, late = ratios(server, cell, seconds, number, longer.get(name))
                run.part.add(str(cell), name, figures)
                run.part.add(str(cell), GENERATOR, late)


def oversleep(server: Server) -> float:
    """How much longer a handler sleeps than it asks for, in seconds, while nothing else happens:
    the timer's, which no queue can make up for."""
    asked = [(number / 50, f"/sleep/{0.01 + number / 5e4:.6f}") for number in range(SLEEPS)]
    requests = open_loop(server.address, asked, keep=False)
    return median(each.overslept for each in requests)


def ratios(
    server: Server, cell: Cell, seconds: float, seed: int, overslept: float | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """What requests took, divided by what the ideal queue's did; and how late they were sent."""
    arrivals, ideal, sleeping_longer = cell.schedule(seconds, seed, overslept or 0.0)
    requests = open_loop(server.address, arrivals, cell.keep)
    figures = {"failed": float(sum(each.status != 200 for each in requests))}
    took = _took(requests)
    figures["mean"] = mean(took) / mean(ideal)
    for percent in (50, 99, 99.9):
        figures[f"p{percent}"] = percentile(took, percent) / percentile(ideal, percent)
    if overslept is not None:
        figures[OWN_SLEEP] = percentile(took, 99) / percentile(sleeping_longer, 99)
    return {**figures, "p99 ms": percentile(took, 99) * 1000}, lateness(requests)


def _took(requests: Sequence[Request]) -> list[float]:
    """What has no answer has waited at least until the end."""
    end = max(each.done for each in requests)
    return [(each.done or end) - each.due for each in requests]
