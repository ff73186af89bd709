"""USR2, and apps that cannot be loaded."""

from __future__ import annotations

import signal
import time
from contextlib import suppress

import pytest
from server import OURS, STOCK, Pending, is_old, is_supervisor, wait_for
from test_hook_start import APP, COMMAND, IMPORT
from test_loading import NO_FORK

from replica_plugin import ready_mark

BROKEN_APPS = {
    "no module": ("missing:app", {}, 3, "ModuleNotFoundError: No module named 'missing'"),
    "no attribute": (
        "app:none", {"app.py": APP}, 4, "Failed to find attribute 'none' in 'app'.",
    ),
    "an error": ("app:app", {"app.py": "1 / 0"}, 3, "ZeroDivisionError: division by zero"),
    "not callable": ("app:app", {"app.py": "app = 1"}, 4, "Application object must be callable."),
    "exits": ("app:app", {"app.py": "raise SystemExit(3)"}, 3, "Worker failed to boot."),
}  # fmt: skip


@pytest.mark.parametrize("base", [OURS, STOCK], ids=["ours", "stock"])
@pytest.mark.parametrize("name", BROKEN_APPS)
def test_an_app_that_cannot_be_loaded_ends_gunicorn_with_its_own_message(start, name, base):
    app, files, code, message = BROKEN_APPS[name]
    ended = start.to_its_end(app=(app,), files=files, base=base)
    assert ended.code == (code if base == STOCK else 3)
    assert message in ended.output
    if base == OURS:
        assert "The app cannot be loaded\nTraceback (most recent call last):\n" in ended.output
    start.wait_nothing_left()


@pytest.mark.parametrize("base", [OURS, STOCK], ids=["ours", "stock"])
def test_an_app_that_cannot_be_preloaded_ends_gunicorn_before_it_listens(start, base):
    ended = start.to_its_end("--preload", app=("app:app",), files={"app.py": "1 / 0"}, base=base)
    assert (ended.code, ended.listened) == (1, False)
    assert "ZeroDivisionError: division by zero" in ended.output
    start.wait_nothing_left()


def test_a_new_master_serves_beside_the_old_one_and_no_request_fails(start, stage):
    config = {"processes_per_replica": 2, "threads_per_process": 2}
    server = start("--pid", "pid", config=config, command=COMMAND)
    ask = Asking(server)
    held = server.later("/hold/old")
    actor = stage.next()
    old = server.process.pid
    server.tell(signal.SIGUSR2)
    new = int(wait_for(lambda: _text(server.folder / "pid.2"), "the new master's pidfile"))
    server.wait_log("Replica: ", 2)
    wait_for(lambda: len(_workers(server, new)) == 2, "the new master's workers")
    # One request that a process of the new master has answered.
    wait_for(lambda: server.get("/numbers").json["pid"] in _workers(server, new), "it serves")
    server.tell(signal.SIGTERM)
    wait_for(lambda: "Handling signal: term" in server.log, "the old one stops")
    actor.finish()
    assert held.result().status == 200
    assert server.process.wait(20) == 0
    wait_for(lambda: _text(server.folder / "pid") == f"{new}\n", "the new one is promoted")
    assert ask.stop() == {200}
    assert server.get("/").status == 200
    server.tell(signal.SIGTERM, new)
    start.wait_nothing_left()
    assert old != new


def test_a_new_master_that_is_stopped_leaves_the_old_one_as_it_was(start):
    server = start("--pid", "pid", command=COMMAND)
    ask = Asking(server)
    server.tell(signal.SIGUSR2)
    new = int(wait_for(lambda: _text(server.folder / "pid.2"), "the new master's pidfile"))
    server.wait_log("Replica: ", 2)
    wait_for(lambda: server.get("/numbers").json["pid"] in _workers(server, new), "it serves")
    server.tell(signal.SIGTERM, new)
    wait_for(lambda: not (server.folder / "pid.2").exists(), "the new one gone")
    wait_for(lambda: new not in server.children(), "the new one gone")
    assert ask.stop() == {200}
    assert server.get("/numbers").json["pid"] in server.workers
    server.wait_numbers(processes=1)


def upgrade_to_one_that_loads(start):
    """The server, and the pid of a new master whose process loads until `held` is gone."""
    held = "import os, time\nwhile os.path.exists('held'):\n    time.sleep(0.01)\n"
    server = start("--pid", "pid", files={"app.py": held + APP}, app="app:app", command=COMMAND)
    (server.folder / "held").touch()
    server.tell(signal.SIGUSR2)
    new = int(wait_for(lambda: _text(server.folder / "pid.2"), "the new master's pidfile"))
    wait_for(lambda: len(_workers(server, new)) == 1, "the new master's worker")
    return server, new


def test_until_a_new_master_has_processes_the_old_one_takes_all_that_comes(start):
    """And nothing is lost with the new one, whose app may not load at all."""
    server, new = upgrade_to_one_that_loads(start)
    (supervisor,) = (pid for pid in server.children(new) if is_supervisor(pid))
    wait_for(lambda: server.children(supervisor), "the new master's dispatcher")
    assert {server.get("/").status for _ in range(50)} == {200}
    server.tell(signal.SIGTERM, new)
    wait_for(lambda: new not in server.children(), "the new one gone")
    assert {server.get("/").status for _ in range(50)} == {200}


def test_a_new_master_that_is_left_alone_before_its_app_is_loaded_listens_at_once(start):
    """And so does a dispatcher that is born while all that it has is busy."""
    server, new = upgrade_to_one_that_loads(start)
    server.tell(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert server.get("/-/readyz").status == 503
    (server.folder / "held").unlink()
    wait_for(lambda: server.get("/-/readyz").status == 200, "ready")
    server.tell(signal.SIGTERM, new)
    start.wait_nothing_left()


def test_a_new_master_that_cannot_be_started_leaves_the_old_one_as_it_was(start):
    failing = IMPORT + "def pre_exec(server):\n    1 / 0\n"
    server = start(base=(), files={"gunicorn.conf.py": failing})
    family = [server.supervisor, server.dispatcher, *server.workers]
    server.tell(signal.SIGUSR2)
    server.wait_log(r"\[ERROR\] The new master cannot be started\nTraceback")
    wait_for(lambda: len(server.children()) == 2, "its end")
    assert server.get("/hello").status == 200
    assert [server.supervisor, server.dispatcher, *server.workers] == family


def test_a_new_master_that_cannot_be_forked_leaves_the_old_one_as_it_was(start):
    """For want of processes, or memory."""
    server = start("--pid", "pid", base=(), files={"gunicorn.conf.py": NO_FORK}, command=COMMAND)
    family = [server.supervisor, server.dispatcher, *server.workers]
    (server.folder / "full").touch()
    server.tell(signal.SIGUSR2)
    server.wait_log(
        "The new master cannot be started: BlockingIOError.11, 'Resource temporarily una.*. "
        "This one serves on: send USR2 again"
    )
    assert server.get("/hello").status == 200
    assert [server.supervisor, server.dispatcher, *server.workers] == family
    (server.folder / "full").unlink()
    server.tell(signal.SIGUSR2)
    new = int(wait_for(lambda: _text(server.folder / "pid.2"), "the new master's pidfile"))
    server.tell(signal.SIGTERM, new)
    wait_for(lambda: new not in server.children(), "its end")


def start_daemon(start, **options):
    """The server, and the pid of its master: gunicorn heeds WINCH only as a daemon."""
    arguments = ("--daemon", "--pid", "pid", "--error-logfile", "error")
    config = {"processes_per_replica": 1, "threads_per_process": 1}
    server = start(
        *arguments, bind=("unix:here",), listening_in="error", ready=False, config=config,
        command=COMMAND, **options,
    )  # fmt: skip
    return server, int(wait_for(lambda: _text(server.folder / "pid").strip(), "the pidfile"))


@pytest.mark.parametrize("back", [signal.SIGHUP, signal.SIGTTIN], ids=["hup", "ttin"])
def test_winch_finishes_what_has_come_and_processes_come_back(start, stage, back):
    """The way back from an upgrade."""
    server, master = start_daemon(start)
    try:
        idle = server.connect()
        assert idle.get("/hello").status == 200
        running, waiting = (server.connect().ask(f"/hold/{n}") for n in range(2))
        actor = stage.next()
        server.tell(signal.SIGWINCH, master)
        assert idle.is_closed()
        assert len(_workers(server, master)) == 1
        actor.finish()
        stage.next().finish()
        replies = [client.reply() for client in (running, waiting)]
        assert [reply.status for reply in replies] == [200, 200]
        wait_for(lambda: not _workers(server, master), "the end of the process")
        late = server.connect().ask("/hello")  # left to another master, if there is one
        server.tell(back, master)
        assert late.reply().status == 200
    finally:
        server.tell(signal.SIGTERM, master)
    start.wait_nothing_left()


def test_what_waits_in_a_pause_is_refused_when_the_last_process_has_died(start, stage):
    server, master = start_daemon(start)
    try:
        running, waiting = (server.connect().ask(f"/hold/{n}") for n in range(2))
        actor = stage.next()
        server.tell(signal.SIGWINCH, master)
        server.tell(signal.SIGKILL, actor.pid)
        assert running.reply().status == 502
        assert waiting.reply().status == 503
        late = server.connect().ask("/hello")
        server.tell(signal.SIGHUP, master)
        assert late.reply().status == 200
    finally:
        server.tell(signal.SIGTERM, master)
    start.wait_nothing_left()


HELD = """
import os, time
while os.path.exists("held" + os.environ.get("GUNICORN_PID", "")):
    time.sleep(0.01)
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "1")])
    return [b"2" if "GUNICORN_PID" in os.environ else b"1"]
"""
"""Its app is loaded when `held` is gone, or for the new master `held` with the old one's pid."""


@pytest.fixture
def upgraded(start):
    """Upgrade a server, to one that does not load if it is `held`: it, and the masters' pids."""
    server, old = start_daemon(start, files={"app.py": HELD}, app="app:app")
    masters = [old]

    def upgrade(held=False):
        assert server.get("/").body == b"1"
        if held:
            (server.folder / f"held{old}").touch()
        server.tell(signal.SIGUSR2, old)
        masters.append(int(wait_for(lambda: _text(server.folder / "pid.2"), "its pidfile")))
        wait_for(lambda: _workers(server, masters[1]), "the new master's worker")
        return server, *masters

    yield upgrade
    for master in masters:
        with suppress(ProcessLookupError):
            server.tell(signal.SIGTERM, master)
    start.wait_nothing_left()


def pause_and_return(server, old, new):
    """Until its process is gone, and then another is there, which may still load."""
    server.tell(signal.SIGWINCH, old)
    wait_for(lambda: _workers(server, old) == [new], "the end of its process")
    late = server.connect().ask("/")
    server.tell(signal.SIGHUP, old)
    wait_for(lambda: len(_workers(server, old)) == 2, "another process")
    return late


def dispatcher_of(server, master):
    (supervisor,) = (pid for pid in server.children(master) if is_supervisor(pid))
    return wait_for(lambda: server.children(supervisor), "its dispatcher")[0]


def test_on_the_way_back_connections_are_the_new_masters_until_the_old_one_can_serve(upgraded):
    server, old, new = upgraded()
    wait_for(lambda: server.get("/").body == b"2", "the new one serves")
    (server.folder / "held").touch()
    assert pause_and_return(server, old, new).reply().body == b"2"
    assert {server.get("/").body for _ in range(50)} == {b"2"}
    first = dispatcher_of(server, old)
    server.tell(signal.SIGKILL, first)
    wait_for(lambda: dispatcher_of(server, old) != first, "another dispatcher")
    assert {server.get("/").body for _ in range(50)} == {b"2"}
    # And the other way round: the one that serves stays so.
    first = dispatcher_of(server, new)
    server.tell(signal.SIGKILL, first)
    wait_for(lambda: dispatcher_of(server, new) != first, "another dispatcher")
    assert {server.get("/").body for _ in range(50)} == {b"2"}
    server.tell(signal.SIGTERM, new)
    wait_for(lambda: new not in server.children(old), "its end")
    assert server.get("/-/readyz").status == 503
    late = server.connect().ask("/")
    (server.folder / "held").unlink()
    assert late.reply().body == b"1"


def test_a_new_master_that_never_serves_does_not_keep_the_old_one_from_it(upgraded):
    assert pause_and_return(*upgraded(held=True)).reply().body == b"1"


HALF_READY = """
import os, threading, time
from replica_plugin import Replica
def tell():
    while Replica().stats().processes != 1:
        time.sleep(0.01)
    open("half", "w").close()
if "GUNICORN_PID" in os.environ:
    try:
        os.close(os.open("first", os.O_CREAT | os.O_EXCL))
        threading.Thread(target=tell, daemon=True).start()
    except FileExistsError:
        while os.path.exists("held"):
            time.sleep(0.01)
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "1")])
    return [b"2" if "GUNICORN_PID" in os.environ else b"1"]
"""
"""The new master's first process says when it can be used; others load until `held` is gone."""


def test_until_all_processes_of_a_new_master_are_ready_the_old_one_takes_all_that_comes(start):
    files, config = {"app.py": HALF_READY, "held": ""}, {"processes_per_replica": 2}
    server = start("--pid", "pid", files=files, config=config, app="app:app", command=COMMAND)
    server.tell(signal.SIGUSR2)
    new = int(wait_for(lambda: _text(server.folder / "pid.2"), "the new master's pidfile"))
    wait_for((server.folder / "half").exists, "one of its two processes can be used")
    assert {server.get("/-/readyz").status for _ in range(50)} == {200}
    assert {server.get("/").body for _ in range(50)} == {b"1"}
    (server.folder / "held").unlink()
    wait_for(lambda: server.get("/").body == b"2", "the new one serves")
    assert {server.get("/-/readyz").status for _ in range(50)} == {200}
    server.tell(signal.SIGTERM, new)
    wait_for(lambda: new not in server.children(), "its end")


DRAINS = {
    "files": {"app.py": HELD},
    "app": "app:app",
    "config": {"drain_delay": "600s"},
    "command": COMMAND,
}


def upgrade_to_one_that_is_ready(start):
    server = start("--pid", "pid", **DRAINS)
    server.tell(signal.SIGUSR2)
    new = int(wait_for(lambda: _text(server.folder / "pid.2"), "the new master's pidfile"))
    for master in (server.process.pid, new):
        wait_for(lambda master=master: ready_mark.is_shown(master), "both serve")
    return server, new


def test_a_master_that_stops_beside_one_that_is_ready_leaves_it_the_port_without_drain_delay(start):
    server, new = upgrade_to_one_that_is_ready(start)
    server.tell(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert server.get("/-/readyz").status == 200
    server.tell(signal.SIGQUIT, new)
    start.wait_nothing_left()


def test_a_new_master_that_stops_beside_the_old_one_leaves_it_the_port_without_drain_delay(start):
    server, new = upgrade_to_one_that_is_ready(start)
    server.tell(signal.SIGTERM, new)
    wait_for(lambda: new not in server.children(), "its end")
    assert {server.get("/-/readyz").status for _ in range(50)} == {200}


def test_beside_one_that_still_loads_drain_delay_lasts_until_that_one_is_ready(start):
    server = start("--pid", "pid", **DRAINS)
    held = server.folder / f"held{server.process.pid}"
    held.touch()
    server.tell(signal.SIGUSR2)
    server.tell(signal.SIGTERM)
    wait_for(lambda: server.get("/-/readyz").status == 503, "the old one is to stop")
    assert {server.get("/").body for _ in range(50)} == {b"1"}
    new = int(wait_for(lambda: _text(server.folder / "pid.2"), "the new master's pidfile"))
    held.unlink()
    assert server.process.wait(20) == 0
    assert server.get("/").body == b"2"
    server.tell(signal.SIGQUIT, new)
    start.wait_nothing_left()


def test_of_two_masters_that_are_told_to_stop_the_last_keeps_to_drain_delay(start):
    """Or whoever is sent here still would meet nobody. The last one to look sees that."""
    server, new = upgrade_to_one_that_is_ready(start)
    server.tell(signal.SIGSTOP, new)
    server.tell(signal.SIGTERM, new)
    server.tell(signal.SIGTERM)
    assert server.process.wait(20) == 0
    server.tell(signal.SIGCONT, new)
    wait_for(lambda: server.get("/-/readyz").status == 503, "the new one is to stop")
    assert server.get("/").body == b"2"
    server.tell(signal.SIGQUIT, new)
    start.wait_nothing_left()


PAUSE = 0.01  # leaves the processors to those who boot


class Asking:
    """Somebody who asks all the time, on new connections and on one that is kept."""

    def __init__(self, server):
        self._server = server
        self._done = False
        self._pending = [Pending(self._on_new_ones), Pending(self._on_kept_ones)]

    def _on_new_ones(self):
        seen = set()
        while not self._done:
            seen.add(self._server.get("/").status)
            time.sleep(PAUSE)
        return seen

    def _on_kept_ones(self):
        seen = set()
        while not self._done:
            with self._server.connect() as client:
                kept = True
                while kept and not self._done:
                    reply, used = client.get("/"), time.monotonic()
                    seen.add(reply.status)
                    time.sleep(PAUSE)
                    kept = reply.headers["Connection"] == "keep-alive" and not is_old(used)
        return seen

    def stop(self):
        """All statuses that were seen; raises what a request raised."""
        self._done = True
        return set.union(*(each.result() for each in self._pending))


def _workers(server, master):
    return [pid for pid in server.children(master) if not is_supervisor(pid)]


def _text(path):
    return path.read_text() if path.exists() else ""
