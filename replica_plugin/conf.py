"""The settings of the replica, as a configuration of gunicorn.

    gunicorn -c python:replica_plugin.conf app:app

or, in a configuration file of your own, wherever the line stands and whichever hooks the
file has:

    from replica_plugin.conf import *
"""

from .hook import gunicorn_settings

_settings = gunicorn_settings()

workers: int = _settings["workers"]
threads: int = _settings["threads"]
worker_class: str = _settings["worker_class"]
nworkers_changed = _settings["nworkers_changed"]

__all__ = ["nworkers_changed", "threads", "worker_class", "workers"]

if "preload_app" in _settings:  # else a file's own stays as it is
    preload_app: bool = _settings["preload_app"]
    __all__ += ["preload_app"]
