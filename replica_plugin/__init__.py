"""Replica parallelism for gunicorn: p processes x t threads, one queue, an exact bound."""

from .extension import Replica

__all__ = ["Replica"]
__version__ = "0.1.0"
