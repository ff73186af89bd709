"""An app that meddles with what ties its process to the dispatcher."""

from __future__ import annotations

import ctypes
import gc
import signal
import socket
import struct

import served_app

from replica_plugin.channel import LARGEST, End, Kind, Report
from replica_plugin.deck import let_go
from replica_plugin.listeners import SO_ATTACH_FILTER
from replica_plugin.rest import Rest
from replica_plugin.thread_worker import ThreadWorker


def worker():
    return next(each for each in gc.get_objects() if type(each) is ThreadWorker and each._channel)


def claim(environ, start_response, name):
    """Once held on the stage, say that the requests behind this one are done."""
    served_app.hold(environ, lambda *_: None, name)
    (request,) = worker()._cells.begun()
    for number in range(request + 1, request + 5):
        worker()._channel.tell(Report(Kind.DONE, number, End.ABORT).encode())
    return served_app.hello(environ, start_response, name)


def steal(environ, start_response, name):
    """Once held on the stage, take all that lies on the deck, and say nothing of it."""
    served_app.hold(environ, lambda *_: None, name)
    let_go(worker()._channel.deck)
    return served_app.hello(environ, start_response, name)


def nonsense(environ, start_response, code):
    """Say these bytes to the dispatcher, and never answer."""
    worker()._channel.tell(bytes.fromhex(code))
    signal.pause()


def listen(environ, start_response, how):
    """Make a listener of the client's connection, and say that it is answered; with a `rest`."""
    make_listener(environ["gunicorn.socket"].fileno())
    (request,) = worker()._cells.begun()
    if how == "rest":
        rest = Rest.of(b"left")
        worker()._channel.leave(Report(Kind.REST, request, End.CLOSE, rest=rest), rest)
    worker()._channel.tell(Report(Kind.DONE, request, End.CLOSE).encode())
    return served_app.hello(environ, start_response, how)


def make_listener(fd):
    """End the connection, by connecting to AF_UNSPEC, and listen instead. Python has only half."""
    libc = ctypes.CDLL(None)
    assert libc.connect(fd, bytes(16), 16) == libc.listen(fd, 1) == 0


def shorten(environ, start_response, name):
    """Once held on the stage, have the kernel cut short whatever is laid on the deck."""
    served_app.hold(environ, lambda *_: None, name)
    program = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 20))  # keep 20 bytes
    code = struct.pack("@HP", 1, ctypes.addressof(program))
    worker()._channel.deck.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, code)
    return served_app.hello(environ, start_response, name)


def hush(environ, start_response, name):
    """Once held on the stage, take all that lies on the deck, shut the channel, and live on."""
    served_app.hold(environ, lambda *_: None, name)
    let_go(worker()._channel.deck)
    worker()._channel.sock.shutdown(socket.SHUT_RDWR)
    signal.pause()


def shut(environ, start_response, how):
    """Shut the control socket, which all processes and the master have."""
    worker()._control.shutdown(getattr(socket, how))
    return served_app.hello(environ, start_response, how)


def swell(environ, start_response, name):
    """Say that more was read ahead than fits into the next job, and never answer."""
    (request,) = worker()._cells.begun()
    ahead = b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n".ljust(LARGEST - 22, b"x")
    worker()._channel.tell(Report(Kind.DONE, request, End.KEEP, ahead).encode())
    signal.pause()


served_app.HANDLERS.update(
    claim=claim,
    hush=hush,
    listen=listen,
    nonsense=nonsense,
    shorten=shorten,
    shut=shut,
    steal=steal,
    swell=swell,
)
application = served_app.application
