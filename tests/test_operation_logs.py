"""Logs: where the dispatcher writes, and that all of them are reopened together."""

from __future__ import annotations

import logging
import re
import signal
import socket
from types import SimpleNamespace
from typing import Any

import gunicorn
import pytest
from server import IN_BOTH_MODES, descriptors, wait_for
from test_hook_start import IMPORT

from replica_plugin.actions import Why
from replica_plugin.answers import refusal
from replica_plugin.decisions import Rules
from replica_plugin.journal import Journal, were_moved

FULL = {"max_replica_concurrency": 1}
REFUSAL = '"GET /hello?q=1 HTTP/1.1" 503'


def refuse(server, stage):
    """Have the dispatcher refuse one request, and see it and another one through.

    A client has its answer before the slot has logged it and is free: wait for the latter.
    """
    running = server.later("/hold/x")
    actor = stage.next()
    with server.connect() as client:
        assert client.get("/hello?q=1", Referer="http://here", User_Agent="test").status == 503
    actor.finish()
    assert running.result().status == 200
    server.wait_numbers(running=0)


def lines(path, part):
    return [line for line in path.read_text().splitlines() if part in line]


def test_a_refusal_is_in_the_access_log_in_the_same_format_as_other_requests(start, stage):
    server = start("--access-logfile", "access", config=FULL)
    refuse(server, stage)
    access = server.folder / "access"
    wait_for(lambda: len(lines(access, '"GET /h')) == 2, "two lines")
    (refused,) = lines(access, REFUSAL)
    assert re.fullmatch(
        r"127\.0\.0\.1 - - \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "
        rf'{re.escape(REFUSAL)} \d+ "http://here" "test"',
        refused,
    )
    (served,) = lines(access, '"GET /hold/x HTTP/1.1" 200')
    assert served.split(" ")[0] == "127.0.0.1"


def test_the_access_logs_format_holds_for_refusals(start, stage):
    fields = "%(m)s|%(U)s|%(q)s|%(H)s|%(s)s|%(B)s|%(f)s|%(a)s|%({host}i)s"
    server = start("--access-logfile", "access", "--access-logformat", fields, config=FULL)
    refuse(server, stage)
    access = server.folder / "access"
    wait_for(lambda: lines(access, "503"), "the refusal")
    body = (
        "The replica is full: 1 request is in flight, as many as "
        "max_replica_concurrency (1) admits.\n"
    )
    assert lines(access, "503") == [
        f"GET|/hello|q=1|HTTP/1.1|503|{len(body)}|http://here|test|test"
    ]


def test_without_an_access_log_there_is_none(start, stage):
    server = start(config=FULL)
    refuse(server, stage)
    server.stop()
    assert "HTTP/1.1" not in server.log
    assert len(re.findall("503: The replica is full", server.log)) == 1


LEVEL = IMPORT + "loglevel = '{}'\n"


def test_the_log_level_holds_for_the_dispatcher(start, stage):
    files = {"gunicorn.conf.py": LEVEL.format("error")}
    server = start(base=(), bind=("unix:here",), files=files, config=FULL, listening_in="")
    refuse(server, stage)
    server.stop()
    assert server.log == ""


def test_a_client_that_is_refused_writes_no_lines_of_its_own_into_the_access_log(start, stage):
    """What gunicorn's parser would have refused, nobody has parsed."""
    server = start("--access-logfile", "access", config=FULL)
    held = server.later("/hold/x")
    actor = stage.next()
    forged = 'a\n10.0.0.1 - - "GET /admin HTTP/1.1" 200\r\x1b[2J\x9b'
    with server.connect() as client:
        client.send(f"GET /hello?q={forged} HTTP/1.1\r\nHost: a\r\nUser-Agent: {forged}\r\n\r\n")
        assert client.reply().status == 503
    actor.finish()
    assert held.result().status == 200
    access = server.folder / "access"
    wait_for(lambda: "/hold/x" in access.read_text(), "the other request's line")
    refused, _ = access.read_text().split("\n", 1)
    assert access.read_text().count("\n") == 2
    assert refused.count(r"a\x0a10.0.0.1") == 2
    assert not set(refused) & set("\r\x1b\x9b")


def test_a_client_cannot_make_each_of_its_refusals_a_warning_of_its_own():
    journal = Journal({"errorlog": "/dev/null", "loglevel": "error"})
    conn: Any = SimpleNamespace(ready_at=0.0)
    for n in range(100):
        answer = refusal(Why.WAITED, Rules(), 503, 1, patience=n / 100)
        assert f"({n / 100:g} s)" in answer.text
        journal.answered(conn, answer, 0.0)
    assert list(journal._held.values()) == [99]


@pytest.mark.parametrize(("before", "after"), [("error", "warning"), ("warning", "error")])
def test_the_log_level_of_the_dispatcher_changes_with_hup(start, stage, before, after):
    files = {"gunicorn.conf.py": LEVEL.format(before)}
    server = start(base=(), bind=("unix:here",), files=files, config=FULL, listening_in="")
    old = server.workers
    (server.folder / "gunicorn.conf.py").write_text(LEVEL.format(after))
    server.tell(signal.SIGHUP)
    wait_for(lambda: len(server.workers) == 1 and server.workers != old, "a new process")
    server.wait_numbers(processes=1, slots=1)
    refuse(server, stage)
    server.stop()
    assert server.log.count("[WARNING] 503: The replica is full") == (after == "warning")


LOGGING = """
logconfig_dict = {{
    "formatters": {{"short": {{"format": "%(name)s %(levelname)s %(message)s"}}}},
    "handlers": {{"file": {{"class": "{handler}", "filename": "custom", "formatter": "short"}}}},
    "root": {{"handlers": ["file"], "level": "INFO"}},
    "loggers": {{
        name: {{"handlers": ["file"], "propagate": False, "level": "INFO"}}
        for name in ("gunicorn.error", "gunicorn.access")
    }},
}}
"""
INI = """
[loggers]
keys=root, gunicorn.error, gunicorn.access
[handlers]
keys=file
[formatters]
keys=short
[logger_root]
handlers=file
level=INFO
[logger_gunicorn.error]
handlers=file
level=INFO
propagate=0
qualname=gunicorn.error
[logger_gunicorn.access]
handlers=file
level=INFO
propagate=0
qualname=gunicorn.access
[handler_file]
class=FileHandler
args=("custom",)
formatter=short
[formatter_short]
format=%(name)s %(levelname)s %(message)s
"""


@pytest.mark.parametrize("kind", ["dict", "ini"])
def test_a_logconfig_holds_for_the_dispatcher(start, stage, kind):
    text = IMPORT
    text += LOGGING.format(handler="logging.FileHandler") if kind == "dict" else "logconfig = 'ini'"
    files = {"gunicorn.conf.py": text, "ini": INI}
    # Stock gunicorn says where it listens in its log, too.
    server = start(base=(), files=files, config=FULL, bind=("unix:here",), listening_in="custom")
    refuse(server, stage)
    custom = server.folder / "custom"
    wait_for(lambda: lines(custom, REFUSAL), "the refusal")
    assert lines(custom, REFUSAL)[0].startswith("gunicorn.access INFO ")
    assert lines(custom, "503: The replica is full")[0].startswith("gunicorn.error WARNING 503: ")
    assert server.log == ""


def test_a_logconfig_with_the_apps_own_classes_is_left_out_with_a_warning(start, stage):
    own = "import logging\nclass Own(logging.FileHandler):\n    pass\n"
    text = IMPORT + LOGGING.format(handler="own.Own")
    server = start(
        base=(),
        files={"gunicorn.conf.py": text, "own.py": own},
        config=FULL,
        bind=("unix:here",),
        listening_in="custom",
    )
    refuse(server, stage)
    server.wait_log(
        r"\[WARNING\] The dispatcher logs without logconfig, which it cannot load: "
        "Unable to configure handler 'file'"
    )
    server.wait_log(r"\[WARNING\] 503: The replica is full")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"errorlog": "/none/log"}, "Error: '/none/log' isn't writable"),
        ({"accesslog": "/none/log"}, "Error: '/none/log' isn't writable"),
        ({"errorlog": "/none/log", "capture_output": True}, "No such file or directory"),
        ({"syslog": True, "syslog_facility": "none"}, "unknown facility name"),
        ({"syslog": True, "syslog_addr": "tcp://127.0.0.1:1"}, "Connection refused"),
        ({"syslog": True, "syslog_addr": "none"}, "invalid syslog address"),
        ({"errorlog": "/none/log", "logconfig": "/none"}, "Error: '/none/log' isn't writable"),
    ],
)
def test_helpers_whose_log_cannot_be_opened_log_to_stderr(capsys, settings, reason):
    try:
        Journal({"errorlog": "-", "loglevel": "info", **settings}).info("here")
    finally:
        for name in ("gunicorn.error", "gunicorn.access"):
            logging.getLogger(name).handlers.clear()
    told, here = capsys.readouterr().err.splitlines()
    assert "[ERROR] The dispatcher logs to stderr, since it cannot open its log: " in told
    assert reason in told
    assert here.endswith("[INFO] here")


def test_a_hup_has_logs_reopened_only_if_they_were_moved_away(tmp_path):
    """Who may not open them again, having given up root's privileges, goes on with them."""
    handler = logging.FileHandler(tmp_path / "error")
    logger = logging.getLogger("gunicorn.error")
    logger.addHandler(handler)
    try:
        assert not were_moved()
        (tmp_path / "error").rename(tmp_path / "error.1")
        assert were_moved()
        (tmp_path / "error").write_text("another's")
        assert were_moved()
    finally:
        logger.removeHandler(handler)
        handler.close()


@pytest.mark.skipif(gunicorn.version_info < (27,), reason="gunicorn opens its logs at the start")
def test_a_log_that_cannot_be_opened_after_hup_ends_no_helper(start):
    server = start(base=(), files={"gunicorn.conf.py": IMPORT})
    family = server.supervisor, server.dispatcher
    (server.folder / "gunicorn.conf.py").write_text(IMPORT + "errorlog = '/none/log'\n")
    server.tell(signal.SIGHUP)
    server.wait_log("The dispatcher logs to stderr, since it cannot open its log: ", 2)
    assert server.get("/hello").status == 200
    assert (server.supervisor, server.dispatcher) == family


def test_syslog_gets_what_the_dispatcher_says(start, stage):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as syslog:
        syslog.bind(("127.0.0.1", 0))
        syslog.settimeout(20)
        address = f"udp://127.0.0.1:{syslog.getsockname()[1]}"
        server = start("--log-syslog", "--log-syslog-to", address, config=FULL)
        refuse(server, stage)
        wanted = {REFUSAL.encode(), b"503: The replica is full", b'"GET /hold/x HTTP/1.1" 200'}
        while wanted:
            line = syslog.recv(65536)
            wanted -= {each for each in wanted if each in line}


def test_statsd_counts_refusals_and_requests(start, stage):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(20)
        address = f"127.0.0.1:{statsd.getsockname()[1]}"
        server = start("--statsd-host", address, "--statsd-prefix", "here", config=FULL)
        refuse(server, stage)
        wanted = {b"here.gunicorn.request.status.503:1|c", b"here.gunicorn.request.status.200:1|c"}
        while wanted:
            line = statsd.recv(65536)
            wanted -= {each for each in wanted if each in line}


# USR1, and HUP, which gunicorn has reopen its own logs, too.


def files_of(pid):
    """The regular log files a process has open."""
    links = descriptors(pid).values()
    return {link.rpartition("/")[2] for link in links if "/access" in link or "/error" in link}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("capture", [(), ("--capture-output",)])
def test_usr1_and_hup_reopen_the_logs_of_all_processes_after_they_were_moved_away(
    start, stage, capture, number
):
    server = start(
        "--access-logfile", "access", "--error-logfile", "error", *capture,
        bind=("unix:here",), listening_in="error", config={**FULL, "processes_per_replica": 1},
    )  # fmt: skip
    refuse(server, stage)
    for name in ("access", "error"):
        (server.folder / name).rename(server.folder / f"{name}.1")
    before = server.workers
    server.tell(number)
    if number == signal.SIGHUP:
        wait_for(lambda: not set(before) & set(server.workers), "the old process gone")
    everyone = [server.process.pid, server.supervisor, server.dispatcher, *server.workers]
    for pid in everyone:
        wait_for(lambda pid=pid: files_of(pid) == {"access", "error"}, "reopened")
    refuse(server, stage)
    access = server.folder / "access"
    wait_for(lambda: len(lines(access, '"GET /h')) == 2, "both requests in the new log")
    assert len(lines(access, REFUSAL)) == 1
    assert len(lines(server.folder / "access.1", '"GET /h')) == 2
    server.tell(signal.SIGKILL, server.dispatcher)
    error = server.folder / "error"
    wait_for(lambda: lines(error, "died (-9): restarting it"), "the supervisor's line")


HOLDING = """
import os, time
def post_fork(server, worker):
    while os.path.exists("held"):
        open("born", "w").close()
        time.sleep(0.01)
"""


@pytest.mark.parametrize("kind", ["thread", "gevent"])
def test_usr1_reopens_the_logs_of_a_process_that_has_only_just_been_forked(start, kind):
    if kind == "gevent":
        pytest.importorskip("gevent")
    server = start(
        "--access-logfile", "access", "--error-logfile", "error", base=(), bind=("unix:here",),
        listening_in="error", files={"gunicorn.conf.py": IMPORT + HOLDING}, config={"mode": kind},
    )  # fmt: skip
    (before,) = server.workers
    held = server.folder / "held"
    held.touch()
    server.tell(signal.SIGKILL, before)
    wait_for((server.folder / "born").exists, "another process")
    for name in ("access", "error"):
        (server.folder / name).rename(server.folder / f"{name}.1")
    server.tell(signal.SIGUSR1)
    wait_for(lambda: files_of(server.dispatcher) == {"access", "error"}, "all have been told")
    (worker,) = server.workers
    assert files_of(worker) == {"access.1", "error.1"}
    held.unlink()
    wait_for(lambda: files_of(worker) == {"access", "error"}, "reopened")
    assert server.workers == [worker]


TEE = """
import sys
from served_app import application

class Tee:
    def __init__(self, stream):
        self.stream = stream
    def write(self, text):
        return self.stream.write(text)
    def flush(self):
        self.stream.flush()

sys.stdout = Tee(sys.stdout)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_that_cannot_reopen_its_logs_finishes_and_is_replaced(start, stage, threads):
    """gunicorn captures output by descriptor, and the app has put a stream without in its place."""
    server = start(
        "--capture-output", "--error-logfile", "error", app="tee:application",
        files={"tee.py": TEE}, bind=("unix:here",), listening_in="error",
        config={"processes_per_replica": 1, "threads_per_process": threads},
    )  # fmt: skip
    (before,) = server.workers
    running = server.later("/hold/x")
    actor = stage.next()
    old = server.folder / "error.1"
    (server.folder / "error").rename(old)
    server.tell(signal.SIGUSR1)
    wait_for(lambda: lines(old, "Leaving, since the logs cannot be opened: "), "it gives up")
    actor.finish()
    assert running.result().status == 200
    (after,) = wait_for(lambda: set(server.workers) - {before}, "its successor")
    assert files_of(after) == {"error"}


@IN_BOTH_MODES
@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_that_can_neither_reopen_its_logs_nor_say_so_finishes_too(start, stage, threads):
    with open("/dev/full", "w") as full:
        server = start(
            "--error-logfile", "logs/error", bind=("unix:here",), listening_in="logs/error",
            files={"logs/other": ""}, stderr=full,
            config={"processes_per_replica": 1, "threads_per_process": threads},
        )  # fmt: skip
    (before,) = server.workers
    running = server.later("/hold/x")
    actor = stage.next()
    (server.folder / "logs").rename(server.folder / "moved")
    server.tell(signal.SIGUSR1, before)
    server.wait_numbers(processes=0, running=1)
    actor.finish()
    assert running.result().status == 200
    server.wait_numbers(processes=1, running=0)
    assert server.workers != [before]


LOOP = """
import asyncio, signal
from served_app import HANDLERS, application, hello

async def work():
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, print)

def loop(environ, start_response, rest):
    asyncio.run(work())
    return hello(environ, start_response, rest)

HANDLERS["loop"] = loop
"""


def test_usr1_reopens_the_logs_of_a_process_whose_app_had_a_loop_that_handled_signals(start):
    """At its end it has Python write no signals to our pipe any more; our handler does, with t = 1
    when the slot has work."""
    server = start(
        "--error-logfile", "error", app="loop:application", files={"loop.py": LOOP},
        bind=("unix:here",), listening_in="error",
        config={"processes_per_replica": 1, "threads_per_process": 1},
    )  # fmt: skip
    (worker,) = server.workers
    assert server.get("/loop").status == 200
    (server.folder / "error").rename(server.folder / "error.1")
    server.tell(signal.SIGUSR1, worker)
    assert server.get("/hello").status == 200
    wait_for(lambda: files_of(worker) == {"error"}, "reopened")
