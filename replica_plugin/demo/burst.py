"""A burst of requests released together, and what their times say.

1. All times are time.monotonic(), on Linux one clock for every process of a machine; so
   begin - sent is what a request waited, network and dispatch included.
2. A request began *at once* if it began before any request of its burst ended: it cannot have
   waited for a slot. No limit in milliseconds is involved, so a slow machine does not break the
   promise; how late the last of them began is told.
3. A burst that this client, on a machine with other work, did not send together says nothing about
   the server.
4. No two requests of a burst take equally long, so one slot is clearly the first to be free,
   whichever request happens to wait.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from threading import Barrier

SHORTEST, LONGEST = 100, 260  # ms
TOGETHER = SHORTEST / 2000  # seconds from the first to the last of a burst
TIMEOUT = 30  # seconds
# A slot is free when it has answered, or slightly later: answers so close are a tie.
TIE = 0.02  # seconds
MOST_TOLD = 3  # waits, one by one

Slot = tuple[int, int]  # process id, native thread id


@dataclass(frozen=True)
class Row:
    """One request: when the client sent it and was answered, when it ran in the app, and where."""

    sent: float
    answered: float
    begin: float
    end: float
    pid: int
    thread: int
    prediction: int
    truth: int

    @property
    def slot(self) -> Slot:
        return self.pid, self.thread

    @property
    def waited(self) -> float:
        return self.begin - self.sent


def send(port: int, size: int) -> list[Row]:
    """Send `size` requests at the same moment, each on its own connection; raise if one fails."""
    barrier = Barrier(size, timeout=TIMEOUT)
    spread = (LONGEST - SHORTEST) / max(1, size - 1)

    def one(number: int) -> Row:
        body = json.dumps({"image": number, "fetch_ms": SHORTEST + number * spread})
        connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        barrier.wait()
        sent = time.monotonic()
        connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        answered = time.monotonic()
        connection.close()
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}: {answer.decode(errors='replace')}")
        return Row(sent, answered, **json.loads(answer))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def sent_together(rows: Sequence[Row]) -> bool:
    sent = [row.sent for row in rows]
    return max(sent) - min(sent) <= TOGETHER


def name_slots(rows: Sequence[Row]) -> dict[Slot, str]:
    """Number processes and their threads from 1, in the order of their ids."""
    names: dict[Slot, str] = {}
    for process, pid in enumerate(sorted({row.pid for row in rows}), 1):
        for thread, ident in enumerate(sorted({row.thread for row in rows if row.pid == pid}), 1):
            names[pid, ident] = name_slot(process, thread)
    return names


def name_slot(process: int, thread: int) -> str:
    return f"process {process}, thread {thread}"


def at_once(rows: Sequence[Row]) -> int:
    """How many of a burst began at once."""
    return len(_split(rows)[0])


def sentence(rows: Sequence[Row], names: Mapping[Slot, str]) -> str:
    """Say how many began at once, how long each other one waited, and for which slot."""
    started, late = _split(rows)
    within = f"began at once (within {_ms(max(row.waited for row in started))})"
    if not late:
        return f"{'all ' if len(rows) > 1 else ''}{len(rows)} {within}"
    return f"{len(started)} {within}, {len(late)} waited {_waits(late, names)}"


def _waits(late: Sequence[Row], names: Mapping[Slot, str]) -> str:
    if len(late) > MOST_TOLD:
        waits = [row.waited for row in late]
        return f"{_ms(min(waits))} to {_ms(max(waits))}"
    return "; ".join(f"{_ms(row.waited)} for {names[row.slot]}" for row in late)


def faults(
    rows: Sequence[Row], names: Mapping[Slot, str], processes: int, threads: int
) -> list[str]:
    """Compare a burst with what processes * threads promises; return what was broken."""
    return [
        *_late_starts(rows, processes * threads),
        *_excess(rows, processes * threads, threads),
        *_wrong_slot(rows, names),
    ]


def _late_starts(rows: Sequence[Row], slots: int) -> list[str]:
    expected, started = min(slots, len(rows)), at_once(rows)
    return [f"{expected} should have begun at once, {started} did"] if started < expected else []


def _excess(rows: Sequence[Row], slots: int, threads: int) -> list[str]:
    processes = [[row for row in rows if row.pid == pid] for pid in {row.pid for row in rows}]
    peaks = [
        (_most_running(rows), slots, "at a time"),
        (max(map(_most_running, processes)), threads, "at a time in one process"),
    ]
    return [f"{peak} ran {where}, {limit} may" for peak, limit, where in peaks if peak > limit]


def _wrong_slot(rows: Sequence[Row], names: Mapping[Slot, str]) -> list[str]:
    """Did the first to wait get the slot that was free first?"""
    started, late = _split(rows)
    if not late:
        return []
    first = min(started, key=lambda row: row.answered)
    freed = {row.slot for row in started if row.answered <= first.answered + TIE}
    if late[0].slot in freed:
        return []
    return [f"{names[first.slot]} was free first, the waiting request got {names[late[0].slot]}"]


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Those that began at once and those that did not, each in the order they began."""
    ordered = sorted(rows, key=lambda row: row.begin)
    first_end = min(row.end for row in rows)
    started = [row for row in ordered if row.begin < first_end]
    return started, ordered[len(started) :]


def _most_running(rows: Sequence[Row]) -> int:
    # The peak is reached where a request begins.
    return max(sum(other.begin <= row.begin < other.end for other in rows) for row in rows)


def _ms(seconds: float) -> str:
    return f"{round(seconds * 1000)} ms"
