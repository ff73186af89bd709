"""Replica parallelism for gunicorn: p processes x t threads, one queue, an exact bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .extension import Replica
from .stats import Stats

if TYPE_CHECKING:
    from .middleware import ReplicaMiddleware

__all__ = ["Replica", "ReplicaMiddleware", "Stats"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The middleware reads configuration, whose parser is imported when it is needed."""
    if name == "ReplicaMiddleware":
        from .middleware import ReplicaMiddleware

        return ReplicaMiddleware
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
