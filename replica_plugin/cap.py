"""The cap of a process without a dispatcher: its settings, and the gate made from them.

There is one for each process, whichever apps are served in it, since that is what
`threads_per_process` says.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from .answers import refusal
from .config.load import load
from .config.settings import Settings
from .decisions import Rules
from .gate import Gate, TurnedAwayError

log = logging.getLogger(__name__)

_making = threading.Lock()
_cap: Cap | None = None  # set once, under _making


class Cap:
    """A gate, with what has to be said about it. `source` is where the settings are from."""

    def __init__(self, settings: Settings, source: str) -> None:
        self.settings = settings
        self.gate = Gate(
            settings.threads_per_process, settings.max_replica_concurrency, settings.queue_timeout
        )
        self._source = source
        self._told = threading.Lock()  # taken once, by whoever tells

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.gate} from {self._source}>"

    def tell(self) -> None:
        """Say in the log, once, that the cap is at work, and what it cannot do."""
        if self._told.acquire(blocking=False):
            log.warning(
                "No dispatcher under this server: a semaphore keeps threads_per_process (%d, from "
                "%s) in each process, with max_replica_concurrency and queue_timeout for each "
                "process, too. What is not promised: that all slots of the replica are in use "
                "before a request waits, one queue and one bound for all processes, probes, and "
                "that slow clients hold no slot.",
                self.gate.slots,
                self._source,
            )

    def refuse(
        self, turned: TurnedAwayError, environ: dict[str, Any], start_response: Any
    ) -> Iterable[bytes]:
        """The answer for a request that does not get in."""
        gate = self.gate
        rules = Rules(1, gate.slots, gate.bound, gate.timeout)
        answer = refusal(turned.why, rules, self.settings.overload_status, gate.retry_after())
        return answer.as_wsgi(environ, start_response)


def of_process() -> Cap:
    """This process's cap. The first call reads the settings; errors in them raise ConfigError."""
    global _cap
    with _making:
        if _cap is None:
            loaded = load()
            _cap = Cap(loaded.settings, loaded.file or "defaults")
        return _cap
