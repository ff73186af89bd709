"""One API of a Cortex file, and the rules across its keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import Place
from .cortex_keys import SETTINGS
from .layer import Layer
from .values import plain

PROCESSES = "predictor.processes_per_replica"
THREADS = "predictor.threads_per_process"
BATCHING = "predictor.server_side_batching"
BATCH_SIZE = f"{BATCHING}.max_batch_size"
MIN, MAX, INIT = (f"autoscaling.{which}_replicas" for which in ("min", "max", "init"))


@dataclass
class Api:
    """Its layer has Cortex's own keys, each as a path from the API: `predictor.type`."""

    place: Place
    name: str = ""
    layer: Layer = field(default_factory=Layer)

    @property
    def kind(self) -> str:
        """Its kind, or nothing where that is bad."""
        return str(self.get("kind", ""))

    def get(self, key: str, default: Any = None) -> Any:
        return self.layer.values.get(key, default)

    def has(self, key: str) -> bool:
        return key in self.layer.values

    def refuse(self, key: str, text: str) -> None:
        self.layer.add_problem(self.layer.places[key], text)

    def settings(self) -> Layer:
        """What this API says about the settings, by their keys."""
        found = {ours: key for ours, key in SETTINGS.items() if key in self.layer.places}
        return Layer(
            values={ours: self.get(key) for ours, key in found.items() if self.has(key)},
            places={ours: self.layer.places[key] for ours, key in found.items()},
            bad={ours for ours, key in found.items() if key in self.layer.bad},
        )


def check(api: Api) -> None:
    """Adds what breaks a rule across keys; a rule rests where one of its values is bad."""
    for rule, keys in _RULES.items():
        if not api.layer.bad.intersection(keys):
            rule(api)


def _one_at_a_time(api: Api) -> None:
    if api.kind not in ("BatchAPI", "AsyncAPI"):
        return
    for key in (PROCESSES, THREADS):
        if api.get(key, 1) > 1:
            api.refuse(key, f"must be 1 for kind {api.kind} (got {api.get(key)})")
    if api.has(BATCH_SIZE):
        api.refuse(BATCHING, f"is not supported for kind {api.kind}; remove it")


def _batching(api: Api) -> None:
    if not api.has(BATCH_SIZE):
        return
    size, threads = api.get(BATCH_SIZE), api.get(THREADS, 1)
    slots = threads * api.get(PROCESSES, 1)
    predictor = api.get("predictor.type")
    if predictor == "python" and size != threads:
        api.refuse(BATCH_SIZE, f"must equal threads_per_process, {threads} (got {size})")
    elif predictor == "tensorflow" and size > slots:
        rule = "must be less than or equal to processes_per_replica * threads_per_process"
        api.refuse(BATCH_SIZE, f"{rule}, {slots} (got {size})")
    elif predictor == "onnx":
        api.refuse(BATCHING, "is not supported for predictor type onnx; remove it")


def _replicas(api: Api) -> None:
    least, most = api.get(MIN, 1), api.get(MAX, 100)
    initial = api.get(INIT, least)
    if least > most:
        api.refuse(MIN, f"must be less than or equal to max_replicas, {most} (got {least})")
    elif not least <= initial <= most:
        text = f"must be from min_replicas, {least}, to max_replicas, {most} (got {initial})"
        api.refuse(INIT, text)


def _shared_memory(api: Api) -> None:
    shared, memory = api.get("predictor.shm_size"), api.get("compute.mem")
    if shared is not None and memory is not None and shared > memory:
        text = f"must be less than or equal to compute.mem, {plain(memory)} (got {plain(shared)})"
        api.refuse("predictor.shm_size", text)


def _cache(api: Api) -> None:
    processes = api.get(PROCESSES, 1)
    for key in _cache_keys():
        if api.has(key) and processes > 1:
            api.refuse(key, f"needs processes_per_replica 1 (got {processes})")


def _cache_keys() -> Iterator[str]:
    return (f"predictor.{models}.cache_size" for models in ("models", "multi_model_reloading"))


_RULES: dict[Callable[[Api], None], tuple[str, ...]] = {
    _one_at_a_time: (PROCESSES, THREADS),
    _batching: (PROCESSES, THREADS, BATCH_SIZE),
    _replicas: (MIN, MAX, INIT),
    _shared_memory: ("predictor.shm_size", "compute.mem"),
    _cache: (PROCESSES, *_cache_keys()),
}
