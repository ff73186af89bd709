"""The one rule across keys, which is Cortex 0.32's: the target lies within the bound."""

from __future__ import annotations

from typing import Any

from .layer import Layer
from .settings import KEYS, show

BOUND = "max_replica_concurrency"
TARGET = "target_replica_concurrency"
SLOTS = ("threads_per_process", "processes_per_replica")


def check_target(layer: Layer) -> None:
    """Adds a problem to a layer of settings whose target exceeds max_replica_concurrency.

    By default the target is p*t, so p*t above the bound is refused unless a lower target says
    that it is meant. A bad p or t counts as 1, the least that can come of it.
    """
    if layer.bad.intersection((BOUND, TARGET)):
        return
    bound, target = _value(layer, BOUND), _value(layer, TARGET)
    slots = _value(layer, SLOTS[0]) * _value(layer, SLOTS[1])
    if target is not None and target > bound:
        text = f"must be less than or equal to {BOUND}, {bound} (got {show(TARGET, target)})"
        layer.add_problem(layer.places[TARGET], f"{text}; lower it or raise {BOUND}")
    elif target is None and slots > bound:
        blamed = next(key for key in (BOUND, *SLOTS) if key in layer.places)
        about = "at least " if layer.bad.intersection(SLOTS) else ""
        layer.add_problem(layer.places[blamed], _too_many_slots(slots, bound, about))


def _too_many_slots(slots: int, bound: int, about: str) -> str:
    return (
        f"processes_per_replica * threads_per_process must be less than or equal to {BOUND}, "
        f"{bound} (got {about}{slots}), or some slots would never be used; raise {BOUND} to "
        f"{slots}, lower one of the others, or, if it is meant, set {TARGET} to {bound} or less"
    )


def _value(layer: Layer, key: str) -> Any:
    return layer.values.get(key, KEYS[key].default)
