"""Handlers that do not end in time, in all the ways there are, behind served_app's."""

from __future__ import annotations

import os
import time

import served_app
from served_app import answer, as_json, hold

from replica_plugin.errors import OverdueError

ended = 0
"""How many requests of this process were interrupted."""


def spin(environ, start_response, name):
    """Python code that never blocks."""
    hold(environ, lambda *_: None, name)
    while True:
        pass


def sleep(environ, start_response, seconds):
    """A call that blocks, and lets others run."""
    hold(environ, lambda *_: None, "sleep")
    time.sleep(float(seconds))
    return answer(start_response, "slept\n")


def read(environ, start_response, name):
    """A read that blocks, of a pipe in which nothing ever comes."""
    reading, writing = os.pipe()
    hold(environ, lambda *_: None, name)
    try:
        os.read(reading, 1)
    finally:
        os.close(reading)
        os.close(writing)


def grip(environ, start_response, name):
    """A call in C that keeps the GIL, for ever as far as tests are concerned."""
    hold(environ, lambda *_: None, name)
    sum(range(10**12))


def swallow(environ, start_response, name):
    """Go on in spite of everything, until the stage says so; others may run meanwhile."""
    try:
        hold(environ, lambda *_: None, name)
        while True:
            time.sleep(0.01)
    except:  # noqa: E722  # what the app is here for
        hold(environ, lambda *_: None, f"{name}-swallowed")
    return answer(start_response, "on and on\n")


def clean(environ, start_response, name):
    """Clean up, and raise again."""
    global ended
    try:
        spin(environ, start_response, name)
    except OverdueError:
        ended += 1
        raise


def count(environ, start_response, rest):
    return as_json(start_response, {"ended": ended, "pid": os.getpid()})


def begun(environ, start_response, name):
    """A response that has begun, and does not go on."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "8")])
    yield b"some"
    spin(environ, start_response, name)


def hinted(environ, start_response, name):
    """Early Hints only, which are no response yet."""
    environ["wsgi.early_hints"]([("Link", "</a.css>; rel=preload")])
    spin(environ, start_response, name)


class Closing:
    """A body whose closing does not end."""

    def __init__(self, environ, name, part):
        self._parts = [part]
        self.close = lambda: spin(environ, None, name)

    def __iter__(self):
        return iter(self._parts)


def closing(environ, start_response, name):
    """A complete response of 7 MiB."""
    (part,) = answer(start_response, b"c" * (7 << 20))
    return Closing(environ, name, part)


def folding(environ, start_response, name):
    """One that the client takes at once."""
    (part,) = answer(start_response, b"c")
    return Closing(environ, name, part)


def near(environ, start_response, seconds):
    """End at about this time, without ever blocking."""
    until = time.monotonic() + float(seconds)
    while time.monotonic() < until:
        pass
    return answer(start_response, "just in time\n")


served_app.HANDLERS.update(
    spin=spin, sleep=sleep, read=read, grip=grip, swallow=swallow, clean=clean, count=count,
    begun=begun, near=near, closing=closing, folding=folding, hinted=hinted,
)  # fmt: skip
application = served_app.application
