"""An existing app adopts `Replica(app)`, whichever server it has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from other_server import OtherServer
from server import Pending, environment, wait_for

CONFIG = {"threads_per_process": 2}
WARNING = "No dispatcher under this server"
MISTAKE = "replica.yaml:1: threads_per_process: must be greater than or equal to 1 (got 0)"

Serve = Callable[..., Any]
BIN = Path(sys.executable).parent

FLASK = (sys.executable, "-m", "flask", "--app", "adopting_app", "run", "--port", "0")
WAITRESS = (
    sys.executable,
    "-m",
    "waitress",
    "--listen=127.0.0.1:0",
    "--threads=8",
    "--no-clear-untrusted-proxy-headers",
    "--call",
)
UWSGI = (
    str(BIN / "uwsgi"), "--http-socket", "127.0.0.1:0", "--virtualenv", sys.prefix, "--master",
    "--enable-threads", "--threads", "8", "--die-on-term", "--need-app", "--module",
)  # fmt: skip

OTHERS = {
    "flask run": (FLASK, r"Running on http://127\.0\.0\.1:(\d+)"),
    "waitress": ((*WAITRESS, "adopting_app:create_app"), r"Serving on http://127\.0\.0\.1:(\d+)"),
    "uWSGI": ((*UWSGI, "adopting_app:create_app()"), r"bound to TCP address 127\.0\.0\.1:(\d+)"),
    "plain WSGI": (
        (*WAITRESS, "adopting_app:create_plain"), r"Serving on http://127\.0\.0\.1:(\d+)",
    ),
}  # fmt: skip
GUNICORNS = {
    "ours": (),
    "gthread": ("--worker-class", "gthread", "--threads", "8"),
    "gevent": ("--worker-class", "gevent", "--worker-connections", "8"),
    "sync": ("--worker-class", "sync"),
}
ALL = [name for name in (*OTHERS, *GUNICORNS) if name != "sync"]
OF_FLASK = [name for name in ALL if name != "plain WSGI"]


def serve(start: Serve, name: str, *more: str) -> Any:
    if name in OTHERS:
        line, listening = OTHERS[name]
        return start(*line, *more, kind=OtherServer, listening=listening, config=CONFIG)
    app = "adopting_app:create_app()"
    base = {} if name == "ours" else {"base": GUNICORNS[name]}
    return start(*more, app=app, config=CONFIG, **base)


def numbers(server: Any) -> dict[str, int]:
    """Of the replica, asked for without a slot."""
    if isinstance(server, OtherServer) or WARNING in server.log:
        return dict(server.get("/outside").json)
    now = server.numbers()
    return {"running": now.running, "waiting": now.waiting}


def wait_numbers(server: Any, running: int, waiting: int) -> None:
    wanted = {"running": running, "waiting": waiting}
    wait_for(lambda: numbers(server) == wanted, str(wanted))


@pytest.mark.parametrize("name", ALL)
def test_of_three_requests_at_two_threads_one_waits_its_turn(name, start, stage):
    server = serve(start, name)
    running = [server.later("/hold/a"), server.later("/hold/b")]
    actors = stage.take(2)
    third = server.later("/hold/c")
    wait_numbers(server, 2, 1)
    assert stage.is_empty()
    actors[0].finish()
    last = stage.next()
    assert last.name == "c"
    assert float(last.waited) > max(float(actor.waited) for actor in actors)
    for actor in (actors[1], last):
        actor.finish()
    assert [each.result().status for each in (*running, third)] == [200, 200, 200]
    wait_numbers(server, 0, 0)
    assert server.log.count(WARNING) == (name != "ours")


@pytest.mark.parametrize("name", OF_FLASK)
def test_what_the_app_has_works_as_before_and_no_slot_is_lost(name, start):
    """Its database, CORS, and ProxyFix; and requests that fail, stream, and lose their client."""
    server = serve(start, name)
    everybody = [Pending(lambda: use(server, 4)) for _ in range(6)]
    for each in everybody:
        each.result()
    wait_numbers(server, 0, 0)
    hello = server.get("/", Origin="http://example.org", X_Forwarded_For="192.0.2.7")
    assert hello.json["client"] == "192.0.2.7"
    assert hello.json["high"] <= 2
    assert hello.headers["Access-Control-Allow-Origin"] in ("*", "http://example.org")
    assert [server.get("/visit").json["visits"] for _ in range(3)] == [1, 2, 3]


def use(server: Any, times: int) -> None:
    for _ in range(times):
        assert server.get("/").status == 200
        assert server.get("/fail").status == 500
        assert server.get("/file").body == (Path(__file__).parent / "adopting_app.py").read_bytes()
        assert len(server.get("/stream/3").body) == 3 * 65536
        with server.connect() as client:
            client.ask("/stream/100").sock.recv(1)
            client.reset()
        with server.connect() as client, suppress(OSError, HTTPException):
            client.ask("/", method="HEAD").reply("HEAD")


def test_under_a_sync_worker_nothing_waits(start):
    server = serve(start, "sync")
    assert [server.get("/").status for _ in range(3)] == [200, 200, 200]
    assert server.log.count(WARNING) == 1


def test_uwsgi_sends_a_file_by_itself(start):
    server = serve(start, "uWSGI")
    server.get("/file")
    server.wait_log(r"GET /file => generated \d+ bytes in \d+ msecs via sendfile\(\)")


@pytest.mark.parametrize(("name", "read"), [("ours", [2, 1, True]), ("gthread", [2, 0, False])])
def test_a_child_of_a_process_can_read_the_numbers(name, read, start):
    assert serve(start, name).get("/child").json == read


def test_the_debugger_shows_an_error_and_keeps_no_slot(start):
    server = serve(start, "flask run", "--debug", "--no-reload")
    for _ in range(3):
        reply = server.get("/fail")
        assert reply.status == 500
        assert b"Werkzeug Debugger" in reply.body
    wait_numbers(server, 0, 0)


RELOADED = """
from flask import Flask
from replica_plugin import Replica

app = Flask("app")
Replica(app)
app.add_url_rule("/", view_func=lambda: "{}")
"""


def test_the_reloader_reloads(start):
    first, second = (RELOADED.format(word) for word in ("first", "second"))
    line = (sys.executable, "-m", "flask", "run", "--debug", "--port", "0")
    listening = OTHERS["flask run"][1]
    server = start(*line, kind=OtherServer, listening=listening, files={"app.py": first})
    wait_for(lambda: said(server) == b"first", "the app")
    (server.folder / "app.py").write_text(second)
    wait_for(lambda: said(server) == b"second", "the app as it is now")


def said(server: Any) -> bytes:
    with suppress(OSError, HTTPException):
        return bytes(server.get("/").body)
    return b""


@pytest.mark.parametrize(
    "line",
    [
        FLASK,
        OTHERS["waitress"][0],
        OTHERS["uWSGI"][0],
        (sys.executable, "-m", "gunicorn", "--bind=127.0.0.1:0", "adopting_app:create_app()"),
    ],
    ids=["flask run", "waitress", "uWSGI", "gunicorn"],
)
def test_a_mistake_in_the_settings_ends_the_server_with_a_message(line, start):
    folder = start.folder("mistaken")
    (folder / "replica.yaml").write_text("threads_per_process: 0\n")
    options = {"cwd": folder, "env": environment(start.environment), "timeout": 60}
    done = subprocess.run(line, capture_output=True, text=True, **options)
    assert done.returncode != 0
    assert MISTAKE in done.stdout + done.stderr
