"""What the dispatcher has to know, as plain values that travel from the master as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .decisions import Rules
from .head import Limits

DEFAULT_LIMITS = Limits()
_PATHS = ("probes", "exempt")


@dataclass(frozen=True)
class Serving:
    """How clients are treated. Times in seconds, sizes in bytes, exact paths as bytes."""

    limits: Limits = DEFAULT_LIMITS
    header_timeout: float = 10.0
    receive_timeout: float = 30.0
    send_timeout: float = 30.0
    keepalive: float = 2.0
    request_buffer: int = 1 << 20
    overload_status: int = 503
    probes: tuple[bytes, ...] = ()
    exempt: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Stop:
    """A stop that has begun; `deadline` is the monotonic time at which it must have ended."""

    graceful: bool
    deadline: float


@dataclass(frozen=True)
class Privileges:
    """Whom the helpers run as; gunicorn's own settings."""

    uid: int
    gid: int
    initgroups: bool


@dataclass(frozen=True)
class Wishes:
    """Everything the master's page says.

    `live` are the ages of the processes that the master has forked, `first` is the one of the first
    since the last reload, which may have yet to come, or be dead; none of them can have more slots
    than `most_threads`, before a reload or behind it. `supervisor` is the pid of the one it has
    started last. `reopen` counts the requests to reopen the logs. `logging` are gunicorn's own
    settings of that name. `shared` says that others hold our listening sockets, or will; `beside`
    that one of them is another master, after USR2, and `served` that its replica is ready;
    `draining` that a stop is about to begin, and nothing new should be sent to us.
    """

    rules: Rules
    serving: Serving
    live: tuple[int, ...]
    first: int
    most_threads: int
    graceful_timeout: float
    privileges: Privileges
    logging: dict[str, Any]
    supervisor: int = 0
    ready_file: str | None = None
    shared: bool = False
    beside: bool = False
    served: bool = False
    draining: bool = False
    stop: Stop | None = None
    reopen: int = 0

    def encode(self) -> dict[str, Any]:
        """As JSON can hold it."""
        state = asdict(self)
        for name in _PATHS:
            state["serving"][name] = [path.decode("latin-1") for path in state["serving"][name]]
        return state


def decode_wishes(state: dict[str, Any]) -> Wishes:
    serving, stop = state["serving"], state["stop"]
    paths = {name: tuple(p.encode("latin-1") for p in serving[name]) for name in _PATHS}
    parts = {
        "rules": Rules(**state["rules"]),
        "serving": Serving(**{**serving, **paths, "limits": Limits(*serving["limits"])}),
        "live": tuple(state["live"]),
        "privileges": Privileges(**state["privileges"]),
        "stop": Stop(**stop) if stop else None,
    }
    return Wishes(**{**state, **parts})
