"""ready_file: there while readyz says 200.

That depends on the mode where processes become ready; the rest is up to dispatcher and supervisor.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal

import pytest
from server import IN_BOTH_MODES, wait_for
from test_hook_start import APP, COMMAND

from replica_plugin import ready_file
from replica_plugin.ready_file import ReadyFile

CONFIG = {"processes_per_replica": 2, "threads_per_process": 2, "ready_file": "ready"}


def shown(server):
    return (server.folder / "ready").exists()


@IN_BOTH_MODES
def test_the_file_is_there_once_all_processes_are_ready_and_not_before(start, stage):
    server = start(config=CONFIG, env={"HOLD_IMPORT": "1"}, ready=False)
    stage.next().finish()
    server.wait_numbers(processes=1)
    last = stage.next()
    assert not shown(server)
    last.finish()
    wait_for(lambda: shown(server), "the file")


def test_the_file_goes_first_when_the_replica_stops(start, stage):
    server = start(config=CONFIG)
    running = server.later("/hold/x")
    actor = stage.next()
    assert shown(server)
    server.tell(signal.SIGTERM)
    wait_for(lambda: not shown(server), "its end")
    actor.finish()
    assert running.result().status == 200
    assert server.process.wait(20) == 0
    assert not shown(server)


def test_the_file_goes_when_the_replica_ends_at_once(start):
    server = start(config=CONFIG)
    assert server.stop(signal.SIGQUIT) == 0
    assert not shown(server)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_file_goes_with_its_replica_though_the_dispatcher_cannot_remove_it(start, number):
    server = start(config=CONFIG)
    dispatcher = server.dispatcher
    server.tell(number, server.supervisor)
    server.tell(number, dispatcher)
    assert server.stop(signal.SIGQUIT) == 0
    assert not shown(server)


def test_the_file_goes_while_no_process_is_usable(start, stage):
    server = start(config={**CONFIG, "processes_per_replica": 1})
    server.tell(signal.SIGSTOP)  # so that there is no successor meanwhile
    (worker,) = server.workers
    server.tell(signal.SIGKILL, worker)
    wait_for(lambda: not shown(server), "its end")
    server.tell(signal.SIGCONT)
    wait_for(lambda: shown(server), "the file")


def test_a_file_left_behind_by_a_replica_that_was_killed_is_removed_at_the_next_start(start, stage):
    first = start(config=CONFIG)
    left = first.folder / "ready"
    wait_for(left.exists, "the file")
    family = [first.supervisor, first.dispatcher, *first.workers]
    first.tell(signal.SIGSTOP)
    for pid in [*family, first.process.pid]:  # whom each leaves behind cannot tidy up
        first.tell(signal.SIGKILL, pid)
    first.process.wait(20)
    assert left.exists()
    config = {**CONFIG, "ready_file": str(left)}
    start(config=config, env={"HOLD_IMPORT": "1"}, ready=False)
    actor = stage.next()
    assert not left.exists()
    actor.finish()
    stage.next().finish()
    wait_for(left.exists, "the file")


def test_a_second_start_that_finds_the_port_taken_leaves_the_file_of_the_one_that_serves(start):
    first = start(config=CONFIG)
    left = first.folder / "ready"
    wait_for(left.exists, "the file")
    written = left.stat().st_mtime_ns
    host, port = first.address
    files = {"replica.yaml": f"ready_file: {left}\n"}
    ended = start.to_its_end("--bind", f"{host}:{port}", files=files)
    assert f"Can't connect to ('{host}', {port})" in ended.output
    assert left.stat().st_mtime_ns == written  # nor has it come back


def test_a_file_left_behind_is_removed_before_the_app_is_loaded_in_the_master(start):
    app = "import os\nassert not os.path.exists('ready')\n" + APP
    config = {**CONFIG, "preload": True}
    server = start(config=config, files={"app.py": app, "ready": "4711\n"}, app="app:app")
    wait_for(lambda: _text(server.folder / "ready") == f"{server.process.pid}\n", "the file")


def test_a_file_that_is_not_ours_is_not_removed(start):
    server = start(config={**CONFIG, "ready_file": "log"})
    server.wait_log(f"ready_file {server.folder}/log cannot be kept: it is there, with text")
    assert server.stop() == 0
    assert "Shutting down" in server.log


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_left_alone_and_told_and_keeps_nobody_waiting(tmp_path, make):
    path, told = tmp_path / "ready", []
    make(path)
    file = ReadyFile(1, told.append)
    for ready in (False, True):
        file.show(str(path), ready, 0.0)
    assert told == [f"ready_file {path} cannot be kept: it is no regular file"]
    assert os.listdir(tmp_path) == ["ready"]


def test_a_file_with_other_text_is_left_alone_and_told_once_until_it_has_gone(tmp_path):
    path, told = tmp_path / "ready", []
    path.write_text("mine")
    file = ReadyFile(4711, told.append)
    for now, ready in enumerate([False, True, True, False, True]):
        file.show(str(path), ready, float(now))
    problem = (
        f"ready_file {path} cannot be kept: it is there, with text that is none of ours; "
        "remove it, or name another"
    )
    assert (told, path.read_text()) == ([problem], "mine")
    path.unlink()
    file.show(str(path), True, 5.0)
    assert path.read_text() == "4711\n"
    path.write_text("mine")
    file.show(str(path), True, 6.0)
    assert told == [problem, problem]


def test_an_empty_file_as_a_power_cut_leaves_it_is_ours(tmp_path):
    path, told = tmp_path / "ready", []
    path.touch()
    file = ReadyFile(4711, told.append)
    file.show(str(path), True, 0.0)
    assert path.read_text() == "4711\n"
    path.write_text("")
    file.show(str(path), False, 0.0)
    assert (os.listdir(tmp_path), told) == ([], [])


def test_a_file_of_another_master_is_left_to_it(tmp_path):
    path, told = tmp_path / "ready", []
    path.write_text("4712\n")
    file = ReadyFile(4711, told.append)
    for ready in (True, False):
        file.show(str(path), ready, 0.0)
    assert (path.read_text(), told) == ("4712\n", [])


def test_hup_takes_another_file(start):
    server = start(config=CONFIG)
    server.write_config({**CONFIG, "ready_file": "other"})
    server.tell(signal.SIGHUP)
    wait_for((server.folder / "other").exists, "the other")
    wait_for(lambda: not shown(server), "the end of the first")


def test_a_file_whose_text_finds_no_room_is_not_there_until_it_does(tmp_path, monkeypatch):
    told, path = [], tmp_path / "ready"
    file = ReadyFile(4711, told.append)
    (tmp_path / "ready.4711").touch()  # as one leaves it who is killed before it is written

    def full(fd, *_):
        os.close(fd)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ready_file, "open", full, raising=False)
        file.show(str(path), True, 1.0)
    assert told == [f"ready_file {path} cannot be kept: No space left on device"]
    assert os.listdir(tmp_path) == []
    file.show(str(path), True, 2.0)
    assert (os.listdir(tmp_path), path.read_text()) == (["ready"], "4711\n")


def test_a_replica_whose_folder_is_deleted_goes_on(start, tmp_path):
    server = start(config={"ready_file": "ready"})
    (old,) = server.workers
    shutil.rmtree(server.folder.rename(tmp_path / "gone"))  # where nobody makes the file anew
    server.tell(signal.SIGKILL, old)
    wait_for(lambda: server.workers not in ([], [old]), "another process")
    wait_for(lambda: server.get("/hello").status == 200, "it serves")


def test_a_file_that_cannot_be_written_is_told_and_serving_goes_on(start):
    server = start(config={**CONFIG, "ready_file": "none/ready"})
    path = os.path.join(server.folder, "none/ready")
    server.wait_log(f"ready_file {path} cannot be kept: No such file or directory")
    assert server.get("/hello").status == 200


def test_a_new_masters_file_is_not_removed_by_the_old_one_nor_lost_in_a_roll_back(start):
    server = start("--pid", "pid", config=CONFIG, command=COMMAND)
    server.tell(signal.SIGUSR2)
    server.wait_log("Replica: ", 2)
    new = int(wait_for(lambda: _text(server.folder / "pid.2"), "the new master's pidfile"))
    wait_for(lambda: len(server.children(new)) == 3, "the new master's family")
    server.tell(signal.SIGTERM, new)
    wait_for(lambda: new not in server.children(), "its end")
    wait_for(lambda: _text(server.folder / "ready") == f"{server.process.pid}\n", "the file")


def _text(path):
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("path", ["\ud800x", "a\0b"])
def test_a_name_that_no_file_can_have_is_complained_of(path):
    said: list[str] = []
    file = ReadyFile(1, said.append)
    for ready in (True, False):
        file.show(path, ready, 0.0)
    assert said == [f"ready_file {path!a} cannot be kept: no file can have such a name"]
