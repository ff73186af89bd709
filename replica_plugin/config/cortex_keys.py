"""The keys of a Cortex 0.32 API file, with the rules of Cortex's own validation.

Where Cortex checks against a cluster, a bucket or the project's files, only the type is checked
here: this plugin serves the app that gunicorn loads, so those keys are left alone.
"""

from __future__ import annotations

from .layer import Section
from .quantities import Duration, Quantity
from .settings import KEYS
from .values import Anything, Choice, Integer, Kind, Nullable, Number, Text

MEBI = 2**20

KIND = Choice(("RealtimeAPI", "AsyncAPI", "BatchAPI", "TaskAPI", "TrafficSplitter"))

# The four keys that a Cortex file has for us, and where it has them.
SETTINGS = {
    "processes_per_replica": "predictor.processes_per_replica",
    "threads_per_process": "predictor.threads_per_process",
    "max_replica_concurrency": "autoscaling.max_replica_concurrency",
    "target_replica_concurrency": "autoscaling.target_replica_concurrency",
}


def _ours(key: str) -> Kind:
    kind: Kind = KEYS[key].metadata["kind"]
    return kind


_PERIOD = Duration(least=0, as_in_cortex=True)
_SHARE = Text(r"[0-9]+%?", "a percentage such as 25% or a number of replicas", also=("int",))

_DEPENDENCIES = Section({"pip": Text(), "conda": Text(), "shell": Text()})
_MODELS = Section(
    {
        "path": Text(),
        "paths": Anything(),
        "dir": Text(),
        "signature_key": Text(),
        "cache_size": Integer(above=0),
        "disk_cache_size": Integer(above=0),
    }
)
_BATCHING = Section(
    {
        "max_batch_size": Integer(2, 1024),
        "batch_interval": Duration(above=0, as_in_cortex=True),
    },
    required=("max_batch_size", "batch_interval"),
    nullable=True,
)
_COMMON: dict[str, Kind | Section] = {
    "path": Text(),
    "python_path": Text(),
    "image": Text(r"(?s).*"),
    "log_level": Choice(("debug", "info", "warning", "error")),
    "config": Anything(),
    "env": Anything(),
    "dependencies": _DEPENDENCIES,
}
_PREDICTOR = Section(
    {
        **_COMMON,
        "type": Choice(("python", "tensorflow", "onnx")),
        "protobuf_path": Nullable(Text()),
        "tensorflow_serving_image": Text(r"(?s).*"),
        "processes_per_replica": _ours("processes_per_replica"),
        "threads_per_process": _ours("threads_per_process"),
        "shm_size": Nullable(Quantity()),
        "models": _MODELS,
        "multi_model_reloading": _MODELS,
        "server_side_batching": _BATCHING,
    }
)
_AUTOSCALING = Section(
    {
        "min_replicas": Integer(above=0),
        "max_replicas": Integer(above=0),
        "init_replicas": Integer(above=0),
        "max_replica_concurrency": _ours("max_replica_concurrency"),
        "target_replica_concurrency": _ours("target_replica_concurrency"),
        "window": Duration(least=10, as_in_cortex=True, multiple_of=10),
        "downscale_stabilization_period": _PERIOD,
        "upscale_stabilization_period": _PERIOD,
        "max_downscale_factor": Number(least=0, below=1),
        "max_upscale_factor": Number(above=1),
        "downscale_tolerance": Number(least=0, below=1),
        "upscale_tolerance": Number(least=0),
    }
)
_COMPUTE = Section(
    {
        "cpu": Nullable(Quantity(least=0.02, number_allowed=True)),
        "mem": Nullable(Quantity(least=20 * MEBI)),
        "gpu": Integer(least=0),
        "inf": Integer(least=0),
    }
)
_EVERY_API: dict[str, Kind | Section] = {
    "name": Text(),
    "kind": KIND,
    "networking": Section({"endpoint": Text()}),
}
_SCALED: dict[str, Kind | Section] = {
    "autoscaling": _AUTOSCALING,
    "update_strategy": Section({"max_surge": _SHARE, "max_unavailable": _SHARE}),
}
_SERVER = Section(
    {**_EVERY_API, "predictor": _PREDICTOR, "compute": _COMPUTE, **_SCALED},
    required=("name", "predictor"),
)
_BATCH = Section(
    {**_EVERY_API, "predictor": _PREDICTOR, "compute": _COMPUTE}, required=("name", "predictor")
)
_TASK = Section(
    {**_EVERY_API, "definition": Section(_COMMON), "compute": _COMPUTE},
    required=("name", "definition"),
)
_SPLITTER = Section({**_EVERY_API, "apis": Anything()}, required=("name", "apis"))

APIS = {
    "RealtimeAPI": _SERVER,
    "AsyncAPI": _SERVER,
    "BatchAPI": _BATCH,
    "TaskAPI": _TASK,
    "TrafficSplitter": _SPLITTER,
}
