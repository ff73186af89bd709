"""What is said at boot: what this replica is, what was overridden, what cannot be."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import sys
from typing import NamedTuple

from gunicorn.config import Config

from . import machine, overtime
from .config.load import Loaded

WORKERS = {
    "thread": "replica_plugin.thread_worker.ThreadWorker",
    "gevent": "replica_plugin.gevent_worker.GeventWorker",
}
FALLBACKS = {"thread": "gthread", "gevent": "gevent"}
_BASE = "replica_plugin.worker.ReplicaWorker"


def supported() -> bool:
    """Whether this system has what a dispatcher needs."""
    try:
        for fd in (os.pidfd_open(os.getpid()), os.memfd_create("replica-test"), os.eventfd(0)):
            os.close(fd)
    except (AttributeError, OSError):  # another system; or an old kernel, or a sandbox
        return False
    return hasattr(socket, "SCM_RIGHTS") and sys.platform == "linux"  # which has epoll


def worker_class(mode: str) -> str:
    """Our worker class, or gunicorn's own where ours cannot work."""
    return (WORKERS if supported() else FALLBACKS)[mode]


def missing(mode: str) -> str | None:
    """What has to be installed, and sound, before this mode can work."""
    if mode != "gevent":
        return None
    if not importlib.util.find_spec("gevent"):
        return (
            "gevent is not installed. "
            "Install it with `pip install 'replica-plugin[gevent]'`, or say mode: thread."
        )
    try:  # as gunicorn does next, for which a failure is the end, in a reload, too
        importlib.import_module(worker_class(mode).rpartition(".")[0] or "gevent")
    except Exception as error:  # of another greenlet, say: whatever an extension module raises
        return f"gevent cannot be imported: {error!r}. Mend its installation, or say mode: thread."
    return None


def is_ours(cfg: Config) -> bool:
    """Whether the worker class is one of ours, or made from one."""
    return _BASE in _made_from(cfg)


def mode(cfg: Config) -> str:
    """What a slot is, in a worker class of ours: it decides, whatever the settings say."""
    return "gevent" if WORKERS["gevent"] in _made_from(cfg) else "thread"


def _made_from(cfg: Config) -> set[str]:
    return {f"{each.__module__}.{each.__qualname__}" for each in cfg.worker_class.__mro__}


def describe(processes: int, cfg: Config, loaded: Loaded) -> str:
    """The replica in one line."""
    bound = loaded.settings.max_replica_concurrency
    slots = processes * cfg.threads
    return (
        f"Replica: {_count(processes, 'process', 'es')} x {_count(cfg.threads, 'thread')} = "
        f"{_count(slots, 'request')} at a time "
        f"({mode(cfg)} mode), up to {max(0, bound - slots)} waiting "
        f"(max_replica_concurrency {bound}), from {loaded.file or 'defaults'}"
    )


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else ending}"


def overrides(cfg: Config, loaded: Loaded) -> list[str]:
    """What of gunicorn's command line or configuration won over our settings."""
    if not is_ours(cfg):
        return [_without_dispatcher(cfg)]
    pairs = (
        ("mode", "worker_class", mode(cfg)),
        ("processes_per_replica", "workers", cfg.workers),
        ("threads_per_process", "threads", cfg.threads),
    )
    found = [
        f"Conflict: gunicorn's {theirs} ({value}) wins over {ours}: "
        f"{getattr(loaded.settings, ours)} ({loaded.sources[ours]})"
        for ours, theirs, value in pairs
        if getattr(loaded.settings, ours) != value
    ]
    if loaded.settings.preload and not cfg.preload_app:
        found.append(
            "Conflict: gunicorn's preload_app (False) wins over preload: true "
            f"({loaded.sources['preload']})"
        )
    limit = loaded.settings.request_timeout
    watched = cfg.threads == 1 and mode(cfg) == "thread"
    if limit is not None and watched and 0 < cfg.timeout <= limit:
        found.append(_first_comes_timeout(cfg.timeout, limit, loaded))
    return found


def shortages(cfg: Config, loaded: Loaded) -> list[str]:
    """What of the settings this machine does not allow."""
    if not is_ours(cfg):
        return []
    has_extra = mode(cfg) == "thread" and cfg.threads > 1 and bool(loaded.settings.exempt)
    slots = cfg.threads + has_extra
    bound = loaded.settings.max_replica_concurrency
    return machine.shortages(machine.read(), bound, cfg.workers, slots, cfg.backlog)


def _first_comes_timeout(timeout: int, limit: float, loaded: Loaded) -> str:
    """With one thread gunicorn's `timeout` watches over each request; see docs/design.md."""
    return (
        f"Conflict: gunicorn's timeout ({timeout} s) can come before request_timeout: {limit:g} s "
        f"({loaded.sources['request_timeout']}). It ends the process of a request that keeps the "
        f"GIL for so long, or runs for {2 * timeout} s. "
        f"Set --timeout above {limit + overtime.GRACE:g}, or a shorter request_timeout."
    )


def _without_dispatcher(cfg: Config) -> str:
    why = "this worker class was asked for"
    if not supported():
        why = "this system lacks epoll, pidfd or the passing of descriptors"
    return (
        f"No dispatcher: worker class {cfg.worker_class_str} ({why}). Each process keeps a queue "
        f"of its own, with {cfg.threads} threads; that all slots are used before a request waits, "
        "the order of requests and their bound are not promised."
    )


class Refusal(NamedTuple):
    """The reason and the way out, and what it is about: gunicorn's settings and ours, by name."""

    told: str
    settings: tuple[str, ...]


def refusals(cfg: Config, loaded: Loaded) -> list[Refusal]:
    """Settings that cannot hold with a dispatcher."""
    if not is_ours(cfg):
        return []
    found = []

    def refuse(told: str, *settings: str) -> None:
        found.append(Refusal(told, settings))

    if cfg.reuse_port:
        refuse(
            "reuse_port: one dispatcher accepts for all workers, so a socket for each of them "
            "would not be served. Leave --reuse-port out.",
            "reuse_port",
        )
    if cfg.is_ssl:
        refuse(
            "certfile, keyfile: the dispatcher hands over plain sockets and cannot do TLS yet. "
            "Leave them out and let a proxy in front (nginx, a load balancer) do TLS.",
            "certfile", "keyfile",
        )  # fmt: skip
    if _wants_http2(cfg):
        refuse(
            "http_protocols, http2_cleartext: HTTP/2 carries many requests on one connection, "
            "which cannot be handed to one slot. Leave h2 out; a proxy in front can speak it.",
            "http_protocols", "http2_cleartext",
        )  # fmt: skip
    if getattr(cfg, "protocol", "http") != "http":
        refuse(
            f"protocol: the dispatcher looks at HTTP requests only (got {cfg.protocol}). "
            "Leave --protocol out and have the proxy speak HTTP.",
            "protocol",
        )
    if cfg.threads < 1:
        refuse(
            f"threads ({cfg.threads}): a process without a slot would run nothing. "
            "Set --threads to 1 or more.",
            "threads",
        )
    if _is_over_bound(cfg, loaded):
        refuse(
            _over_bound(cfg, loaded),
            "workers", "threads", "max_replica_concurrency", "target_replica_concurrency",
        )  # fmt: skip
    return found


def _wants_http2(cfg: Config) -> bool:
    return "h2" in getattr(cfg, "http_protocols", ()) or getattr(
        cfg, "http2_cleartext", "off"
    ) not in ("off", False, None)


def _is_over_bound(cfg: Config, loaded: Loaded) -> bool:
    """As in Cortex, a bound below p*t is refused by way of the target that follows from p*t."""
    settings = loaded.settings
    if settings.target_replica_concurrency is not None:
        return False
    return bool(cfg.workers * cfg.threads > settings.max_replica_concurrency)


def _over_bound(cfg: Config, loaded: Loaded) -> str:
    bound = loaded.settings.max_replica_concurrency
    return (
        f"max_replica_concurrency ({bound}) is less than workers x threads "
        f"({cfg.workers} x {cfg.threads} = {cfg.workers * cfg.threads}). "
        "Raise it, or lower workers or threads."
    )
