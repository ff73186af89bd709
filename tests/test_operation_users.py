"""Privileges: a master of root's whose helpers and processes are nobody's, and nobody's master."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path
from subprocess import PIPE

import pytest
from server import Server, wait_for
from stage import Stage
from test_hook_start import messages
from unprivileged import Install

TWO = {"processes_per_replica": 1, "threads_per_process": 2, "max_replica_concurrency": 3}


@pytest.fixture
def stage(install: Install):
    """A stage that nobody can reach."""
    stage = Stage(install.folder)
    os.chmod(stage.path, 0o777)
    yield stage
    stage.close()
    os.unlink(stage.path)


@pytest.fixture
def launch(install: Install, stage: Stage):
    servers = []

    def launch(*arguments, **options):
        folder = Path(tempfile.mkdtemp(dir=install.folder))
        os.chown(folder, install.uid, install.gid)
        env = {**install.env, "STAGE": stage.path, "HOME": str(folder)}
        options = {"config": TWO, "command": install.command, "env": env, **options}
        servers.append(Server(folder, *arguments, **options))
        return servers[-1]

    yield launch
    for server in servers:
        print(server.log)  # which is shown if the test has failed
        if server.process.poll() is None:
            server.kill()


def owner(pid):
    """Who a process runs as: real, effective and saved user, and group."""
    status = Path(f"/proc/{pid}/status").read_text()
    ids = [re.search(rf"^{name}:\s+(.*)$", status, re.M)[1].split()[:3] for name in ("Uid", "Gid")]
    return [{int(each) for each in line} for line in ids]


def everyone_else(server):
    return [server.supervisor, server.dispatcher, *server.workers]


def fill(server, stage):
    """Two running, one waiting."""
    pending = [server.later(f"/hold/{n}") for n in range(3)]
    actors = stage.take(2)
    server.wait_numbers(running=2, waiting=1)
    return pending, actors


def stops_gracefully(server, stage):
    """Whether TERM answers what runs and what waits, and all processes end."""
    pending, actors = fill(server, stage)
    everyone = [server.process.pid, *everyone_else(server)]
    server.tell(signal.SIGTERM)
    server.wait_log("Handling signal: term")
    for actor in actors:
        actor.finish()
    stage.next().finish()
    assert [each.result().status for each in pending] == [200, 200, 200]
    assert server.process.wait(20) == 0
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everyone), "all gone")


def soft_limit(pid):
    line = re.search(
        r"^Max open files +(\S+) +(\S+)", Path(f"/proc/{pid}/limits").read_text(), re.M
    )
    return line[1], line[2]


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "unix:here"])
def test_a_master_of_roots_has_helpers_and_processes_of_nobodys_and_stops_gracefully(
    launch, install, stage, bind
):
    server = launch("--user", "nobody", "--group", install.group, bind=(bind,))
    assert owner(server.process.pid) == [{0}, {0}]
    for pid in everyone_else(server):
        assert owner(pid) == [{install.uid}, {install.gid}]
    server.tell(signal.SIGHUP)
    server.wait_log("Replica: ", 2)
    server.tell(signal.SIGKILL, server.dispatcher)
    server.wait_log("restarting it")
    wait_for(lambda: len(server.workers) == 1, "one process")
    # A new dispatcher counts slots as busy, for the bound too, until it has heard of them.
    wait_for(lambda: server.get("/hello").status == 200, "the new dispatcher serves")
    server.wait_numbers(processes=1, slots=2, running=0)
    assert owner(server.dispatcher) == [{install.uid}, {install.gid}]
    stops_gracefully(server, stage)


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "unix:here"])
def test_a_whole_replica_of_nobodys_serves_and_stops_gracefully(launch, install, stage, bind):
    server = launch(bind=(bind,), user=install.uid, group=install.gid, extra_groups=[])
    for pid in [server.process.pid, *everyone_else(server)]:
        assert owner(pid) == [{install.uid}, {install.gid}]
    stops_gracefully(server, stage)


def test_the_dispatchers_limit_of_descriptors_is_the_hard_one_and_the_processes_keep_theirs(
    launch, install, stage
):
    command = ("prlimit", "--nofile=200:400", *install.command)
    server = launch(command=command, user=install.uid, group=install.gid, extra_groups=[])
    assert soft_limit(server.dispatcher) == ("400", "400")
    assert soft_limit(server.workers[0]) == ("200", "400")
    clients = [server.connect() for _ in range(240)]
    server.wait_numbers(connections=240)
    for client in clients:
        client.close()
    stops_gracefully(server, stage)


def test_logs_that_nobody_cannot_open_again_do_not_end_the_dispatcher(launch, install, stage):
    """A folder of root's: what root's master makes anew at USR1, nobody's processes cannot open."""
    logs = Path(install.folder.parent / "logs")
    logs.mkdir()
    server = launch(
        "--user", "nobody", "--access-logfile", str(logs / "access"),
    )  # fmt: skip
    pending, actors = fill(server, stage)
    dispatcher = server.dispatcher
    logs.chmod(0o700)
    (logs / "access").rename(logs / "access.1")
    server.tell(signal.SIGUSR1)
    why = rf"\[Errno 13\] Permission denied: '{logs}/access'"
    server.wait_log(rf"The dispatcher logs to stderr, since it cannot open its log: {why}")
    server.wait_log(f"Leaving, since the logs cannot be opened: {why}")
    server.tell(signal.SIGHUP)
    server.wait_log("Replica: ", 2)
    for actor in actors:
        actor.finish()
    stage.next().finish()
    assert [each.result().status for each in pending] == [200, 200, 200]
    assert server.dispatcher == dispatcher


def test_a_folder_nobody_may_write_in_is_enough(launch, install):
    folder = install.folder.parent / "read only"
    folder.mkdir(mode=0o555)
    server = launch(cwd=folder, config=None, user=install.uid, group=install.gid, extra_groups=[])
    assert server.get("/").body == b"hello\n"
    assert messages(server.log, "WARNING") == messages(server.log, "ERROR") == []
    server.stop()
    assert list(folder.iterdir()) == []


FLOOD = """
import array, socket, sys
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
for _ in range(10):
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 50))
    ours.sendmsg([b"flood"], [rights])
print("under way", flush=True)
sys.stdin.read()
"""


def test_requests_wait_while_another_program_of_nobodys_has_too_many_descriptors_under_way(
    launch, install
):
    command = ("prlimit", "--nofile=300:300", *install.command)
    nobody = {"user": install.uid, "group": install.gid, "extra_groups": []}
    server = launch(command=command, **nobody)
    flood = subprocess.Popen(
        [install.command[0], "-c", FLOOD], stdin=PIPE, stdout=PIPE, cwd="/", **nobody
    )
    try:
        assert flood.stdout.readline() == b"under way\n"
        waiting = server.later("/hello")
        server.wait_log("Requests wait, since none can be handed to a process: Too many references")
        server.wait_numbers(waiting=1, running=0)
        assert server.get("/-/readyz").status == 200
    finally:
        flood.communicate()
    assert waiting.result().status == 200
