"""How a slot goes back under a server without a dispatcher: once, on every exit; and files."""

from __future__ import annotations

import gc
import io
import threading
from contextlib import suppress
from typing import Any
from wsgiref.util import FileWrapper

import pytest
from flask import Flask, send_file
from server import Pending
from werkzeug.test import create_environ

from replica_plugin import ReplicaMiddleware
from replica_plugin.config.settings import Settings

REQUESTS = 100_000
CALLERS = 8


class ServersFile:
    """What a server knows for a file to send by itself: by this class, and no other."""

    def __init__(self, file: Any, block_size: int = 8192) -> None:
        self.file = file

    def close(self) -> None:
        self.file.close()


def as_it_is(file: Any, block_size: int = 8192) -> Any:
    """uWSGI's: what it returns is what it got, which it remembers."""
    return file


def capped(app: Any, **settings: Any) -> ReplicaMiddleware:
    return ReplicaMiddleware(app, Settings(**settings))


def serve(app: Any, **environ: Any) -> Any:
    return app({**create_environ(), **environ}, lambda *_: None)


def of_file(file: Any) -> Any:
    """A WSGI app that answers with a file."""
    return lambda environ, start_response: environ["wsgi.file_wrapper"](file, 4096)


@pytest.mark.parametrize("wrapper", [ServersFile, as_it_is])
def test_a_file_on_disk_is_the_servers_own_and_holds_no_slot(wrapper, tmp_path):
    app = capped(of_file(open(__file__, "rb")))
    environ = create_environ() | {"wsgi.file_wrapper": wrapper}
    body = app(environ, lambda *_: None)
    assert not body.closed if wrapper is as_it_is else type(body) is ServersFile
    assert environ["wsgi.file_wrapper"] is wrapper
    assert app.stats().running == 0
    body.close()


def test_a_file_of_flasks_is_the_servers_own():
    app = Flask("app")
    app.add_url_rule("/", "file", lambda: send_file(__file__))
    body = serve(capped(app), **{"wsgi.file_wrapper": ServersFile})
    assert type(body) is ServersFile
    body.close()


@pytest.mark.parametrize("wrapper", [ServersFile, as_it_is])
def test_a_file_of_the_apps_own_making_is_read_in_blocks_and_with_a_slot(wrapper):
    file = io.BytesIO(b"line\n" * 2000)
    app = capped(of_file(file))
    body = serve(app, **{"wsgi.file_wrapper": wrapper})
    assert [len(part) for part in body] == [4096, 4096, 1808]
    assert app.stats().running == 1
    body.close()
    assert (app.stats().running, file.closed) == (0, True)


def test_a_file_of_which_the_app_makes_something_else_holds_its_slot():
    def upper(environ: Any, start_response: Any) -> Any:
        return (part.upper() for part in environ["wsgi.file_wrapper"](open(__file__, "rb")))

    app = capped(upper)
    body = serve(app, **{"wsgi.file_wrapper": FileWrapper})
    assert app.stats().running == 1
    body.close()
    assert app.stats().running == 0


def test_an_app_that_fails_with_a_file_leaves_the_server_its_wrapper():
    def fail(environ: Any, start_response: Any) -> Any:
        environ["wsgi.file_wrapper"](open(__file__, "rb")).close()
        raise RuntimeError

    environ = create_environ() | {"wsgi.file_wrapper": ServersFile}
    app = capped(fail)
    with pytest.raises(RuntimeError):
        app(environ, lambda *_: None)
    assert environ["wsgi.file_wrapper"] is ServersFile
    assert app.stats().running == 0


def test_a_body_that_is_garbage_in_a_cycle_gives_its_slot_back():
    app = capped(lambda environ, start_response: [b"body"])
    cycle: list[Any] = [serve(app)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert app.stats().running == 0


class Crowded:
    """A WSGI app that answers, fails, streams, and counts who is inside."""

    def __init__(self) -> None:
        self._count = threading.Lock()
        self._now = self.high = 0

    def __call__(self, environ: Any, start_response: Any) -> Any:
        self._enter()
        way = environ["PATH_INFO"]
        if way == "/stream":
            return self._stream()
        try:
            if way == "/fail":
                raise RuntimeError
            return [b"body"]
        finally:
            self._leave()

    def _stream(self) -> Any:
        try:
            for _ in range(3):
                yield b"part"
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._count:
            self._now += 1
            self.high = max(self.high, self._now)

    def _leave(self) -> None:
        with self._count:
            self._now -= 1


def call_all_ways(app: Any, times: int) -> None:
    """As servers do: read it all; fail; stream; lose the client in a stream; forget to close."""
    environ = create_environ()

    def call(way: str) -> Any:
        return app({**environ, "PATH_INFO": way}, lambda *_: None)

    for _ in range(times // 5):
        body = call("/")
        list(body)
        body.close()
        with suppress(RuntimeError):
            call("/fail")
        body = call("/stream")
        list(body)
        body.close()
        body = call("/stream")
        next(iter(body))
        body.close()
        list(call("/"))


def test_no_slot_is_lost_after_100_000_requests_that_fail_stream_and_disconnect():
    crowded = Crowded()
    app = capped(crowded, threads_per_process=3)
    share = REQUESTS // CALLERS
    for caller in [Pending(lambda: call_all_ways(app, share)) for _ in range(CALLERS)]:
        caller.result()
    assert crowded.high <= 3
    assert (app.stats().running, app.stats().waiting) == (0, 0)
