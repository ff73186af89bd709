"""P7: the replica stops, one of its processes does, or it takes new settings."""

from __future__ import annotations

import http.client
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import which_by_mode
from server import BOTH, IN_BOTH_MODES, STOCK, Load, Pending, Server, wait_for
from stage import Stage

pytestmark = IN_BOTH_MODES
which = which_by_mode

TWO = {"processes_per_replica": 2, "threads_per_process": 2}


@pytest.fixture
def stage(start) -> Stage:
    return start.stage


def holds(server: Server, stage: Stage, count: int) -> bool:
    """So many requests, and no more, run at once."""
    clients = [server.connect().ask("/hold/x") for _ in range(count + 1)]
    actors = stage.take(count)
    server.wait_numbers(running=count, waiting=1)
    empty = stage.is_empty()
    for actor in actors:
        actor.finish()
    stage.next().finish()
    return empty and {client.reply().status for client in clients} == {200}


def test_term_answers_what_runs_what_waits_and_what_has_begun_to_come(start, stage, which):
    server = start(config=TWO, bind=BOTH)
    clients = [server.connect(which).ask("/hold/x") for _ in range(10)]
    half = server.connect(which).send("GET /hello HTTP/1.1\r\nHo")
    actors = stage.take(4)
    server.wait_numbers(running=4, waiting=6, connections=11)
    server.tell(signal.SIGTERM)
    server.wait_closed()
    for _ in range(6):
        actors.append(stage.next()) if actors.pop(0).finish() is None else None
    half.send("st: test\r\n\r\n")
    for actor in actors:
        actor.finish()
    assert [client.reply().status for client in [*clients, half]] == [200] * 11
    assert server.stop() == 0
    assert not os.path.exists(server.addresses[1])


def test_a_process_without_work_leaves_before_the_end_of_a_stop(start, stage):
    """And is not killed, though another still sends."""
    config = {"processes_per_replica": 3, "threads_per_process": 1}
    server = start("--graceful-timeout", "4", config=config)
    dispatcher = server.dispatcher
    begun, held = (server.connect().ask(path) for path in ("/begun/x", "/hold/x"))
    actors = stage.take(2)
    (idle,) = set(server.workers) - {actor.pid for actor in actors}
    server.tell(signal.SIGTERM)
    server.wait_closed()
    server.tell(signal.SIGSTOP)  # else it would soon kill who still sends
    assert held.reply().status == 503
    server.tell(signal.SIGSTOP, dispatcher)  # else its end would tell the idle one to leave
    wait_for(lambda: idle not in server.workers, "the end of the idle process")
    for actor in actors:
        actor.finish()
    assert begun.reply().status == 200
    for pid in (dispatcher, server.process.pid):
        server.tell(signal.SIGCONT, pid)
    assert server.stop() == 0


def test_stock_gunicorn_resets_a_request_that_has_begun_to_come(start, stage):
    """The control: gthread, whatever the mode."""
    server = start("--threads", "2", "--graceful-timeout", "1", base=STOCK)
    held = [server.connect().ask("/hold/x") for _ in range(2)]
    actors = stage.take(2)
    half = server.connect().send("GET /hello HTTP/1.1\r\nHo")
    server.tell(signal.SIGTERM)
    assert half.is_closed()
    for client, actor in zip(held, actors):
        assert actor.vanished()
        client.close()


def test_term_ends_idle_and_silent_connections(start, which):
    server = start("--keep-alive", "60", config=TWO, bind=BOTH)
    with server.connect(which) as idle, server.connect(which) as silent:
        assert idle.get("/hello").status == 200
        server.wait_numbers(connections=2)
        assert server.stop() == 0
        assert idle.is_closed() and silent.is_closed()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_int_and_quit_end_at_once_whatever_runs(start, stage, which, number):
    server = start("--graceful-timeout", "600", config=TWO, bind=BOTH)
    clients = [server.connect(which).ask("/hold/x") for _ in range(6)]
    actors = stage.take(4)
    server.wait_numbers(running=4, waiting=2)
    assert server.stop(number) == 0
    assert [actor.vanished() for actor in actors] == [True] * 4
    for client in clients:
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            client.reply()


def test_quit_ends_processes_that_do_not_heed_it_long_before_graceful_timeout(start):
    """As with an app that ignores signals, or keeps the GIL."""
    server = start("--graceful-timeout", "600", config=TWO)
    for pid in server.workers:
        server.tell(signal.SIGSTOP, pid)
    assert server.stop(signal.SIGQUIT) == 0


def test_quit_hurries_a_stop_that_waits(start, stage):
    server = start("--graceful-timeout", "600", config=TWO)
    client = server.connect().ask("/hold/x")
    actor = stage.next()
    server.tell(signal.SIGTERM)
    server.wait_closed()
    assert not client.is_readable()
    assert server.stop(signal.SIGQUIT) == 0
    assert actor.vanished()


def test_quit_ends_at_once_during_a_reload_whose_old_processes_are_busy(start, stage):
    server = start("--graceful-timeout", "600", config=TWO)
    clients = [server.connect().ask("/hold/x") for _ in range(4)]
    actors = stage.take(4)
    old = server.workers
    server.tell(signal.SIGHUP)
    wait_for(lambda: len(server.workers) == 4, "the successors")
    assert server.stop(signal.SIGQUIT) == 0
    assert [actor.vanished() for actor in actors] == [True] * 4
    assert {actor.pid for actor in actors} == set(old)
    for client in clients:
        client.close()


def test_what_cannot_be_answered_in_graceful_timeout_is_told_so_before_it_ends(start, stage, which):
    """What runs, what waits and what has come in part; but nothing that has begun its response."""
    server = start("--graceful-timeout", "4", config=TWO, bind=BOTH)
    begun = server.connect(which).ask("/begun/x")
    actors = [stage.next()]
    running = [server.connect(which).ask("/hold/x") for _ in range(3)]
    actors += stage.take(3)
    waiting = [server.connect(which).ask("/hold/x") for _ in range(2)]
    half = server.connect(which).send("GET /hello HTTP/1.1\r\nHo")
    server.wait_numbers(running=4, waiting=2, connections=7)
    server.tell(signal.SIGTERM)
    server.wait_closed(which)
    server.tell(signal.SIGSTOP)  # else it would soon kill who has begun
    replies = [client.reply() for client in [*running, *waiting, half]]
    assert [reply.status for reply in replies] == [503] * 6
    late, no_slot = b"this request was not done in time", b"no slot became free in time"
    texts = [late] * 3 + [no_slot] * 2 + [late]
    assert [text in reply.body for reply, text in zip(replies, texts, strict=True)] == [True] * 6
    for actor in actors:
        actor.finish()
    assert begun.reply().body == b"somemore"
    assert all(client.is_closed() for client in running)
    server.tell(signal.SIGCONT)
    assert server.process.wait(20) == 0
    assert "Traceback" not in server.log


def test_a_request_that_runs_on_after_its_stop_was_answered_ends_with_its_process(start, stage):
    server = start("--graceful-timeout", "4", config=TWO)
    client = server.connect().ask("/hold/x")
    actor = stage.next()
    server.tell(signal.SIGTERM)
    server.wait_closed()
    server.tell(signal.SIGSTOP)  # else it would soon kill who has not answered
    assert client.reply().status == 503
    server.tell(signal.SIGCONT)
    assert server.process.wait(20) == 0
    assert actor.vanished()


def test_what_lies_in_the_backlog_when_term_comes_is_answered(start, which):
    server = start(config=TWO, bind=BOTH)
    dispatcher = server.dispatcher
    server.tell(signal.SIGSTOP, dispatcher)
    clients = [server.connect(which).ask("/hello") for _ in range(20)]
    server.tell(signal.SIGTERM)
    server.wait_log("Handling signal: term")
    server.tell(signal.SIGCONT, dispatcher)
    assert {client.reply().status for client in clients} == {200}
    assert all(client.is_closed() for client in clients)
    assert server.process.wait(20) == 0


def test_a_connection_that_was_silent_when_term_came_has_a_second_to_send(start, which):
    assert any(is_answered_if_it_sends_in_time(start, which) for _ in range(5))


def is_answered_if_it_sends_in_time(start, which: int) -> bool:
    """Whether it did: the machine may stand still."""
    server = start(config=TWO, bind=BOTH)
    with server.connect(which) as client:
        server.wait_numbers(connections=1)
        began = time.monotonic()
        server.tell(signal.SIGTERM)
        server.wait_log("Handling signal: term")
        with suppress(BrokenPipeError, ConnectionResetError):
            client.ask("/hello")
        in_time = time.monotonic() - began < 1
        if in_time:
            assert client.reply().status == 200
            assert client.is_closed()
    assert server.process.wait(20) == 0
    return in_time


def test_clients_that_come_while_the_replica_stops_are_answered_or_refused_never_reset(
    start, which
):
    server = start(config=TWO, bind=BOTH)
    knocking = [Pending(lambda: knock(server, which)) for _ in range(16)]
    wait_for(lambda: server.numbers().connections > 4, "a crowd")
    server.tell(signal.SIGTERM)
    assert set().union(*(each.result() for each in knocking)) == {200}
    assert server.process.wait(20) == 0


def knock(server: Server, which: int) -> set[int]:
    """Ask on new connections until one is refused; raises what else happens."""
    seen = set()
    while True:
        try:
            seen.add(server.get("/hello", which).status)
        except (ConnectionRefusedError, FileNotFoundError):
            return seen


HELD = """
import os, signal

def hold():
    if os.path.exists("hold"):
        os.kill(os.getpid(), signal.SIGSTOP)

os.register_at_fork(after_in_child=hold)
from replica_plugin.conf import *
"""


def test_term_to_a_process_that_has_just_been_forked_is_not_lost(start):
    server = start(config=TWO, base=("-c", "conf.py"), files={"conf.py": HELD})
    old, dispatcher = server.workers, server.dispatcher
    (server.folder / "hold").touch()
    server.tell(signal.SIGHUP)
    wait_for(lambda: len(server.workers) == 4, "successors")
    new = set(server.workers) - set(old)
    server.tell(signal.SIGTERM)
    wait_for(lambda: all(map(is_told_to_end, new)), "TERM to all")
    wait_for(lambda: not os.path.exists(f"/proc/{dispatcher}"), "the dispatcher's end")
    (server.folder / "hold").unlink()  # the reload has brought the hook once more
    for pid in new:
        server.tell(signal.SIGCONT, pid)
    assert server.process.wait(20) == 0


MASKS = """
import signal
from replica_plugin.conf import *

def note(name):
    with open("masks", "a") as file:
        print(name, *signal.pthread_sigmask(signal.SIG_BLOCK, []), file=file)

def pre_fork(server, worker):
    note("pre_fork")

def post_fork(server, worker):
    note("post_fork")

def post_worker_init(worker):
    note("post_worker_init")
"""


def test_what_the_users_hooks_start_is_born_with_no_signal_blocked(start):
    server = start(base=("-c", "conf.py"), files={"conf.py": MASKS})
    noted = (server.folder / "masks").read_text().splitlines()
    assert noted == ["pre_fork", "post_fork", "post_worker_init"]


def is_told_to_end(pid: int) -> bool:
    """Whether a TERM has come, which it has not seen yet."""
    pending = Path(f"/proc/{pid}/status").read_text().partition("ShdPnd:")[2].split()[0]
    return bool(int(pending, 16) & 1 << signal.SIGTERM - 1)


# drain_delay


def test_during_drain_delay_readyz_says_no_and_everything_is_served(start, stage):
    server = start(config={**TWO, "drain_delay": "10s", "ready_file": "ready"})
    with Load(server) as load:
        server.tell(signal.SIGTERM)
        wait_for(lambda: server.get("/-/readyz").status == 503, "not ready")
        assert server.get("/-/healthz").status == 200
        wait_for(lambda: not (server.folder / "ready").exists(), "no ready_file")
        load.go_on(100)
        assert load.failures == []
    server.wait_closed()
    assert server.process.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_during_drain_delay_the_dead_are_replaced_and_int_and_quit_are_quick(start, stage, number):
    server = start(config={**TWO, "drain_delay": "600s"})
    server.tell(signal.SIGTERM)
    wait_for(lambda: server.get("/-/readyz").status == 503, "not ready")
    victim = server.workers[0]
    server.tell(signal.SIGKILL, victim)
    wait_for(lambda: len(server.workers) == 2 and victim not in server.workers, "a successor")
    server.wait_numbers(processes=2)
    client = server.connect().ask("/hold/x")
    actor = stage.next()
    assert server.stop(number) == 0
    assert actor.vanished()
    client.close()


def test_term_to_one_process_recycles_it_and_no_request_fails(start):
    server = start(config=TWO, bind=BOTH)
    with Load(server) as load:
        for _ in range(3):
            load.go_on(100)
            worker = server.workers[0]
            server.tell(signal.SIGTERM, worker)
            wait_for(lambda worker=worker: worker not in server.workers, "its end")
            server.wait_numbers(processes=2)
        load.go_on(100)
    assert load.failures == []


PATIENT = """\
from replica_plugin import worker
worker.ASKED = 20.0
from replica_plugin.conf import *
"""


def test_term_to_processes_and_master_as_of_a_control_group_answers_what_waits(start, stage):
    """However long the master takes to say that it was told, too."""
    server = start(bind=BOTH, base=("-c", "patient.py"), files={"patient.py": PATIENT})
    clients = [server.connect().ask("/hold/x") for _ in range(3)]
    actor = stage.next()
    server.wait_numbers(running=1, waiting=2)
    server.tell(signal.SIGTERM, server.workers[0])
    server.tell(signal.SIGTERM)
    server.wait_closed()
    for _ in range(2):
        actor.finish()
        actor = stage.next()
    actor.finish()
    assert [client.reply().status for client in clients] == [200] * 3
    assert server.stop() == 0


def test_hup_takes_other_numbers_and_no_request_fails(start, stage):
    server = start(config=TWO, bind=BOTH)
    with Load(server) as load:
        for p, t, bound in ((3, 1, 50), (1, 4, 60), (2, 3, 70)):
            load.go_on(100)
            old = set(server.workers)
            numbers = {"processes_per_replica": p, "threads_per_process": t}
            server.write_config({**numbers, "max_replica_concurrency": bound})
            server.tell(signal.SIGHUP)
            server.wait_log(rf"Replica: {p} process(es)? x {t} threads? .*concurrency {bound}\)")
            wait_for(lambda old=old: not old & set(server.workers), "the old ones' end")
            server.wait_numbers(processes=p, slots=p * t)
            load.go_on(100)
    assert load.failures == []
    server.wait_numbers(running=0, waiting=0)
    assert holds(server, stage, 6)


def test_hup_with_a_broken_file_is_logged_and_survived(start, stage):
    server = start(config=TWO, bind=BOTH)
    with Load(server) as load:
        load.go_on(50)
        (server.folder / "replica.yaml").write_text("processes_per_replica: many\n")
        server.tell(signal.SIGHUP)
        server.wait_log("The settings from before go on to hold")
        load.go_on(50)
        server.wait_numbers(processes=2, slots=4)
    assert "processes_per_replica" in server.log
    assert load.failures == []
    server.wait_numbers(running=0, waiting=0)
    assert holds(server, stage, 4)


def test_many_hups_in_a_row_fail_no_request(start, stage):
    server = start(config=TWO, bind=BOTH)
    with Load(server, clients=4) as load:
        for n in range(6):
            server.tell(signal.SIGHUP)
            server.wait_log("Handling signal: hup", count=n + 1)
        load.go_on(50)
        wait_for(lambda: len(server.workers) == 2, "two processes")
        server.wait_numbers(processes=2, slots=4)
    assert load.failures == []
    server.wait_numbers(running=0, waiting=0)
    assert holds(server, stage, 4)


def test_max_requests_recycles_processes_and_no_request_fails(start, stage):
    server = start("--max-requests", "50", "--max-requests-jitter", "20", config=TWO, bind=BOTH)
    first = set(server.workers)
    with Load(server) as load:
        load.go_on(400)
        wait_for(lambda: not first & set(server.workers), "all first processes' end")
    assert load.failures == []
    server.wait_numbers(running=0, waiting=0, processes=2)
    assert holds(server, stage, 4)


def test_ttin_and_ttou_change_the_number_of_processes(start, stage):
    server = start(config=TWO)
    with Load(server) as load:
        for number, processes in ((signal.SIGTTIN, 3), (signal.SIGTTOU, 2), (signal.SIGTTOU, 1)):
            load.go_on(50)
            server.tell(number)
            wait_for(lambda n=processes: len(server.workers) == n, f"{processes} processes")
            server.wait_numbers(processes=processes, slots=2 * processes)
    assert load.failures == []
    server.wait_numbers(running=0, waiting=0)
    assert holds(server, stage, 2)


DEAF = """\
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
from served_app import application
"""


def test_hup_replaces_processes_whose_app_ignores_term(start):
    server = start(config=TWO, files={"deaf.py": DEAF}, app="deaf:application")
    old = set(server.workers)
    server.tell(signal.SIGHUP)
    wait_for(lambda: not old & set(server.workers), "all old ones' end")
    server.wait_numbers(processes=2, slots=4)
    assert server.stop() == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_old_processes_whose_slots_are_all_busy_end_graceful_timeout_after_a_hup(
    start, stage, threads
):
    """No slot is free to read that they are dismissed."""
    config = {"processes_per_replica": 1, "threads_per_process": threads}
    server = start("--graceful-timeout", "1", config=config)
    clients = [server.connect().ask("/hold/x") for _ in range(threads)]
    actors = stage.take(threads)
    server.tell(signal.SIGHUP)
    server.wait_log("Not finished within graceful_timeout of being dismissed: leaving")
    assert all(actor.vanished() for actor in actors)
    assert [client.reply().status for client in clients] == [502] * threads
    assert server.get("/hello").status == 200
    server.wait_numbers(processes=1, slots=threads)


LAST_WORDS = """\
import os, signal
from served_app import application

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid, usr1=signal.SIGUSR1, mkdir=os.mkdir):
        kill(pid(), usr1)
        mkdir("survived")

last = Last()
"""


LINGERS = {
    "thread": "import threading\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n",
    "atexit": "import atexit\natexit.register(time.sleep, 1000)\n",
}
IN_A_HURRY = """\
from replica_plugin import loading
loading.END_TIME = 0.5
from replica_plugin.conf import *
"""


@pytest.mark.parametrize("what", LINGERS)
def test_a_process_does_not_wait_for_ever_for_what_the_app_does_at_its_end(start, what):
    """With one process nothing would be served meanwhile."""
    app = f"import time\nfrom served_app import application\n{LINGERS[what]}"
    files = {"lingers.py": app, "hurry.py": IN_A_HURRY}
    options = ("--graceful-timeout", "1", "--timeout", "0")
    config = {"processes_per_replica": 1, "threads_per_process": 2}
    server = start(
        *options, base=("-c", "hurry.py"), config=config, files=files, app="lingers:application"
    )
    (old,) = server.workers
    server.tell(signal.SIGTERM, old)
    server.wait_log("A thread of the app, or an atexit handler, has not ended in time: leaving")
    wait_for(lambda: server.workers not in ([], [old]), "another process")
    assert server.get("/hello").status == 200


BYE = """\
import atexit, time
from served_app import application

def bye():
    time.sleep(8)
    open("done", "x").close()

atexit.register(bye)
"""


@pytest.mark.parametrize("t", [1, 2])
def test_what_the_app_does_at_its_end_may_take_longer_than_timeout(start, t):
    """The process beats no more, and has graceful_timeout."""
    options = ("--graceful-timeout", "30", "--timeout", "5")
    config = {"processes_per_replica": 1, "threads_per_process": t}
    server = start(*options, config=config, files={"bye.py": BYE}, app="bye:application")
    server.tell(signal.SIGTERM, server.workers[0])
    server.wait_log("Booting worker", 2)
    assert "WORKER TIMEOUT" not in server.log
    assert (server.folder / "done").exists()


def test_a_process_that_is_ending_takes_no_harm_from_usr1(start):
    """The interpreter has given up its handlers by then, and logs may be reopened at any time."""
    config = {"processes_per_replica": 1, "threads_per_process": 2}
    server = start(config=config, files={"last.py": LAST_WORDS}, app="last:application")
    server.tell(signal.SIGTERM, server.workers[0])
    server.wait_log("Booting worker", 2)
    assert "was sent SIGUSR1" not in server.log
    assert (server.folder / "survived").exists()
