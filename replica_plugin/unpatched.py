"""Python's own sockets, poll and threads, also where gevent has put its own in their place.

Bound at import, so a patch that comes later (gevent_worker.py) changes nothing here. One
that came before, in gunicorn's configuration say, is passed by with gevent's own documented
means. Nothing here imports gevent.
"""

from __future__ import annotations

import _socket
import _thread
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _thread import get_ident as get_ident
    from _thread import start_new_thread as start_new_thread
    from select import poll as poll
    from socket import socket as Socket_
    from time import sleep as sleep

    Socket = Socket_
else:

    def _original(module: Any, name: str) -> Any:
        monkey = sys.modules.get("gevent.monkey")
        return monkey.get_original(module.__name__, name) if monkey else getattr(module, name)

    Socket = _original(socket, "socket")
    poll = _original(select, "poll")
    sleep = _original(time, "sleep")
    get_ident = _original(_thread, "get_ident")
    start_new_thread = _original(_thread, "start_new_thread")


def start_thread(run: Callable[[], None], name: str) -> None:
    """A daemon, and a thread of the system's, also in an app that has gevent make greenlets of
    those that Python starts: they would wait for the main thread, which waits for what we do."""
    monkey = sys.modules.get("gevent.monkey")  # it has come after us, perhaps
    if monkey and monkey.is_module_patched("threading"):
        start_new_thread(run, ())
    else:
        threading.Thread(target=run, name=name, daemon=True).start()


def socketpair(kind: int) -> tuple[Socket, Socket]:
    """As socket.socketpair, of Unix sockets. gevent would not only wrap them, but make them
    non-blocking, and a hub for the thread that asks: one that does not turn, where it is not the
    main thread, so that gevent's `os.close`, which waits for a turn, would close nothing."""
    ours, theirs = (
        Socket(fileno=each.detach()) for each in _socket.socketpair(socket.AF_UNIX, kind)
    )
    for end in (ours, theirs):  # whatever setdefaulttimeout says
        end.setblocking(True)
    return ours, theirs
