"""The Flask extension: the cap under every server, and the replica in numbers.

    replica = Replica(app)            # or Replica() and init_app, for an app factory

Under our workers the dispatcher keeps the cap and this adds nothing to it. Everywhere else
(flask run, waitress, uWSGI, mod_wsgi, gunicorn's own workers) a semaphore keeps
`threads_per_process` per process, for all its apps together (middleware.py).

`REPLICA_ENABLED` in the app's config, which may change at any time, switches that:

    not set   on, but not while `TESTING` is set, nor for requests of `app.test_client()`
    False     off
    True      on, for tests of the cap itself

No state of an app is kept here: one object may serve many apps.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from . import stats
from .environ import WAITED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flask import Flask

    from .middleware import ReplicaMiddleware
    from .stats import Stats

ENABLED = "REPLICA_ENABLED"


class Replica:
    """Declares that a Flask app is served as a replica."""

    def __init__(self, app: Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} extension>"

    def init_app(self, app: Flask) -> None:
        """Register with an app, before it serves. A second time changes nothing.

        Unless a dispatcher is at work, `replica.yaml` is read here, so that a mistake in it
        (ConfigError, which names all of them) ends the start of a server instead of failing
        each of its requests.
        """
        if "replica" in app.extensions:
            return
        from .middleware import ReplicaMiddleware

        middleware = ReplicaMiddleware(app.wsgi_app)
        app.extensions["replica"] = middleware
        app.wsgi_app = _Switch(app, middleware)  # type: ignore[method-assign]

    def stats(self) -> Stats:
        """The numbers of the whole replica, in any of its processes and threads; cheap.

        Without a dispatcher they are those of this process (`whole` is False).
        """
        whole = stats.of_replica()
        if whole is not None:
            return whole
        from .cap import of_process

        return stats.of_gate(of_process().gate)

    @property
    def waited(self) -> float:
        """For how many seconds the current request waited for its slot."""
        from flask import request

        return float(request.environ.get(WAITED, 0.0))


class _Switch:
    """The app's `wsgi_app`: with the cap, or without it where that would be in the way."""

    def __init__(self, app: Flask, middleware: ReplicaMiddleware) -> None:
        self._app = app
        self._middleware = middleware

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        enabled = self._app.config.get(ENABLED)
        if enabled is None:
            enabled = not (self._app.testing or _is_test_client(environ))
        chosen = self._middleware if enabled else self._middleware.app
        return chosen(environ, start_response)


def _is_test_client(environ: dict[str, Any]) -> bool:
    """Whether the request comes from `app.test_client()`, or another client of werkzeug's.

    A test may hold a response open and ask for the next one in the same thread, which would
    wait for itself. A client leaves its Request in the environment; but so may a middleware
    under a server, which must not lose the cap for it. So one that has a Request is asked
    for its callers, too: werkzeug's function is among them for a client only.
    """
    if "werkzeug.request" not in environ:
        return False
    from werkzeug.test import run_wsgi_app

    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is run_wsgi_app.__code__:
            return True
    return False
