"""The cap for any WSGI app, wherever it is served.

    application = ReplicaMiddleware(application)

Under our workers every request passes: the dispatcher keeps the cap, and there is no second
queue. Under any other server a gate (gate.py) keeps `threads_per_process` per process, with
the bound and the wait limit per process, too. All apps of a process share the gate, and a
request that passes through several of them takes one slot.

To test an app without its cap, call the app inside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from . import stats
from .cap import Cap, of_process
from .config.settings import Settings
from .environ import WAITED
from .gate import TurnedAwayError
from .permit import Files, Permitted

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class ReplicaMiddleware:
    """A WSGI app around another one, with at most `threads_per_process` requests in it.

    The settings are those of `replica.yaml` and the environment, read once a process. A
    mistake in them raises ConfigError here, when the app is made: a server should not come
    up with it, and no request should have to find it. Under our workers nothing is read:
    gunicorn's master has done so. With `settings` of its own a middleware has a cap of its own,
    but for one inside another, or in a process of ours: there the outer cap holds alone.

    For how many seconds a request waited is in its environment: `replica_plugin.waited`.
    """

    def __init__(self, app: App, settings: Settings | None = None) -> None:
        self.app = app
        self._cap: Cap | None = None
        if settings is not None:
            self._cap = Cap(settings, "the app")
        elif not stats.shared():
            self._cap = of_process()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Serve a request when there is a slot for it."""
        if self._cap is None or WAITED in environ or stats.shared():
            return self.app(environ, start_response)
        self._cap.tell()
        came = time.monotonic()
        try:
            self._cap.gate.enter()
        except TurnedAwayError as turned:
            return self._cap.refuse(turned, environ, start_response)
        environ[WAITED] = time.monotonic() - came
        return self._call(self._cap, environ, start_response)

    def stats(self) -> stats.Stats:
        """The numbers of the whole replica; without a dispatcher, those of this process."""
        return stats.of_replica() or stats.of_gate((self._cap or of_process()).gate)

    def _call(self, cap: Cap, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Call the app with a slot, which goes back with what it returns or raises."""
        try:
            with Files(environ) as files:
                body = self.app(environ, start_response)
        except BaseException:
            cap.gate.leave()
            raise
        if files.sends(body):
            cap.gate.leave()
            return body
        return Permitted(body, cap.gate)
