"""The cap for any WSGI app, wherever it is served.

Under our workers a request comes with the time it has waited, and passes: the dispatcher
keeps the cap, and there is no second queue. Under any other server a gate (gate.py) keeps
`threads_per_process` per process, with the bound and the wait limit per process, too.

A permit is given back when the response's body is closed, as PEP 3333 has every server do;
or when the body is garbage, for a caller that does not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .answers import refusal
from .config.load import load
from .config.settings import Settings
from .decisions import Rules
from .environ import WAITED
from .gate import Gate, TurnedAwayError

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

log = logging.getLogger(__name__)


class ReplicaMiddleware:
    """A WSGI app around another one, with at most `threads_per_process` requests in it.

    `settings` default to those of `replica.yaml` and the environment, which are read with
    the first request that no dispatcher has let in; errors in them raise ConfigError.
    """

    def __init__(self, app: App, settings: Settings | None = None) -> None:
        self.app = app
        self.settings = settings
        self._gate: Gate | None = None
        self._making = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Serve a request when there is a slot for it."""
        if WAITED in environ:
            return self.app(environ, start_response)
        gate = self._gate or self._make_gate()
        came = time.monotonic()
        try:
            gate.enter()
        except TurnedAwayError as turned:
            return self._refuse(gate, turned, environ, start_response)
        environ[WAITED] = time.monotonic() - came
        try:
            return Permitted(self.app(environ, start_response), gate)
        except BaseException:
            gate.leave()
            raise

    @property
    def gate(self) -> Gate | None:
        """This process's semaphore; None while only a dispatcher's requests have come."""
        return self._gate

    def _make_gate(self) -> Gate:
        """Once a process, which the log says."""
        with self._making:
            if self._gate is None:
                settings = self.settings = self.settings or load().settings
                self._gate = Gate(
                    settings.threads_per_process,
                    settings.max_replica_concurrency,
                    settings.queue_timeout,
                )
                log.warning(
                    "No dispatcher under this server: a semaphore keeps threads_per_process (%d) "
                    "in each process; that all slots of the replica are used before a request "
                    "waits (P1), one queue (P3) and one bound (P4) for it are not promised.",
                    settings.threads_per_process,
                )
            return self._gate

    def _refuse(
        self, gate: Gate, turned: TurnedAwayError, environ: dict[str, Any], start_response: Any
    ) -> Iterable[bytes]:
        assert self.settings is not None
        rules = Rules(1, gate.slots, gate.bound, gate.timeout)
        status = self.settings.overload_status
        answer = refusal(turned.why, rules, status, gate.retry_after())
        return answer.as_wsgi(environ, start_response)


class Permitted:
    """A response body with a permit, which goes back exactly once."""

    def __init__(self, body: Iterable[bytes], gate: Gate) -> None:
        self._body = body
        self._permit = threading.Lock()  # taken once, by whoever gives the permit back
        self._gate = gate

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        """Close the app's body, then give the permit back."""
        if not self._permit.acquire(blocking=False):
            return
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._gate.leave()

    def __del__(self) -> None:
        self.close()
