"""The served app, with more ways to answer, and to fail at it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import tempfile
import time

from served_app import application as usual

TEXT = [("Content-Type", "text/plain")]


def application(environ, start_response):
    name = environ["PATH_INFO"].strip("/")
    handler = HANDLERS.get(name)
    return handler(environ, start_response) if handler else usual(environ, start_response)


def sized(size):
    return [*TEXT, ("Content-Length", str(size))]


def everything(environ, start_response):
    """The environ: ports as whether they are right, and only the names of what is not plain."""
    environ = environ.copy()
    environ.pop("replica_plugin.waited", None)  # what only ours has
    sock = environ["gunicorn.socket"]
    if "REMOTE_PORT" in environ and "PROXY_PROTOCOL" not in environ:
        environ["REMOTE_PORT"] = environ["REMOTE_PORT"] == str(sock.getpeername()[1])
    if isinstance(sock.getsockname(), tuple):
        environ["SERVER_PORT"] = environ["SERVER_PORT"] == str(sock.getsockname()[1])
    plain = (str, bool, int, tuple)
    state = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in environ.items()
        if isinstance(value, plain)
    }
    state["others"] = sorted(key for key, value in environ.items() if not isinstance(value, plain))
    body = json.dumps(state, sort_keys=True).encode()
    start_response("200 OK", sized(len(body)))
    return [body]


def unsized(environ, start_response):
    start_response("200 OK", TEXT)
    return [b"one", b"", b"two"]


def unsized_single(environ, start_response):
    start_response("200 OK", TEXT)
    return [b"one"]


def nothing(environ, start_response):
    start_response("200 OK", TEXT)
    return []


def short(environ, start_response):
    start_response("200 OK", [*sized(10), ("X-Short", "yes")])
    return [b"some"]


def long(environ, start_response):
    start_response("200 OK", sized(3))
    return [b"much more"]


def no_content_with_body(environ, start_response):
    start_response("204 No Content", sized(4))
    return [b"body"]


def not_modified(environ, start_response):
    start_response("304 Not Modified", [("ETag", '"x"'), ("Content-Length", "4")])
    return []


def writes(environ, start_response):
    write = start_response("200 OK", TEXT)
    write(b"one")
    write(b"two")
    return [b"three"]


def starts_twice(environ, start_response):
    start_response("200 OK", TEXT)
    start_response("200 OK", TEXT)
    return [b"never"]


def changes_its_mind(environ, start_response):
    start_response("200 OK", sized(4))
    try:
        raise RuntimeError
    except RuntimeError:
        start_response("503 Changed", sized(4), sys.exc_info())
    return [b"mind"]


def changes_its_mind_late(environ, start_response):
    write = start_response("200 OK", sized(8))
    write(b"some")
    try:
        raise RuntimeError("late")
    except RuntimeError:
        start_response("503 Changed", sized(4), sys.exc_info())
    return [b"mind"]


def never_starts(environ, start_response):
    return [b"body"]


def returns_none(environ, start_response):
    start_response("200 OK", TEXT)


def returns_text(environ, start_response):
    start_response("200 OK", TEXT)
    return ["text"]


def splits_header(environ, start_response):
    start_response("200 OK", [("X-Bad", "a\r\nSet-Cookie: b")])
    return [b"never"]


def bad_header_name(environ, start_response):
    start_response("200 OK", [("X Bad", "a")])
    return [b"never"]


def bad_status(environ, start_response):
    start_response("20 OK", TEXT)
    return [b"never"]


def hop_by_hop(environ, start_response):
    start_response("200 OK", [*sized(2), ("Connection", "close"), ("Keep-Alive", "timeout=3")])
    return [b"ok"]


def hints(environ, start_response):
    environ["wsgi.early_hints"]([("Link", "</a.css>; rel=preload")])
    environ["wsgi.early_hints"]([("Link", "</b.css>; rel=preload")])
    start_response("200 OK", sized(2))
    return [b"ok"]


def hints_then_fails(environ, start_response):
    environ["wsgi.early_hints"]([("Link", "</a.css>; rel=preload")])
    raise RuntimeError("after a hint")


def raises(error):
    def handler(environ, start_response):
        raise error

    return handler


def raises_late(error, headers):
    def handler(environ, start_response):
        start_response("200 OK", headers)
        yield b"some"
        raise error

    return handler


def raises_at_close(environ, start_response):
    class Body(list):
        def close(self):
            raise RuntimeError("at close")

    start_response("200 OK", sized(4))
    return Body([b"body"])


def _file():
    content = tempfile.TemporaryFile()
    content.write(b"0123456789")
    content.seek(4)
    return content


def file_with_offset(environ, start_response):
    start_response("200 OK", TEXT)
    return environ["wsgi.file_wrapper"](_file())


def file_part(environ, start_response):
    start_response("200 OK", sized(3))
    return environ["wsgi.file_wrapper"](_file())


def file_in_memory(environ, start_response):
    start_response("200 OK", TEXT)
    return environ["wsgi.file_wrapper"](io.BytesIO(b"memory"))


def file_is_pipe(environ, start_response):
    reader, writer = os.pipe()
    os.write(writer, b"pipe")
    os.close(writer)
    start_response("200 OK", TEXT)
    return environ["wsgi.file_wrapper"](os.fdopen(reader, "rb"))


def large_file(environ, start_response):
    content = tempfile.TemporaryFile()
    content.write(b"x" * 3_000_000)
    content.seek(0)
    start_response("200 OK", sized(3_000_000))
    return environ["wsgi.file_wrapper"](content)


def lines(environ, start_response):
    body = b"|".join(environ["wsgi.input"])
    start_response("200 OK", sized(len(body)))
    return [body]


def digest(environ, start_response):
    """How long the body is, and whether it is what was sent."""
    body = environ["wsgi.input"].read()
    text = f"{len(body)} {body.count(b'x')}".encode()
    start_response("200 OK", sized(len(text)))
    return [text]


def forks(environ, start_response):
    """Leave a child behind that holds all this process has open until the client is gone."""
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    start_response("200 OK", [("X-Child", str(child))])
    return [b"forked"]


def method(environ, start_response):
    body = f"{environ['REQUEST_METHOD']} {environ['RAW_URI']} {environ['PATH_INFO']}".encode()
    start_response("200 OK", sized(len(body)))
    return [body]


def variable(environ, start_response):
    body = os.environ.get(environ["PATH_INFO"].rpartition("/")[2], "").encode()
    start_response("200 OK", sized(len(body)))
    return [body]


HANDLERS = {
    "env/RAW": variable,
    "": method,
    "*": method,
    "bad-header-name": bad_header_name,
    "bad-status": bad_status,
    "cancelled": raises(asyncio.CancelledError()),
    "cancelled-late": raises_late(asyncio.CancelledError(), TEXT),
    "changes-its-mind": changes_its_mind,
    "changes-its-mind-late": changes_its_mind_late,
    "digest": digest,
    "everything": everything,
    "exit": raises(SystemExit(1)),
    "exit-late": raises_late(SystemExit(1), sized(100)),
    "fail-late-unsized": raises_late(RuntimeError("late"), TEXT),
    "file-in-memory": file_in_memory,
    "file-is-pipe": file_is_pipe,
    "file-part": file_part,
    "file-with-offset": file_with_offset,
    "forks": forks,
    "hints": hints,
    "hints-then-fails": hints_then_fails,
    "hop-by-hop": hop_by_hop,
    "interrupt": raises(KeyboardInterrupt()),
    "large-file": large_file,
    "lines": lines,
    "long": long,
    "method": method,
    "never-starts": never_starts,
    "no-content-with-body": no_content_with_body,
    "not-modified": not_modified,
    "nothing": nothing,
    "oserror-late": raises_late(FileNotFoundError("late"), sized(100)),
    "raises-at-close": raises_at_close,
    "returns-none": returns_none,
    "returns-text": returns_text,
    "short": short,
    "splits-header": splits_header,
    "starts-twice": starts_twice,
    "stop-iteration": raises(StopIteration()),
    "unsized": unsized,
    "unsized-single": unsized_single,
    "writes": writes,
}
