"""The WSGI app that live tests serve: one path for each thing a request can do."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import socket
import struct
import sys
import threading
import time
from contextlib import suppress

HOME = threading.get_native_id()  # the thread that imports the app; gevent's have none of these
_lock = threading.Lock()
_seizing = threading.Lock()
_now = 0
_high = 0


def application(environ, start_response):
    """Call the handler that is named by the path's first part; count who is inside."""
    global _now, _high
    name, _, rest = environ["PATH_INFO"].strip("/").partition("/")
    with _lock:
        _now += 1
        _high = max(_high, _now)
    try:
        return HANDLERS.get(name or "hello", missing)(environ, start_response, rest)
    finally:
        with _lock:
            _now -= 1


def answer(start_response, body, status="200 OK", kind="text/plain", **headers):
    body = body if isinstance(body, bytes) else body.encode()
    fields = [(name.replace("_", "-"), value) for name, value in headers.items()]
    start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *fields])
    return [body]


def as_json(start_response, value):
    return answer(start_response, json.dumps(value), kind="application/json")


def hello(environ, start_response, rest):
    return answer(start_response, "hello\n")


def missing(environ, start_response, rest):
    return answer(start_response, "no such path\n", "404 Not Found")


def child(environ, start_response, rest):
    """Fork a child, which sleeps; `child/poor` when one descriptor is left."""
    taken = take_descriptors() if rest else []
    pid = os.fork()
    if not pid:
        time.sleep(600)
        os._exit(0)
    for fd in taken:
        os.close(fd)
    return as_json(start_response, pid)


def late_child(environ, start_response, name):
    """As freeze; and then fork a child, before anything else has its turn."""
    freeze(environ, lambda *_: None, name)
    return child(environ, start_response, "")


def take_descriptors():
    """All there are but one, without which gevent's hub does not turn in a child."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    taken = []
    with suppress(OSError):
        while True:
            taken.append(os.dup(0))
    os.closerange(taken[-1], taken.pop() + 1)  # gevent closes later
    return taken


def close_all(environ, start_response, rest):
    os.closerange(3, 1 << 16)
    return answer(start_response, "closed\n")


def hold(environ, start_response, name):
    """Begin on the test's stage; end when told."""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(os.environ["STAGE"])
        link.sendall((json.dumps(who(environ, name)) + "\n").encode())
        link.recv(1)
    return as_json(start_response, who(environ, name))


def who(environ, name):
    thread = threading.get_native_id()
    return {
        "name": name,
        "pid": os.getpid(),
        "thread": thread,
        "main": thread == HOME == os.getpid(),
        "waited": str(environ.get("replica_plugin.waited", "")),
    }


def freeze(environ, start_response, name, wait=None):
    """As hold, but gevent's patch does not reach it: it keeps the whole thread."""
    import _socket

    link = _socket.socket(socket.AF_UNIX)
    link.connect(os.environ["STAGE"])
    link.sendall((json.dumps(who(environ, name)) + "\n").encode())
    wait(link) if wait else link.recv(1)
    link.close()
    return as_json(start_response, who(environ, name))


def seize(environ, start_response, name):
    """As freeze, and keeps the GIL too; in each process one of them is on the stage."""
    import ctypes

    recv, byte = ctypes.PyDLL(None).recv, ctypes.create_string_buffer(1)
    with _seizing:
        return freeze(environ, start_response, name, lambda link: recv(link.fileno(), byte, 1, 0))


def modules(environ, start_response, rest):
    return as_json(start_response, sorted(sys.modules))


def numbers(environ, start_response, rest):
    """The highest number of requests this process has had inside at once, and its threads."""
    fds = len(os.listdir("/proc/self/fd"))
    count = threading.active_count()
    return as_json(
        start_response, {"high": _high, "pid": os.getpid(), "threads": count, "fds": fds}
    )


def blocks(environ, start_response, rest):
    """How many blocks of memory Python's objects take in this process."""
    gc.collect()
    return as_json(start_response, {"pid": os.getpid(), "blocks": sys.getallocatedblocks()})


def sleep(environ, start_response, seconds):
    began = time.monotonic()
    time.sleep(float(seconds))
    value = who(environ, "") | {"began": began, "ended": time.monotonic()}
    return as_json(start_response, value)


def burn(environ, start_response, millions):
    """Keep the GIL in one C call: some 10 ms for each million."""
    began = time.monotonic()
    sum(range(int(millions) * 1_000_000))
    value = who(environ, "") | {"began": began, "ended": time.monotonic()}
    return as_json(start_response, value)


def grip(environ, start_response, seconds):
    """Keep the GIL for so long, and use no CPU."""
    import ctypes

    ctypes.PyDLL(None).usleep(int(float(seconds) * 1e6))
    return as_json(start_response, who(environ, ""))


def echo(environ, start_response, rest):
    return answer(start_response, environ["wsgi.input"].read())


def held_echo(environ, start_response, name):
    hold(environ, lambda *_: None, name)
    return echo(environ, start_response, "")


def hinted(environ, start_response, rest):
    """Early Hints, and then the body that was sent."""
    environ["wsgi.early_hints"]([("Link", "</a.css>; rel=preload")])
    return echo(environ, start_response, rest)


def caught(environ, start_response, rest):
    """Answer whatever happens to the body, as Flask does."""
    try:
        return echo(environ, start_response, rest)
    except OSError:
        return answer(start_response, "caught\n", "400 Bad Request")


def ignore(environ, start_response, rest):
    """Answer without reading the body."""
    return answer(start_response, "ignored\n")


def partly(environ, start_response, count):
    return answer(start_response, environ["wsgi.input"].read(int(count)))


def environment(environ, start_response, rest):
    plain = {key: value for key, value in environ.items() if isinstance(value, (str, bool, int))}
    return as_json(start_response, plain)


class Stream:
    """A body whose closing the stage sees."""

    def __init__(self, environ, parts, name):
        self._environ, self._parts, self._name = environ, parts, name

    def __iter__(self):
        return iter(self._parts)

    def close(self):
        hold(self._environ, lambda *_: None, f"{self._name}-closing")


def large(environ, start_response, rest):
    """`large/MIB/HOW`: so many MiB, told apart by their place; HOW the app hands them over."""
    mib, how = rest.split("/")
    part = struct.pack(">131072Q", *range(1 << 17))  # at once: a request_timeout may be short
    body = part * int(mib)
    length = [("Content-Length", str(len(body)))]
    start_response("200 OK", [] if how in ("list", "chunked") else length)
    if how in ("one", "list"):
        return [body]
    return (body[at : at + 65536] for at in range(0, len(body), 65536))


def held_large(environ, start_response, name):
    hold(environ, lambda *_: None, name)
    return large(environ, start_response, "8/one")


def stream(environ, start_response, count):
    """Many parts of 64 KiB, without a Content-Length."""
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    return (bytes([n % 256]) * 65536 for n in range(int(count)))


def begun(environ, start_response, name):
    """A response whose first bytes are out when it is held on the stage."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "8")])
    yield b"some"
    hold(environ, lambda *_: None, name)
    yield b"more"


def close(environ, start_response, name):
    """A response whose body's close() is held on the stage."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
    return Stream(environ, [b"body"], name)


def after(environ, start_response, step):
    """A complete response of 7 MiB, after which the app goes on, at its close or before."""
    parts = [b"a" * (7 << 20)]
    start_response("200 OK", [("Content-Length", str(7 << 20))])
    return Stream(environ, parts, "x") if step == "closing" else going_on(environ, parts, "x")


def going_on(environ, parts, name):
    yield from parts
    hold(environ, lambda *_: None, f"{name}-going-on")


def file(environ, start_response, size):
    """A file of so many bytes, through wsgi.file_wrapper."""
    import tempfile

    content = tempfile.TemporaryFile()
    content.write(b"f" * int(size))
    content.seek(0)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", size)])
    return environ["wsgi.file_wrapper"](content)


class Feed:
    """A file that is none on disk: what comes next, comes when the stage says so."""

    def __init__(self, environ, name):
        self.read = lambda size: next(self._parts, b"")
        self._parts = self._feed(environ, name)

    def _feed(self, environ, name):
        yield from [b"f" * 65536] * 112
        for step in ("more", "end"):
            hold(environ, lambda *_: None, f"{name}-{step}")
            yield step.encode()


def feed(environ, start_response, name):
    """7 MiB at once, and more by and by, through wsgi.file_wrapper."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return environ["wsgi.file_wrapper"](Feed(environ, name), 65536)


def fail(environ, start_response, rest):
    raise RuntimeError("before the first byte")


def fail_late(environ, start_response, rest):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "100")])
    yield b"some"
    raise RuntimeError("after the first byte")


def oserror(environ, start_response, rest):
    raise FileNotFoundError("the app's own, not the client's")


def leave(environ, start_response, rest):
    raise SystemExit("an app that calls sys.exit")


def cancelled(environ, start_response, rest):
    raise asyncio.CancelledError


def die(environ, start_response, rest):
    os._exit(int(rest or 1))


def empty(environ, start_response, rest):
    start_response("204 No Content", [])
    return []


HANDLERS = {
    "after": after,
    "begun": begun,
    "blocks": blocks,
    "burn": burn,
    "cancelled": cancelled,
    "caught": caught,
    "child": child,
    "close": close,
    "close-all": close_all,
    "die": die,
    "echo": echo,
    "empty": empty,
    "environ": environment,
    "fail": fail,
    "fail-late": fail_late,
    "feed": feed,
    "file": file,
    "freeze": freeze,
    "late-child": late_child,
    "grip": grip,
    "held-echo": held_echo,
    "held-large": held_large,
    "hello": hello,
    "hinted": hinted,
    "hold": hold,
    "ignore": ignore,
    "large": large,
    "leave": leave,
    "modules": modules,
    "numbers": numbers,
    "oserror": oserror,
    "partly": partly,
    "seize": seize,
    "sleep": sleep,
    "stream": stream,
}

if "HOLD_IMPORT" in os.environ:
    hold({}, lambda *_: None, "import")
