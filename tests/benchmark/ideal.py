"""What a server is compared with: one first-in-first-out queue before c equal servers.

It is fed the same arrivals and service times as the real one, so that a ratio to it has the chance
of neither in it.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence

SIGMA = 1.2  # of the heavy tail, a lognormal: its variance is 3.2 times the squared mean


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests arrive that come at random, so many a second."""
    source = random.Random(f"arrivals {seed}")
    times = []
    now = source.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += source.expovariate(rate)
    return times


def services(kind: str, mean: float, count: int, seed: int) -> list[float]:
    """How long requests run, in seconds, rounded as they are sent."""
    source = random.Random(f"services {seed}")
    draw: Callable[[], float] = {
        "constant": lambda: mean,
        "exponential": lambda: source.expovariate(1 / mean),
        "heavy-tailed": lambda: source.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA),
    }[kind]
    return [round(draw(), 6) for _ in range(count)]


def sojourns(arrivals: Sequence[float], durations: Sequence[float], servers: int) -> list[float]:
    """From arrival to end, of each request."""
    free = [0.0] * servers
    found = []
    for arrival, duration in zip(arrivals, durations, strict=True):
        end = max(arrival, free[0]) + duration
        heapq.heapreplace(free, end)
        found.append(end - arrival)
    return found
