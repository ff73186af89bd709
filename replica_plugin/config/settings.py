"""The settings of a replica: one field a key, with its kind, its default and its meaning.

Everything else about the keys is made of these fields: the checks, what `init` writes and the
reference table. Nothing is read here; see load.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from .quantities import Duration, Size
from .values import (
    Boolean,
    Choice,
    FilePath,
    Integer,
    Kind,
    Later,
    Number,
    Paths,
    Prefix,
    Text,
)

_ADDRESS = r"unix:.+|(\[[0-9A-Fa-f:.]+\]|[^\s:/]*):[0-9]{1,5}"


def _key(kind: Kind, default: Any, doc: str, *, supported: bool = True, **more: str) -> Any:
    """`none` says what None stands for, `example` is a value to show in place of None."""
    metadata = {"kind": kind, "doc": doc, "supported": supported, "none": "none", **more}
    return field(default=default, metadata=metadata)


def _later(kind: Kind, default: Any, doc: str) -> Any:
    return _key(kind, default, doc, supported=False)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Durations in seconds, sizes in bytes; None where the reference table says none."""

    processes_per_replica: int = _key(
        Integer(1, 100), 1, "processes that serve the app; 1 to 3 per CPU is a good start"
    )
    threads_per_process: int = _key(
        Integer(1), 1,
        "requests at a time in one process; 1 for CPU-bound or thread-unsafe code, "
        "more for code that waits for I/O or a GPU",
    )  # fmt: skip
    mode: str = _key(
        Choice(("thread", "gevent")),
        "thread",
        "what a slot is: a thread, or a greenlet, for hundreds that wait for I/O",
    )
    max_replica_concurrency: int = _key(
        Integer(1, 30000), 1024, "requests in flight, waiting and running; one more is refused"
    )
    target_replica_concurrency: float | None = _key(
        Number(above=0), None,
        "requests in flight an autoscaler should aim at; at most max_replica_concurrency",
        none="p*t", example="4",
    )  # fmt: skip
    queue_timeout: float | None = _key(
        Duration(above=0), None, "how long a request may wait for a slot before it gets 503",
        example="10s",
    )  # fmt: skip
    request_timeout: float | None = _key(
        Duration(above=0), None,
        "how long a request may run, its response included, before it is interrupted, "
        "and answered 504 if nothing was sent yet",
        example="30s",
    )  # fmt: skip
    overload_status: int = _key(
        Choice((503, 429)), 503, "the status of a refusal above max_replica_concurrency"
    )
    overload_dry_run: bool = _key(
        Boolean(), False, "admit, but count and log what max_replica_concurrency would have refused"
    )
    request_buffer: int = _key(
        Size(least=0), 2**20, "how much of a request body is awaited before it takes a slot"
    )
    response_buffer: int = _key(
        Size(least=0), 8 * 2**20, "how much of a response is sent for a slot to a slow client"
    )
    response_buffer_total: int = _key(
        Size(least=0), 256 * 2**20, "how much of all such responses together"
    )
    header_timeout: float = _key(
        Duration(above=0), 10.0, "how long a request head may take before it gets 408"
    )
    receive_timeout: float = _key(
        Duration(above=0), 30.0, "how long a body may stand still before it gets 408"
    )
    send_timeout: float = _key(
        Duration(above=0), 30.0, "how long a client may take nothing before it is cut off"
    )
    probes: str | None = _key(
        Prefix("/-/"), "/-/", "prefix of healthz and readyz on the served port; false for none"
    )
    exempt: tuple[str, ...] = _key(
        Paths(), (), "exact paths that pass by the queue, the cap and the bound"
    )
    admin_bind: str | None = _later(
        Text(_ADDRESS, "host:port or unix:path", "address"), None,
        "a socket of its own for metrics and the status page",
    )  # fmt: skip
    ready_file: str | None = _key(
        FilePath(), None, "a file that exists while readyz says 200", example="/run/replica/ready"
    )
    drain_delay: float = _key(
        Duration(least=0), 0.0, "on TERM, how long readyz says 503 before the listeners close"
    )
    stagger_init: bool = _key(Boolean(), True, "processes load the app one after another")
    preload: bool = _key(Boolean(), False, "load the app once, before the processes are forked")

    @property
    def slots(self) -> int:
        """How many requests run at a time: p*t."""
        return self.processes_per_replica * self.threads_per_process

    @property
    def effective_target(self) -> float:
        """target_replica_concurrency, which is p*t unless it is given."""
        given = self.target_replica_concurrency
        return float(self.slots) if given is None else given

    @property
    def waiting_room(self) -> int:
        """How many requests may wait while all slots are busy."""
        return max(0, self.max_replica_concurrency - self.slots)


KEYS: Mapping[str, Field[Any]] = {field.name: field for field in fields(Settings)}


def kinds() -> dict[str, Kind]:
    """What each key takes today: a key that is not supported yet takes nothing."""
    return {
        name: key.metadata["kind"] if key.metadata["supported"] else Later(key.metadata["kind"])
        for name, key in KEYS.items()
    }


def supported() -> Iterator[Field[Any]]:
    """The keys that do something today."""
    return (key for key in KEYS.values() if key.metadata["supported"])


def show(key: str, value: Any) -> str:
    """A key's value as people write it; for None, what None stands for."""
    metadata = KEYS[key].metadata
    kind: Kind = metadata["kind"]
    if value is None and not isinstance(kind, Prefix):
        return str(metadata["none"])
    return kind.show(value)


def reference_table() -> str:
    """The keys as Markdown: those that work, and apart from them those that do not yet."""
    later = (key for key in KEYS.values() if not key.metadata["supported"])
    return f"{_table(supported())}\n\nNot yet:\n\n{_table(later)}\n"


def _table(keys: Iterator[Field[Any]]) -> str:
    head = "| key | type | default | rule | meaning |\n|---|---|---|---|---|"
    return "\n".join([head, *map(_row, keys)])


def _row(key: Field[Any]) -> str:
    kind = key.metadata["kind"]
    default = show(key.name, key.default)
    return f"| {key.name} | {kind.name} | {default} | {kind.rule} | {key.metadata['doc']} |"
