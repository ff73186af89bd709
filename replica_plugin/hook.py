"""How we get into gunicorn: settings for its configuration, and hooks beside the user's own.

What is taken into a configuration file is little: workers, threads, the worker class, and
`nworkers_changed`, the first hook that sees the final settings, before anything listens.
All else is added to the finished configuration when gunicorn asks our worker class to
check it (`check_config`), right before `when_ready`; so it does not matter which hooks the
user's file defines, above our line or below.

    configuration read -> nworkers_changed -> listeners -> check_config -> when_ready -> fork
    reload: configuration read -> setup (wrapped, master.py) -> on_reload -> fork
"""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gunicorn.config import Config

from .config.load import Loaded, load
from .errors import BootError, ConfigError

if TYPE_CHECKING:  # the master's part cannot be imported everywhere: see `supported`
    from .master import Arbiter, Master

WORKER = "replica_plugin.worker.ThreadWorker"
FALLBACK = "gthread"
_IMPORTING = ("importlib", __package__)  # whose frames lie between a user's file and us

_loaded: Loaded | None = None
_log: Any = None  # gunicorn's, once it has read its configuration
_master: Master | None = None
_told: tuple[str, ...] = ()


def supported() -> bool:
    """Whether this system has what a dispatcher needs."""
    try:
        select.epoll().close()
        for fd in (os.pidfd_open(os.getpid()), os.memfd_create("replica-test"), os.eventfd(0)):
            os.close(fd)
    except (AttributeError, OSError):  # another system; or an old kernel, or a sandbox
        return False
    return hasattr(socket, "SCM_RIGHTS")


def gunicorn_settings() -> dict[str, Any]:
    """What a configuration file of gunicorn takes over from `replica.yaml`.

    A mistake in it ends gunicorn with a message. In a reload it is logged instead, and
    what held before goes on to hold.
    """
    settings = _load().settings
    return {
        "workers": settings.processes_per_replica,
        "threads": settings.threads_per_process,
        "worker_class": WORKER if supported() else FALLBACK,
        "nworkers_changed": _beside_one_above(),
    }


def _beside_one_above() -> Callable[..., None]:
    """Ours, and the one that the user's file has defined above our line, which it replaces."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] in _IMPORTING:
        frame = frame.f_back
    theirs = frame.f_globals.get("nworkers_changed")
    if theirs is None:
        return nworkers_changed

    def both(arbiter: Arbiter, new: int, old: int | None) -> None:  # gunicorn counts arguments
        nworkers_changed(arbiter, new, old)
        theirs(arbiter, new, old)

    return both


def _load() -> Loaded:
    global _loaded
    try:
        _loaded = load()
    except ConfigError as error:
        if _log is None:
            raise SystemExit(f"\n{error}\n") from None
        _log.error("%s\nThe settings from before go on to hold.", error)
    assert _loaded is not None
    return _loaded


def master() -> Master | None:
    """The master's part, in the master and in what it forks; None if there is none."""
    return _master


# Hooks of gunicorn's. Each is called beside the user's own.


def nworkers_changed(arbiter: Arbiter, new: int, old: int | None) -> None:
    """The number of workers is set: at the start, in a reload, with TTIN and TTOU."""
    if old is None:
        _before_listening(arbiter.cfg, arbiter.log)
        return
    _forget_modules(arbiter.cfg)
    if _master is not None:
        _master.tell()


def check_config(cfg: Config, log: Any) -> None:
    """gunicorn has read its configuration, listens, and is about to call `when_ready`."""
    _before_listening(cfg, log)
    _add_hooks(cfg)


def _when_ready(arbiter: Arbiter) -> None:
    from .master import Master

    global _master
    assert _loaded is not None
    _master = Master(arbiter, _loaded.settings)
    _wrap(arbiter, _master)
    arbiter.log.info("%s", _describe(arbiter, _loaded))


def _pre_fork(arbiter: Arbiter, worker: Any) -> None:
    if _master is not None:
        _master.tell(worker.age)


def _child_exit(arbiter: Arbiter, worker: Any) -> None:
    if _master is not None:
        _master.tell()


def _worker_exit(arbiter: Arbiter, worker: Any) -> None:
    """Called in the worker, but in the master for one that was found dead."""
    if _master is not None and os.getpid() == arbiter.pid:
        _master.tell()


def _on_exit(arbiter: Arbiter) -> None:
    if _master is not None:
        _master.end()


_HOOKS: dict[str, Callable[..., None]] = {
    "nworkers_changed": nworkers_changed,
    "when_ready": _when_ready,
    "pre_fork": _pre_fork,
    "child_exit": _child_exit,
    "worker_exit": _worker_exit,
    "on_exit": _on_exit,
}


def _add_hooks(cfg: Config) -> None:
    """Put ours beside whatever the user's configuration has; ours come first."""
    for name, ours in _HOOKS.items():
        theirs = cfg.settings[name].get()
        if theirs is not ours:
            cfg.settings[name].value = _both(ours, theirs)
    _quiet_control_socket(cfg)


def _both(ours: Callable[..., None], theirs: Callable[..., None]) -> Callable[..., None]:
    def hook(*arguments: Any) -> None:
        ours(*arguments)
        theirs(*arguments)

    return hook


def _quiet_control_socket(cfg: Config) -> None:
    """gunicorn's control socket is not opened, unless the user named one."""
    path = cfg.settings.get("control_socket")
    if path is not None and path.get() == path.default:
        cfg.set("control_socket_disable", True)


def _wrap(arbiter: Arbiter, ours: Master) -> None:
    """Have three of the arbiter's methods do our part, too."""
    stop, setup, handle_usr1 = arbiter.stop, arbiter.setup, arbiter.handle_usr1

    def wrapped_stop(graceful: bool = True) -> None:
        ours.stop(graceful)
        stop(graceful)

    def wrapped_setup(app: Any) -> None:
        _before_reload(arbiter, app.cfg)
        setup(app)
        _after_reload(arbiter, ours)

    def wrapped_usr1() -> None:
        handle_usr1()
        ours.reopen_logs()

    vars(arbiter).update(stop=wrapped_stop, setup=wrapped_setup, handle_usr1=wrapped_usr1)


def _before_reload(arbiter: Arbiter, cfg: Config) -> None:
    """Undo what a reload cannot change, and add our hooks to the new configuration."""
    for name in ("bind", "worker_class"):
        before = arbiter.cfg.settings[name].get()
        if cfg.settings[name].get() != before:
            arbiter.log.error("%s has changed, which needs a restart; it stays %s", name, before)
            cfg.settings[name].value = before
    _add_hooks(cfg)


def _after_reload(arbiter: Arbiter, ours: Master) -> None:
    assert _loaded is not None
    _forget_modules(arbiter.cfg)
    problems = _refusals(arbiter.cfg, _loaded)
    if problems:
        arbiter.log.error("Not possible with a replica, and left alone: %s", "; ".join(problems))
    _tell_overrides(arbiter.cfg, arbiter.log)
    ours.adopt(_loaded.settings)
    arbiter.log.info("%s", _describe(arbiter, _loaded))


def _forget_modules(cfg: Config) -> None:
    """Have a reload read the settings anew also where the configuration is a module.

    gunicorn imports it again, which would find it imported already.
    """
    configuration = cfg.config or ""
    if configuration.startswith("python:"):
        sys.modules.pop(configuration.removeprefix("python:"), None)
    sys.modules.pop("replica_plugin.conf", None)


# What is said and refused before anything listens.


def _before_listening(cfg: Config, log: Any) -> None:
    """Refuse what cannot hold; say what the command line or the user's file overrode."""
    global _log
    loaded = _loaded or _load()
    _log = log
    _forget_modules(cfg)
    if _is_ours(cfg):
        problems = _refusals(cfg, loaded)
        if problems:
            raise BootError("\n".join(problems))
    _quiet_control_socket(cfg)
    _tell_overrides(cfg, log)


def _is_ours(cfg: Config) -> bool:
    """Whether the worker class is ours, or made from ours."""
    made_from = cfg.worker_class.__mro__
    return any(f"{each.__module__}.{each.__qualname__}" == WORKER for each in made_from)


def _refusals(cfg: Config, loaded: Loaded) -> list[str]:
    """Settings of gunicorn that cannot hold with a dispatcher: the reason and the way out."""
    found = []
    if cfg.reuse_port:
        found.append(
            "reuse_port: one dispatcher accepts for all workers, so a socket for each of them "
            "would not be served. Leave --reuse-port out."
        )
    if cfg.is_ssl:
        found.append(
            "certfile, keyfile: the dispatcher hands over plain sockets and cannot do TLS yet. "
            "Leave them out and let a proxy in front (nginx, a load balancer) do TLS."
        )
    if _wants_http2(cfg):
        found.append(
            "http_protocols, http2_cleartext: HTTP/2 carries many requests on one connection, "
            "which cannot be handed to one slot. Leave h2 out; a proxy in front can speak it."
        )
    if getattr(cfg, "protocol", "http") != "http":
        found.append(
            f"protocol: the dispatcher looks at HTTP requests only (got {cfg.protocol}). "
            "Leave --protocol out and have the proxy speak HTTP."
        )
    if cfg.workers * cfg.threads > loaded.settings.max_replica_concurrency:
        found.append(_over_bound(cfg, loaded))
    return found


def _wants_http2(cfg: Config) -> bool:
    return "h2" in getattr(cfg, "http_protocols", ()) or getattr(
        cfg, "http2_cleartext", "off"
    ) not in ("off", False, None)


def _over_bound(cfg: Config, loaded: Loaded) -> str:
    bound = loaded.settings.max_replica_concurrency
    return (
        f"max_replica_concurrency ({bound}) is less than workers x threads "
        f"({cfg.workers} x {cfg.threads} = {cfg.workers * cfg.threads}). "
        "Raise it, or lower workers or threads."
    )


def _tell_overrides(cfg: Config, log: Any) -> None:
    """Log once what won over the settings of ours."""
    global _told
    assert _loaded is not None
    lines = tuple(_overrides(cfg, _loaded))
    if lines != _told:
        for line in lines:
            log.warning("%s", line)
    _told = lines


def _overrides(cfg: Config, loaded: Loaded) -> list[str]:
    if not _is_ours(cfg):
        return [_without_dispatcher(cfg)]
    pairs = (
        ("processes_per_replica", "workers", cfg.workers),
        ("threads_per_process", "threads", cfg.threads),
    )
    return [
        f"Conflict: gunicorn's {theirs} ({value}) wins over {ours}: "
        f"{getattr(loaded.settings, ours)} ({loaded.sources[ours]})"
        for ours, theirs, value in pairs
        if getattr(loaded.settings, ours) != value
    ]


def _without_dispatcher(cfg: Config) -> str:
    why = "this worker class was asked for"
    if not supported():
        why = "this system lacks epoll, pidfd or the passing of descriptors"
    return (
        f"No dispatcher: worker class {cfg.worker_class_str} ({why}). Each process keeps a queue "
        f"of its own, with {cfg.threads} threads; that all slots are used before a request waits "
        "(P1), the order of requests (P3) and their bound (P4) are not promised."
    )


def _describe(arbiter: Arbiter, loaded: Loaded) -> str:
    p, t = arbiter.num_workers, arbiter.cfg.threads
    bound = loaded.settings.max_replica_concurrency
    mode = loaded.settings.mode
    return (
        f"Replica: {p} processes x {t} threads = {p * t} requests at a time ({mode} mode), "
        f"up to {max(0, bound - p * t)} waiting (max_replica_concurrency {bound}), "
        f"from {loaded.file or 'defaults'}"
    )
