"""Where and how it is started: folders, paths, daemons; and what it must not import."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import gunicorn
import pytest
from server import GUNICORN, OURS, TESTS, Client, environment, wait_for
from stage import PATIENCE
from test_hook_start import APP, COMMAND

import replica_plugin

TRAP = """
import os, sys
open(os.environ["TRAPPED"], "a").write(f"{__name__} in {sys.argv}\\n")
raise ImportError("a trap")
"""
TRAPS = (
    "queue", "json", "socket", "select", "struct", "marshal", "mmap", "zlib", "array", "resource",
    "fcntl", "signal", "logging", "dataclasses", "typing", "gunicorn", "replica_plugin", "yaml",
)  # fmt: skip


_UNTRAPPED = (
    sys.executable,
    "-c",
    "import sys; sys.path.remove('') if '' in sys.path else None\n"
    "import gunicorn.app.wsgiapp, gunicorn.http.wsgi, gunicorn.workers.base\n"
    "import replica_plugin.conf, replica_plugin.worker\n"
    "import replica_plugin.master\n"
    "del sys.modules['replica_plugin.conf']\n"
    "sys.argv[0] = 'gunicorn'\n"
    "gunicorn.app.wsgiapp.run()",
)


def test_the_supervisor_imports_nothing_of_the_users(start, tmp_path):
    """The traps are set for the supervisor alone: the master has imported these names before."""
    folder = tmp_path / "traps"
    folder.mkdir()
    for name in TRAPS:
        (folder / f"{name}.py").write_text(TRAP)
    (folder / "app.py").write_text(APP)
    server = start(
        app="app:app",
        cwd=folder,
        command=_UNTRAPPED,
        env={"TRAPPED": str(tmp_path / "trapped"), "PYTHONPATH": None},
    )
    assert server.get("/").body == b"here"
    server.tell(signal.SIGKILL, server.dispatcher)
    server.wait_log("restarting it")
    server.wait_numbers(processes=1)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONSAFEPATH": "1"},
        {"PYTHONPATH": f":{TESTS}:/nowhere:.:"},
        {"PYTHONPATH": None, "PYTHONNOUSERSITE": "1"},
        {"PYTHONOPTIMIZE": "2"},
        {"PYTHONWARNINGS": "error::DeprecationWarning:replica_plugin"},
    ],
    ids=lambda env: next(iter(env)),
)
def test_pythons_variables_do_no_harm(start, env):
    server = start(files={"app.py": APP}, app="app:app", env=env, command=COMMAND)
    assert server.get("/").body == b"here"
    assert "Traceback" not in server.log


def test_what_python_may_not_write_the_supervisor_does_not_write_either(start, tmp_path):
    """The supervisor takes no variables of Python's, and must still not leave compiled files."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for package in (replica_plugin, gunicorn):
        where = Path(package.__file__).parent
        subprocess.run(["cp", "-r", where, packages / where.name], check=True)
    for cache in packages.rglob("__pycache__"):
        subprocess.run(["rm", "-r", cache], check=True)
    start(env={"PYTHONPATH": f"{packages}:{TESTS}", "PYTHONDONTWRITEBYTECODE": "1"})
    assert list(packages.rglob("__pycache__")) == []


def test_a_path_with_spaces_and_worse_works(start, tmp_path):
    folder = tmp_path / "a 'b' \"c\" $d é"
    folder.mkdir()
    (folder / "app.py").write_text(APP)
    (folder / "replica.yaml").write_text("processes_per_replica: 2\n")
    server = start(app="app:app", cwd=folder, base=("-c", "python:replica_plugin.conf"))
    assert server.get("/").body == b"here"
    server.wait_numbers(processes=2)


def test_with_chdir_the_settings_are_those_of_the_folder_it_was_started_in(start, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "app.py").write_text(APP)
    (elsewhere / "replica.yaml").write_text("processes_per_replica: 5\n")
    server = start("--chdir", str(elsewhere), app="app:app", config={"processes_per_replica": 2})
    server.wait_numbers(processes=2)
    assert server.get("/").body == b"here"


def test_an_app_that_is_preloaded_is_imported_once_and_not_by_the_helpers(start):
    note = "import os\nopen('imported', 'a').write(f'{os.getpid()}\\n')\n"
    server = start(
        "--preload", files={"app.py": note + APP}, app="app:app",
        config={"processes_per_replica": 2, "threads_per_process": 2},
    )  # fmt: skip
    server.wait_numbers(processes=2)
    assert (server.folder / "imported").read_text() == f"{server.process.pid}\n"
    maps = Path(f"/proc/{server.dispatcher}/maps").read_text()
    assert "yaml" not in maps


# Daemon.


def test_a_daemon_serves_reloads_and_stops_by_its_pidfile(start):
    options = ("--daemon", "--pid", "pid", "--error-logfile", "error")
    folder = start.folder("daemon")
    (folder / "app.py").write_text(APP)
    line = [*COMMAND, *OURS, "--bind", "unix:here", *options, "app:app"]
    env = environment(start.environment)
    subprocess.run(line, cwd=folder, env=env, check=True, timeout=20)
    pid = int(wait_for(lambda: _text(folder / "pid").strip(), "the pidfile"))
    try:
        wait_for(lambda: b"here" in _answer(folder), "an answer")
        os.kill(pid, signal.SIGHUP)
        wait_for(lambda: _text(folder / "error").count("Replica: ") == 2, "reloaded")
        assert b"here" in _answer(folder)
    finally:
        os.kill(pid, signal.SIGTERM)
    start.wait_nothing_left()
    left = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert left == {"app.py", "error"}
    assert "ERROR" not in _text(folder / "error")


def _text(path):
    return path.read_text() if path.exists() else ""


def _answer(folder):
    try:
        with Client(str(folder / "here")) as client:
            return client.get("/").body
    except OSError:
        return b""


# Nothing is started, nothing is left.


@pytest.mark.parametrize("option", ["--check-config", "--print-config"])
def test_looking_at_the_configuration_starts_nothing_and_leaves_nothing(start, option):
    ended = start.to_its_end(option, env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert ended.code == 0
    assert not ended.listened
    assert list(ended.folder.iterdir()) == []
    lines = [line.split() for line in ended.output.splitlines()]
    wanted = ["worker_class", "=", "replica_plugin.thread_worker.ThreadWorker"]
    assert (wanted in lines) == (option == "--print-config")


def test_check_config_tells_of_a_broken_yaml(start):
    ended = start.to_its_end("--check-config", files={"replica.yaml": "mode: x\n"})
    assert (ended.code, ended.output) == (
        1, '\nreplica.yaml:1: mode: must be thread or gevent (got "x")\n\n',
    )  # fmt: skip


def test_ctrl_c_ends_everything_at_once_while_requests_run_and_wait(start, stage):
    server = start(
        config={"processes_per_replica": 2, "threads_per_process": 2}, start_new_session=True
    )
    clients = [server.connect().ask(f"/hold/{n}") for n in range(6)]
    actors = stage.take(4)
    server.wait_numbers(waiting=2, running=4)
    everyone = {server.process.pid, *server.children(), server.dispatcher}
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(PATIENCE) == 0
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everyone), "all gone")
    assert all(actor.vanished() for actor in actors)
    assert all(client.is_closed() for client in clients)
    assert "Traceback" not in server.log


def test_a_master_that_is_killed_leaves_nothing_behind(start, stage):
    server = start(config={"processes_per_replica": 2})
    everyone = [*server.children(), server.dispatcher]
    running = server.later("/hold/x")
    actor = stage.next()
    server.tell(signal.SIGKILL)
    server.process.wait()
    server.wait_log("The master is gone: finishing what is in flight, then leaving")
    actor.finish()
    assert running.result().status == 200
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everyone), "all gone")


def test_sockets_that_systemd_opened_are_served(start):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        command = (
            "sh", "-c", 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 0</dev/null', "sh", *GUNICORN,
        )  # fmt: skip
        server = start(command=command, stdin=listener.fileno(), bind=())
        assert server.address == listener.getsockname()
        assert server.get("/").status == 200
        server.stop()
        # systemd's socket stays open, for the next one.
        with socket.socket() as client:
            client.connect(listener.getsockname())
