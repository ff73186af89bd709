"""Python's own sockets and poll, also where gevent has put its own in their place.

Bound at import, so a patch that comes later (gevent_worker.py) changes nothing here. One
that came before, in gunicorn's configuration say, is passed by with gevent's own documented
means. Nothing here imports gevent.
"""

from __future__ import annotations

import select
import socket
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from select import poll as poll
    from socket import socket as _socket

    Socket = _socket
else:

    def _original(module: Any, name: str) -> Any:
        monkey = sys.modules.get("gevent.monkey")
        return monkey.get_original(module.__name__, name) if monkey else getattr(module, name)

    Socket = _original(socket, "socket")
    poll = _original(select, "poll")


def socketpair(kind: int) -> tuple[Socket, Socket]:
    """As socket.socketpair, of Unix sockets. gevent would not only wrap them, but make them
    non-blocking."""
    ours, theirs = (
        Socket(fileno=each.detach()) for each in socket.socketpair(socket.AF_UNIX, kind)
    )
    for end in (ours, theirs):
        end.setblocking(True)
    return ours, theirs
