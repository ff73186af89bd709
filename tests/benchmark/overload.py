"""Overload: what is still answered when too much comes, and how soon the rest hears."""

from __future__ import annotations

from collections.abc import Sequence

from .ideal import poisson
from .load import Request, lateness, open_loop
from .numbers import percentile
from .peers import CAPPED, THREE, serving
from .plan import Run

SERVICE = 0.01
P, T = 2, 2
BOUND = 40  # max_replica_concurrency of ours: the last to be admitted waits some 100 ms
USEFUL = 1.0  # an answer that took longer is worth nothing
TIMES = (1, 2, 4)
GENERATOR = "load generator"


def measure(run: Run) -> None:
    env = {"REPLICA_MAX_REPLICA_CONCURRENCY": str(BOUND)}
    for times in TIMES:
        for number in range(run.plan.less):
            for name in run.among(THREE if number else CAPPED):
                run.progress.say(f"{times} times capacity", f"round {number + 1}", name)
                rate = times * P * T / SERVICE
                times_due = poisson(rate, USEFUL + run.plan.overload, number)
                arrivals = [(at, f"/sleep/{SERVICE}") for at in times_due]
                # A server of its own for each: one that was overloaded goes on for a while.
                with serving([name], P, T, env=env) as servers:
                    requests = open_loop(servers[name].address, arrivals, patience=USEFUL)
                run.part.add(cell(times), name, _figures(requests, run.plan.overload))
                run.part.add(cell(times), GENERATOR, lateness(requests))


def cell(times: int) -> str:
    return f"{times} times capacity"


def _figures(requests: Sequence[Request], seconds: float) -> dict[str, float]:
    """Goodput is that of the last so many seconds: before, a queue had yet to grow."""
    whole = USEFUL + seconds
    start, end = requests[0].due + USEFUL, requests[0].due + whole
    answered = [each.took * 1000 for each in requests if each.status == 200]
    useful = [each for each in requests if each.status == 200 and each.took <= USEFUL]
    refused = [each.took * 1000 for each in requests if each.status in (429, 503)]
    figures = {"goodput/s": sum(start < each.done <= end for each in useful) / seconds}
    if answered:
        figures |= {
            "admitted p50 ms": percentile(answered, 50),
            "admitted p99 ms": percentile(answered, 99),
        }
    if refused:
        figures |= {"refused/s": len(refused) / whole, "refused p99 ms": percentile(refused, 99)}
    return {**figures, "unanswered/s": (len(requests) - len(answered) - len(refused)) / whole}
