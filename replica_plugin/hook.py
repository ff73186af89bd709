"""How we get into gunicorn: settings for its configuration, and hooks beside the user's own.

What is taken into a configuration file is little: workers, threads, the worker class, and
`nworkers_changed`, the first hook that sees the final settings, before anything listens.
All else is added to the finished configuration when gunicorn asks our worker class to
check it (`check_config`), right before `when_ready`; so it does not matter which hooks the
user's file defines, above our line or below.

    configuration read -> nworkers_changed -> listeners -> check_config -> when_ready -> fork
    reload: configuration read -> setup (wrapped: `_wrap`) -> on_reload -> fork

gunicorn's `reload` (since 27) waits at its end for the old processes, up to graceful_timeout,
and sees no signal meanwhile. Ours leave later than that, when their successors are ready; so
within `reload` graceful_timeout is 0, but for the processes that it forks.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from gunicorn.config import Config
from gunicorn.errors import HaltServer

from . import boot, ready_file, stats
from .config.load import Loaded, check_kept, load
from .config.settings import Settings
from .errors import BootError, ConfigError, Place, Problem

if TYPE_CHECKING:  # the master's part cannot be imported everywhere: see boot.supported
    from .master import Arbiter, Master

QUICK = 2
"""Seconds a process has to heed QUIT or INT, until it is killed; as in gunicorn during a TERM."""

ENDINGS = (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT)

HELD = (*ENDINGS, signal.SIGUSR1)
"""Signals that wait while a new process has no handlers of its own for them."""

_loaded: Loaded | None = None
_log: Any = None  # gunicorn's, once it has read its configuration
_master: Master | None = None
_told: tuple[str, ...] = ()
_fresh = False  # `_loaded` has been read in this start, or reload
_taken_by: set[str] = set()  # modules with our line, in one of which another may have it


def gunicorn_settings() -> dict[str, Any]:
    """What a configuration file of gunicorn takes over from `replica.yaml`.

    A mistake in it ends gunicorn with a message. In a reload it is logged instead, and
    what held before goes on to hold.
    """
    settings = _load().settings
    preload = {"preload_app": True} if settings.preload else {}
    return {
        **preload,
        "workers": settings.processes_per_replica,
        "threads": settings.threads_per_process,
        "worker_class": boot.worker_class(settings.mode),
        "nworkers_changed": _beside_one_above(),
    }


def _beside_one_above() -> Callable[..., None]:
    """Ours, and the one that the user has defined above our line, or what leads to it, which ours
    replaces."""
    files = list(_files_above())
    _taken_by.update(each.get("__name__", "") for each in files)
    name = "nworkers_changed"
    theirs = next((each[name] for each in files if name in each), None)
    if theirs is None:
        return nworkers_changed

    def both(arbiter: Arbiter, new: int, old: int | None) -> None:  # gunicorn counts arguments
        nworkers_changed(arbiter, new, old)
        theirs(arbiter, new, old)

    return both


def _files_above() -> Iterator[dict[str, Any]]:
    """The globals of the user's files that are being read, from the one with our line on.

    What a file calls to import another, such as a tracer's import hook, is none of them. What it
    executes is, and may have no name.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package == "gunicorn":
            return
        if package != __package__ and frame.f_code.co_name == "<module>":
            yield frame.f_globals
        frame = frame.f_back


def _load() -> Loaded:
    global _loaded, _fresh
    _fresh = True
    try:
        loaded = _complete(load())
        if _loaded is not None:
            check_kept(loaded, _loaded)
        _loaded = loaded
    except ConfigError as error:
        if _log is None:
            raise SystemExit(f"\n{error}\n") from None
        _log.error("%s\nThe settings from before go on to hold.", error)
    assert _loaded is not None
    return _loaded


def _complete(loaded: Loaded) -> Loaded:
    """Settings for which all that they need is installed. Raises ConfigError."""
    missing = boot.missing(loaded.settings.mode)
    if missing:
        raise ConfigError([Problem(Place(loaded.sources["mode"], "mode"), missing)])
    return loaded


def master() -> Master | None:
    """The master's part, in the master and in what it forks; None if there is none."""
    return _master


# Hooks of gunicorn's. Each is called beside the user's own.


def nworkers_changed(arbiter: Arbiter, new: int, old: int | None) -> None:
    """The number of workers is set: at the start, in a reload, with TTIN and TTOU."""
    global _log
    if old is None:
        _before_listening(arbiter.cfg, arbiter.log)
        return
    if _master is not None:
        _master.want()
    else:
        _log = arbiter.log  # of a gunicorn that a reload has brought us
        _forget_alone(arbiter.cfg)
        if boot.is_ours(arbiter.cfg):
            _stay_without(arbiter)


def _stay_without(arbiter: Arbiter) -> None:
    """A reload has brought us, of whom gunicorn asks nothing any more before it forks (see above);
    without a dispatcher workers of ours would end, and gunicorn with them."""
    stays = boot.FALLBACKS[boot.mode(arbiter.cfg)]
    arbiter.log.error("A replica needs a restart of gunicorn; until then its own %s serves", stays)
    arbiter.cfg.set("worker_class", stays)
    arbiter.worker_class = arbiter.cfg.worker_class


def check_config(cfg: Config, log: Any) -> None:
    """gunicorn has read its configuration, listens, and is about to call `when_ready`."""
    _before_listening(cfg, log)
    assert _loaded is not None
    _forget_ready_file(_loaded.settings)
    _add_hooks(cfg)


def _when_ready(arbiter: Arbiter) -> None:
    from .master import Master

    global _master

    assert _loaded is not None
    if arbiter.cfg.preload_app:
        gc.collect()
        gc.freeze()  # else the collector would write to, and so copy, what processes share
    _master = Master(arbiter, _loaded.settings)
    stats.share(_master.replica_page)
    _wrap(arbiter, _master)
    arbiter.log.info("%s", boot.describe(arbiter.num_workers, arbiter.cfg, _loaded))


def _on_reload(arbiter: Arbiter) -> None:
    arbiter.cfg.set("graceful_timeout", 0)


def _post_fork(arbiter: Arbiter, worker: Any) -> None:
    if _master is not None:
        _master.restore_timeout()
        worker.hear_early()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def _pre_fork(arbiter: Arbiter, worker: Any) -> None:
    """A new process has the master's handlers, which would lose a signal: until `_post_fork` it
    waits. Nothing that a user's hook starts is to be born like that: so this comes last."""
    if _master is not None:
        _master.tell(worker.age)
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def _child_exit(arbiter: Arbiter, worker: Any) -> None:
    if _master is not None:
        _master.after_end(worker.age, worker.pid)


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
    "on_reload": _on_reload,
    "pre_fork": _pre_fork,
    "post_fork": _post_fork,
    "child_exit": _child_exit,
    "worker_exit": _worker_exit,
    "on_exit": _on_exit,
}


def _add_hooks(cfg: Config) -> None:
    """Put ours beside whatever the user's configuration has; ours come first, but for pre_fork."""
    for name, ours in _HOOKS.items():
        theirs = cfg.settings[name].get()
        if theirs is not ours:
            pair = (theirs, ours) if name == "pre_fork" else (ours, theirs)
            cfg.settings[name].value = _both(*pair)
    _quiet_control_socket(cfg)


def _both(first: Callable[..., None], second: Callable[..., None]) -> Callable[..., None]:
    def hook(*arguments: Any) -> None:
        first(*arguments)
        second(*arguments)

    return hook


def _quiet_control_socket(cfg: Config) -> None:
    """gunicorn's control socket is not opened, unless the user named one."""
    path = cfg.settings.get("control_socket")
    if path is not None and path.get() == path.default:
        cfg.set("control_socket_disable", True)


def _wrap(arbiter: Arbiter, ours: Master) -> None:
    """Have some of the arbiter's methods do our part, too."""
    stop, setup, handle_usr1 = arbiter.stop, arbiter.setup, arbiter.handle_usr1
    reload, reexec, kill_workers = arbiter.reload, arbiter.reexec, arbiter.kill_workers

    def wrapped_stop(graceful: bool = True) -> None:
        graceful = graceful and ours.drain()
        ours.stop(graceful)
        if not graceful:
            arbiter.cfg.set("graceful_timeout", min(QUICK, arbiter.cfg.graceful_timeout))
        stop(graceful)

    def wrapped_kill_workers(number: int) -> None:
        if number == signal.SIGQUIT:
            ours.stop(False)
        kill_workers(number)

    def wrapped_reexec() -> None:
        _reexec(arbiter, reexec)
        ours.tell()

    def wrapped_setup(app: Any) -> None:
        _before_reload(arbiter, app.cfg, ours.settings)
        setup(app)
        _after_reload(arbiter, ours)

    def wrapped_reload() -> None:
        _forget(*_taken_by)
        ours.reload(reload)

    def wrapped_usr1() -> None:
        handle_usr1()
        ours.reopen_logs()

    vars(arbiter).update(
        stop=wrapped_stop,
        kill_workers=wrapped_kill_workers,
        setup=wrapped_setup,
        reload=wrapped_reload,
        reexec=wrapped_reexec,
        spawn_worker=partial(_spawn, arbiter.spawn_worker, arbiter, ours),
        manage_workers=partial(ours.manage, arbiter.manage_workers),
        reap_workers=partial(_reap, arbiter.reap_workers, arbiter, ours),
        handle_usr1=wrapped_usr1,
    )


def _spawn(spawn_worker: Callable[[], Any], arbiter: Arbiter, ours: Master) -> Any:
    """In the master signals are blocked for no longer than the fork takes; and a process that
    cannot be forked, or fails before it loads the app, is no reason to end those that serve."""
    try:
        return spawn_worker()
    except BaseException as error:
        if os.getpid() != arbiter.pid:  # or the process would go on as a copy of the master
            ours.see_to_end(error)
        if not isinstance(error, Exception) or not ours.replica_page.read().was_ready:
            raise
        ours.not_forked(error)  # for want of memory, processes, descriptors, or in a hook
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def _reap(reap_workers: Callable[[], None], arbiter: Arbiter, ours: Master) -> None:
    """The first process that cannot boot has gunicorn stop; another would break that off."""
    while True:
        try:
            return reap_workers()
        except HaltServer:
            if not ours.stopping:
                raise
            for pid in list(arbiter.WORKERS):  # where gunicorn before 27 keeps this one
                arbiter.kill_worker(pid, 0)


def _reexec(arbiter: Arbiter, reexec: Callable[[], None]) -> None:
    """Have gunicorn start another master. What it forks for that and cannot exec ends here: as
    the copy of this master that it is, it would stop what is ours. Nor do we end if it cannot be
    forked, for want of memory or processes."""
    try:
        reexec()
    except BaseException as error:
        if os.getpid() != arbiter.pid:
            arbiter.log.exception("The new master cannot be started")
            os._exit(1)
        if not isinstance(error, OSError):
            raise
        arbiter.log.error(
            "The new master cannot be started: %r. This one serves on: send USR2 again", error
        )


def _before_reload(arbiter: Arbiter, cfg: Config, settings: Settings) -> None:
    """Undo what a reload cannot change, and what cannot hold; `settings` are ours from before. Add
    our hooks to the new configuration."""
    if not _fresh:  # our worker class came without our line
        _load()
    fixed = ["bind", "preload_app"]
    if not (boot.is_ours(arbiter.cfg) and boot.is_ours(cfg)):
        fixed.append("worker_class")
    for name in fixed:
        before = arbiter.cfg.settings[name].get()
        if cfg.settings[name].get() != before:
            arbiter.log.error("%s has changed, which needs a restart; it stays %s", name, before)
            cfg.settings[name].value = before
    _leave_alone(arbiter, cfg, settings)
    _add_hooks(cfg)


def _leave_alone(arbiter: Arbiter, cfg: Config, settings: Settings) -> None:
    """Put what is refused back to what it was; and what does not go with that, in its turn."""
    global _loaded
    assert _loaded is not None
    told: list[str] = []
    while found := [each for each in boot.refusals(cfg, _loaded) if each.told not in told]:
        for name in {name for refusal in found for name in refusal.settings}:
            if name in cfg.settings:
                cfg.settings[name].value = arbiter.cfg.settings[name].get()
            elif hasattr(settings, name):
                ours = replace(_loaded.settings, **{name: getattr(settings, name)})
                _loaded = replace(_loaded, settings=ours)
        told += [refusal.told for refusal in found]
    if told:
        arbiter.log.error("Not possible with a replica, and left alone: %s", "; ".join(told))


def _after_reload(arbiter: Arbiter, ours: Master) -> None:
    assert _loaded is not None
    _tell_overrides(arbiter.cfg, arbiter.log)
    if arbiter.cfg.preload_app:
        arbiter.log.warning(
            "preload: the new processes have the app as the master loaded it at the start; for "
            "changed code restart gunicorn, or use USR2"
        )
    ours.adopt(_loaded.settings)
    arbiter.log.info("%s", boot.describe(arbiter.num_workers, arbiter.cfg, _loaded))


def _forget(*names: str) -> None:
    """Have a reload read the settings anew: an import would find what was imported already.

    Not sooner than right before it: the app may import such a module, too. What a package holds
    goes with it, for whoever imports that again does not give it to the new package.
    """
    global _fresh
    _fresh = False
    taken = {"replica_plugin.conf", *names} - {"__main__"}
    within = tuple(f"{name}." for name in taken)
    for name in [each for each in sys.modules if each in taken or each.startswith(within)]:
        module = sys.modules.pop(name)
        package, _, last = name.rpartition(".")
        around = vars(sys.modules[package]) if package in sys.modules else {}
        if module is not None and around.get(last) is module:  # for `from package import module`
            del around[last]


def _forget_alone(cfg: Config) -> None:
    """Without a master of ours nobody tells of a reload before it begins."""
    _forget((cfg.config or "").removeprefix("python:"))


# What is said and refused before anything listens.


def _before_listening(cfg: Config, log: Any) -> None:
    """Refuse what cannot hold; say what the command line or the user's file overrode."""
    global _log
    loaded = _loaded or _load()
    _log = log
    if not boot.is_ours(cfg):
        _forget_alone(cfg)
    problems = boot.refusals(cfg, loaded)
    if problems:
        raise BootError("\n".join(each.told for each in problems))
    if boot.is_ours(cfg) and cfg.preload_app:  # which takes its time, before anything listens
        _forget_ready_file(loaded.settings)
    _quiet_control_socket(cfg)
    _tell_overrides(cfg, log)


def _forget_ready_file(settings: Settings) -> None:
    """What an earlier replica left. Not sooner than need be: if we cannot listen, one is there."""
    if "GUNICORN_PID" not in os.environ:  # of a master whose replica is ready
        ready_file.forget(settings.ready_file)


def _tell_overrides(cfg: Config, log: Any) -> None:
    """Log once what won over the settings of ours, and what the machine does not allow."""
    global _told
    assert _loaded is not None
    lines = (*boot.overrides(cfg, _loaded), *boot.shortages(cfg, _loaded))
    if lines != _told:
        for line in lines:
            log.warning("%s", line)
    _told = lines
