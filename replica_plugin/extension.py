"""The Flask extension: the cap under every server, and the replica in numbers.

    replica = Replica(app)            # or Replica() and init_app, for an app factory

Under our workers the dispatcher keeps the cap and this adds nothing to it. Everywhere else
(flask run, waitress, uWSGI, mod_wsgi, gunicorn's own workers) a semaphore keeps
`threads_per_process` per process; but not in an app with `TESTING` set, unless
`REPLICA_ENABLED` says so.

No state of an app is kept here: one object may serve many apps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import stats
from .environ import WAITED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flask import Flask

    from .middleware import ReplicaMiddleware
    from .stats import Stats

ENABLED = "REPLICA_ENABLED"
"""Flask's config: False switches the extension off, True keeps it on while testing."""


class Replica:
    """Declares that a Flask app is served as a replica."""

    def __init__(self, app: Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} extension>"

    def init_app(self, app: Flask) -> None:
        """Register with an app, before it serves. A second time changes nothing."""
        if "replica" in app.extensions:
            return
        from .middleware import ReplicaMiddleware

        middleware = ReplicaMiddleware(app.wsgi_app)
        app.extensions["replica"] = middleware
        app.wsgi_app = _Switch(app, middleware)  # type: ignore[method-assign]

    def stats(self) -> Stats:
        """The numbers of the whole replica, in any of its processes; cheap.

        Without a dispatcher they are those of this process and of the current app (the only
        one there is, outside of a request).
        """
        return stats.read(None if stats.shared() else _middleware().gate)

    @property
    def waited(self) -> float:
        """For how many seconds the current request waited for its slot."""
        from flask import request

        return float(request.environ.get(WAITED, 0.0))


def _middleware() -> ReplicaMiddleware:
    from flask import current_app

    middleware: ReplicaMiddleware = current_app.extensions["replica"]
    return middleware


class _Switch:
    """The app's `wsgi_app`: with the cap, or without it where that would be in the way."""

    def __init__(self, app: Flask, middleware: ReplicaMiddleware) -> None:
        self._app = app
        self._middleware = middleware

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        enabled = self._app.config.get(ENABLED)
        if enabled is None:
            enabled = not self._app.testing
        chosen = self._middleware if enabled else self._middleware.app
        return chosen(environ, start_response)
