"""A process that offers itself on the control socket that is its stdin, and may lie.

Options, as JSON: `age`, `slots`; `pidfd`, of another process, or none; `cells`, which are `short`
or `unsealed`; `channel`, a `stream`; `then`, options of another offer; `talks`, without an end;
`fills` its channel, and ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from replica_plugin.cells import Cells
from replica_plugin.channel import FREE, Register, pair, send, send_register


def offer(
    control: socket.socket,
    age: int = 1,
    slots: int = 1,
    pidfd: int | None = 0,
    cells: str = "",
    channel: str = "",
) -> Any:
    ours, theirs = pair() if not channel else socket.socketpair()
    page = Cells(slots).fd
    if cells:
        page = os.memfd_create("cells", os.MFD_ALLOW_SEALING)
        os.ftruncate(page, 8 if cells == "short" else 4096)
    process = 0 if pidfd is None else os.pidfd_open(pidfd or os.getpid())
    send_register(control, Register(age, slots, 0, False), theirs.fileno(), page, process)
    return ours, theirs, page, process


def fill(channel: socket.socket) -> int:
    """Say as much as there is room for; how much that is."""
    count = 0
    with suppress(BlockingIOError):
        while True:
            send(channel, FREE)
            count += 1
    return count


def main(then: Any = None, talks: bool = False, fills: bool = False, **options: Any) -> None:
    with socket.socket(fileno=0) as control:
        held = [offer(control, **options)]
        if then:
            held.append(offer(control, **then))
        print("offered", flush=True)
        if fills:
            print(fill(held[0][0]))
            return
        while talks:
            with suppress(OSError):
                held[0][0].send(FREE)
        time.sleep(60)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
