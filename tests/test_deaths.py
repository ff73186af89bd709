"""P6: processes that are killed, the dispatcher, the supervisor and the master too."""

from __future__ import annotations

import http.client
import os
import signal

import pytest
from conftest import which_by_mode
from server import BOTH, IN_BOTH_MODES, Client, Load, Server, wait_for
from stage import Stage

pytestmark = IN_BOTH_MODES
which = which_by_mode

TWO = {"processes_per_replica": 2, "threads_per_process": 2}
ONE = {"processes_per_replica": 1, "threads_per_process": 1}
KILL, STOP = signal.SIGKILL, signal.SIGSTOP


@pytest.fixture
def stage(start) -> Stage:
    return start.stage


def hold(server: Server, which: int, count: int, name: str = "x") -> list[Client]:
    return [server.connect(which).ask(f"/hold/{name}") for _ in range(count)]


def holds_all_slots(server: Server, stage: Stage, which: int, count: int = 4) -> None:
    """Nothing has been lost: so many begin at once, and one more waits."""
    server.wait_numbers(running=0, waiting=0, slots=count)
    clients = hold(server, which, count + 1)
    actors = stage.take(count)
    server.wait_numbers(running=count, waiting=1)
    assert stage.is_empty()
    for actor in actors:
        actor.finish()
    stage.next().finish()
    assert [client.reply().status for client in clients] == [200] * (count + 1)
    server.wait_numbers(running=0, waiting=0)


def test_a_killed_process_costs_what_it_was_running_and_nothing_else(start, stage, which):
    server = start("--keep-alive", "20", config=TWO, bind=BOTH)
    with server.connect(which) as idle, server.connect(which) as half:
        assert idle.get("/hello").status == 200
        half.send("GET /hel")
        running = hold(server, which, 4)
        actors = stage.take(4)
        waiting = hold(server, which, 6, "waiting")
        server.wait_numbers(running=4, waiting=6, connections=12)
        victim = actors[0].pid
        server.tell(KILL, victim)
        lost = [actor for actor in actors if actor.pid == victim]
        assert [actor.vanished() for actor in lost] == [True] * 2
        wait_for(lambda: sum(client.is_readable() for client in running) == 2, "two answers")
        told = [client for client in running if client.is_readable()]
        assert [client.reply().status for client in told] == [502] * 2
        actors = [actor for actor in actors if actor.pid != victim]
        for _ in range(6):
            actors.append(stage.next())
            actors.pop(0).finish()
        for actor in actors:
            actor.finish()
        alive = [client for client in running if client not in told]
        assert {client.reply().status for client in alive + waiting} == {200}
        assert half.send("lo HTTP/1.1\r\nHost: test\r\n\r\n").reply().status == 200
        assert idle.get("/hello").status in (200,)
        holds_all_slots(server, stage, which)


def test_a_response_that_had_begun_when_its_process_was_killed_is_cut_short(start, stage, which):
    server = start(config=ONE, bind=BOTH)
    with server.connect(which) as client:
        client.ask("/begun/x")
        actor = stage.next()
        server.tell(KILL, actor.pid)
        assert actor.vanished()
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            client.reply()
    holds_all_slots(server, stage, which, 1)


def test_a_request_that_a_killed_process_had_not_begun_to_read_is_run_by_the_next(
    start, stage, which
):
    server = start(config=ONE, bind=BOTH)
    (worker,) = server.workers
    server.tell(STOP, worker)
    clients = hold(server, which, 1, "sent") + hold(server, which, 1, "waiting")
    server.wait_in_flight(2)  # in gevent mode none is sent to one that has stood still for long
    server.tell(KILL, worker)
    for name in ("sent", "waiting"):
        actor = stage.next()
        assert (actor.name, actor.pid == worker) == (name, False)
        actor.finish()
    assert [client.reply().status for client in clients] == [200] * 2


def test_a_request_that_goes_back_to_the_queue_is_not_run_if_its_client_left(start, stage, which):
    server = start(config=ONE, bind=BOTH)
    (worker,) = server.workers
    server.tell(STOP, worker)
    (leaving,) = hold(server, which, 1, "left")
    server.wait_in_flight(1)
    (staying,) = hold(server, which, 1, "stayed")
    server.wait_in_flight(2)
    leaving.close()
    server.tell(KILL, worker)
    actor = stage.next()
    assert actor.name == "stayed"
    actor.finish()
    assert staying.reply().status == 200


def test_a_process_that_ends_itself_is_told_with_502_and_replaced(start, stage, which):
    server = start(config=TWO, bind=BOTH)
    for _ in range(4):
        assert server.get("/die/0", which).status == 502
    holds_all_slots(server, stage, which)


def test_processes_killed_one_after_another_leave_nothing_adrift(start, stage):
    server = start(config=TWO, bind=BOTH)
    with Load(server, "/sleep/0.005") as load:
        for _ in range(8):
            load.go_on(50)
            load.failures.clear()
            victim = wait_for(lambda: server.workers, "a process")[0]
            server.tell(KILL, victim)
            wait_for(lambda pid=victim: pid not in server.children(), "its end")
        load.go_on(50)
        load.failures.clear()
        server.wait_numbers(processes=2)
    holds_all_slots(server, stage, 0)


def test_a_killed_dispatcher_costs_nothing_that_runs_and_the_cap_holds(start, stage, which):
    """Again and again: what runs is answered on its connection, which then lives on."""
    server = start("--keep-alive", "20", config=TWO, bind=BOTH)
    clients = [server.connect(which) for _ in range(4)]
    for _ in range(20):
        for client in clients:
            client.ask("/hold/old")
        actors = stage.take(4)
        kill_dispatcher(server)
        later = hold(server, which, 2, "new")
        server.wait_numbers(running=4, waiting=2)
        assert stage.is_empty()
        actors.pop().finish()
        actors.append(stage.next())
        assert actors[-1].name == "new"
        server.wait_numbers(running=4, waiting=1)
        for actor in actors:
            actor.finish()
        stage.next().finish()
        assert [client.reply().status for client in clients + later] == [200] * 6
        for client in later:
            client.close()
    holds_all_slots(server, stage, which)


def kill_dispatcher(server: Server) -> None:
    old = server.dispatcher
    server.tell(KILL, old)
    wait_for(lambda: server.dispatcher != old, "the next dispatcher")


def test_dispatcher_and_process_killed_together_leave_nothing_adrift(start, stage, which):
    server = start(config=TWO, bind=BOTH)
    for _ in range(5):
        clients = hold(server, which, 4)
        actors = stage.take(4)
        victim = actors[0].pid
        server.tell(KILL, server.dispatcher)
        server.tell(KILL, victim)
        for actor in actors:
            if actor.pid != victim:
                actor.finish()
        holds_all_slots(server, stage, which)
        for client in clients:
            client.close()


def test_a_dispatcher_killed_at_any_moment_leaves_nothing_adrift(start, stage):
    server = start(config=TWO, bind=BOTH)
    with Load(server) as load:
        for _ in range(20):
            load.go_on(100)
            load.failures.clear()
            kill_dispatcher(server)
        load.go_on(100)
    holds_all_slots(server, stage, 0)


THREE = {"processes_per_replica": 1, "threads_per_process": 3}


def test_of_a_dismissed_process_a_new_dispatcher_counts_the_slots_that_have_not_ended(
    start, stage, which
):
    """One of three has, before the new one comes; another does later. None of them says FREE."""
    server = start(config=THREE, bind=BOTH)
    old = hold(server, which, 2, "old")
    actors = stage.take(2)
    replace(server, stage, which)
    kill_dispatcher(server)
    new = hold(server, which, 2, "new")
    actors.append(stage.next())
    server.wait_numbers(running=3, waiting=1)
    actors.pop(0).finish()
    actors.append(stage.next())
    new += hold(server, which, 1, "new")
    server.wait_numbers(running=3, waiting=1)
    assert stage.is_empty()
    for actor in actors:
        actor.finish()
    stage.next().finish()
    assert [client.reply().status for client in old + new] == [200] * 5
    holds_all_slots(server, stage, which, 3)


def test_of_a_process_dismissed_later_a_new_dispatcher_counts_the_slots_that_have_not_ended(
    start, stage, which
):
    """The first of three to be free says so, and is told to leave; the others just end."""
    server = start(config=THREE, bind=BOTH)
    old = hold(server, which, 3, "old")
    actors = stage.take(3)
    kill_dispatcher(server)
    server.wait_numbers(running=3, processes=1)
    server.tell(signal.SIGHUP)
    server.wait_numbers(slots=6)
    new = hold(server, which, 3, "new")
    for running in (1, 2):
        server.wait_numbers(running=3, waiting=4 - running)
        actors.pop(0).finish()
        actors.append(stage.next())
        assert actors[-1].name == "new"
    for actor in actors:
        actor.finish()
    stage.next().finish()
    assert [client.reply().status for client in old + new] == [200] * 6
    holds_all_slots(server, stage, which, 3)


def replace(server: Server, stage: Stage, which: int) -> None:
    """HUP, and wait for the one process that is to serve from then on."""
    before = set(server.workers)
    server.tell(signal.SIGHUP)

    def has_changed() -> bool:
        (client,) = hold(server, which, 1)
        actor = stage.next()
        actor.finish()
        assert client.reply().status == 200
        return actor.pid not in before

    wait_for(has_changed, "a process that has taken over")


LINGERS = """
import atexit, os, socket
from served_app import application

def linger(pid=os.getpid()):
    link = socket.socket(socket.AF_UNIX)
    link.connect(os.environ["STAGE"])
    link.sendall(b'{"name": "end", "pid": %d, "thread": 0, "main": true, "waited": ""}\\n' % pid)
    link.recv(1)

atexit.register(linger)
"""


def test_a_process_that_lingers_at_its_end_keeps_nobody_from_its_room(start, stage, which):
    """It never registers with the new dispatcher, for it has ended all but its life."""
    server = start(config=ONE, bind=BOTH, app="lingers:application", files={"lingers.py": LINGERS})
    (before,) = server.workers
    server.tell(signal.SIGHUP)
    lingering = stage.next()
    assert (lingering.name, lingering.pid) == ("end", before)
    kill_dispatcher(server)
    (client,) = hold(server, which, 1)
    actor = stage.next()
    assert actor.pid != before
    assert before in server.workers
    actor.finish()
    assert client.reply().status == 200
    lingering.finish()


def test_a_process_that_was_told_to_quit_takes_nothing_while_it_ends(start, stage, which):
    server = start(config=TWO, bind=BOTH, app="lingers:application", files={"lingers.py": LINGERS})
    quitting, other = server.workers
    server.tell(signal.SIGQUIT, quitting)
    lingering = stage.next()
    assert (lingering.name, lingering.pid) == ("end", quitting)
    clients = hold(server, which, 4)
    for _ in clients:
        actor = stage.next()
        assert actor.pid == other
        actor.finish()
    assert [client.reply().status for client in clients] == [200] * 4
    lingering.finish()


@pytest.mark.slow
def test_a_dispatcher_that_hangs_is_replaced(start, stage, which):
    server = start("--keep-alive", "20", config=TWO, bind=BOTH)
    clients = hold(server, which, 4)
    actors = stage.take(4)
    old = server.dispatcher
    server.tell(STOP, old)
    server.wait_log(rf"The dispatcher \(pid {old}\) hangs: killing it")
    wait_for(lambda: server.dispatcher != old, "another dispatcher")
    for actor in actors:
        actor.finish()
    assert [client.reply().status for client in clients] == [200] * 4
    assert [client.get("/hello").status for client in clients] == [200] * 4
    holds_all_slots(server, stage, which)


def test_a_replica_whose_supervisor_dies_serves_and_stops(start, stage, which):
    server = start(config=TWO, bind=BOTH)
    dispatcher = server.dispatcher
    kill_supervisor(server)
    clients = hold(server, which, 4)
    for actor in stage.take(4):
        actor.finish()
    assert [client.reply().status for client in clients] == [200] * 4
    assert server.stop() == 0
    wait_for(lambda: not os.path.exists(f"/proc/{dispatcher}"), "the dispatcher's end")


GONE = r"The supervisor \(pid {}\) is gone: the replica serves on, but a dispatcher that"


def kill_supervisor(server: Server) -> None:
    supervisor = server.supervisor
    server.tell(STOP)  # else there may be another before the dispatcher sees that this one is gone
    server.tell(KILL, supervisor)
    server.wait_log(GONE.format(supervisor))
    server.tell(signal.SIGCONT)


def test_a_new_supervisor_watches_over_the_dispatcher_that_lives(start, stage):
    server = start(config=TWO)
    clients = hold(server, 0, 4)
    actors = stage.take(4)
    dispatcher = server.dispatcher
    for n in (1, 2):  # the second supervisor finds a dispatcher that was not its child either
        kill_supervisor(server)
        server.wait_log(rf"Watching over the dispatcher \(pid {dispatcher}\) that is there", n)
        assert server.dispatcher == dispatcher
    kill_dispatcher(server)
    server.wait_log(rf"The dispatcher \(pid {dispatcher}\) died \(0\): restarting it")
    for actor in actors:
        actor.finish()
    for client in clients:
        client.close()
    assert server.get("/hello").status == 200
    assert server.stop() == 0


def test_supervisor_and_dispatcher_killed_together_come_back(start, stage):
    server = start(config=TWO)
    old, workers = server.dispatcher, server.workers
    server.tell(KILL, server.supervisor)
    server.tell(KILL, old)
    wait_for(lambda: server.dispatcher != old, "another dispatcher")
    holds_all_slots(server, stage, 0)
    assert server.workers == workers


def test_a_supervisor_killed_before_it_has_a_dispatcher_is_replaced(start, stage):
    server = start(config=TWO, ready=False)
    server.tell(KILL, server.supervisor)
    holds_all_slots(server, stage, 0)


@pytest.mark.slow
def test_a_dispatcher_that_hangs_is_replaced_by_a_supervisor_that_came_later(start, stage):
    server = start(config=TWO)
    kill_supervisor(server)
    old = server.dispatcher
    server.tell(STOP, old)
    server.wait_log(rf"The dispatcher \(pid {old}\) hangs: killing it")
    wait_for(lambda: server.dispatcher != old, "another dispatcher")
    holds_all_slots(server, stage, 0)


def test_a_process_keeps_nothing_of_a_dispatcher_that_died(start):
    server = start(config=ONE)
    (worker,) = server.workers
    before = len(os.listdir(f"/proc/{worker}/fd"))
    for _ in range(3):
        dispatcher = server.dispatcher
        server.tell(KILL, dispatcher)
        wait_for(lambda pid=dispatcher: server.dispatcher != pid, "another dispatcher")
        server.wait_numbers(slots=1, processes=1)
        assert server.get("/hello").status == 200
    wait_for(lambda: len(os.listdir(f"/proc/{worker}/fd")) == before, "as many descriptors")


def test_without_their_master_processes_and_helpers_finish_and_end(start, stage, which):
    server = start(config=TWO, bind=BOTH)
    family = [*server.workers, server.supervisor, server.dispatcher]
    clients = hold(server, which, 4)
    actors = stage.take(4)
    server.tell(KILL)
    for actor in actors:
        actor.finish()
    assert [client.reply().status for client in clients] == [200] * 4
    for pid in family:
        wait_for(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), f"{pid}'s end")


@pytest.mark.parametrize("threads", [1, 2])
def test_without_their_master_processes_that_do_not_finish_end_all_the_same(start, stage, threads):
    config = {"processes_per_replica": 1, "threads_per_process": threads}
    server = start("--graceful-timeout", "4", config=config)
    family = [*server.workers, server.supervisor, server.dispatcher]
    client = server.connect().ask("/hold/x")
    actor = stage.next()
    server.tell(KILL)
    assert actor.vanished()
    assert client.reply().status == 503
    for pid in family:
        wait_for(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), f"{pid}'s end")


def test_without_their_master_a_process_that_cannot_see_that_its_time_is_over_ends(start, stage):
    config = {"processes_per_replica": 1, "threads_per_process": 2}
    server = start("--graceful-timeout", "4", config=config)
    family = [*server.workers, server.supervisor, server.dispatcher]
    client = server.connect().ask("/grip/60")
    server.wait_numbers(running=1)
    server.tell(KILL)
    assert client.reply().status == 503
    for pid in family:
        wait_for(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), f"{pid}'s end")


# What apps do to their processes.


@pytest.mark.parametrize("descriptors", ["", "poor"])
def test_a_child_that_the_app_has_forked_takes_no_requests(start, stage, descriptors):
    server = start(config=ONE)
    with server.connect() as client:
        child = client.get(f"/child/{descriptors}").json
        try:
            for _ in range(20):
                assert client.get("/hello").status == 200
            holds_all_slots(server, stage, 0, 1)
        finally:
            server.tell(KILL, child)


def test_a_child_forked_before_a_new_channel_is_taken_up_takes_no_requests_from_it(start, stage):
    """In gevent mode the hub takes it up, once it turns; in the child, too, if it were let."""
    server = start(config=ONE)
    (worker,) = server.workers
    with server.connect() as client:
        client.ask("/late-child/x")
        forking = stage.next()
        before = server.dispatcher
        server.tell(KILL, before)
        wait_for(lambda: server.dispatcher != before, "another dispatcher")
        server.wait_numbers(processes=1, running=1)
        forking.finish()
        child = client.reply().json
    try:
        for _ in range(40):
            (holding,) = hold(server, 0, 1)
            actor = stage.next()
            actor.finish()
            assert (actor.pid, holding.reply().status) == (worker, 200)
    finally:
        server.tell(KILL, child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_child_that_the_app_has_forked_ends_when_told_to_and_its_parent_serves_on(
    start, stage, number
):
    server = start(config=ONE)
    before = server.workers
    child = server.get("/child").json
    server.tell(number, child)
    wait_for(lambda: child not in server.children(before[0]), "the child's end")
    holds_all_slots(server, stage, 0, 1)
    assert server.workers == before


EARLY_CHILD = """
import os, signal, time
from served_app import HANDLERS, application, as_json

child = os.fork()
if not child:
    signal.signal(signal.SIGTERM, lambda *arguments: os._exit(0))
    while True:
        time.sleep(1)

HANDLERS["child"] = lambda environ, start_response, rest: as_json(start_response, child)
"""


def test_a_child_that_the_app_has_forked_as_it_was_loaded_ends_and_its_parent_serves_on(
    start, stage
):
    """It has a handler of its own, and Python writes numbers of signals to its parent's pipe."""
    server = start(config=ONE, app="early:application", files={"early.py": EARLY_CHILD})
    before = server.workers
    child = server.get("/child").json
    server.tell(signal.SIGTERM, child)
    wait_for(lambda: child not in server.children(before[0]), "the child's end")
    holds_all_slots(server, stage, 0, 1)
    assert server.workers == before


COMES_BACK = """
import os

def application(environ, start_response):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "6")])
    return [b"parent" if child else b"child!"]
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_child_that_comes_back_from_the_app_answers_nobody_and_ends(start, mode, threads):
    if mode == "gevent":
        pytest.skip("it goes on with what its parent's other greenlets were doing")
    config = {"processes_per_replica": 1, "threads_per_process": threads}
    files = {"forking.py": COMES_BACK}
    server = start("--access-logfile", "-", config=config, app="forking:application", files=files)
    with server.connect() as client:
        assert [client.get("/").body for _ in range(3)] == [b"parent"] * 3
    server.wait_numbers(running=0)
    assert server.log.count('"GET / HTTP/1.1" 200') == 3


GOES_ON = """
import os, subprocess

subprocess.run(["true"])  # gevent listens for children from its first on, which it may miss itself

def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"begun by "
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        yield b"parent"
    else:
        try:
            yield b"child!"
        finally:
            os._exit(0)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_child_that_the_app_has_forked_adds_nothing_to_a_response_that_has_begun(start, threads):
    config = {"processes_per_replica": 1, "threads_per_process": threads}
    server = start(config=config, app="forking:application", files={"forking.py": GOES_ON})
    with server.connect() as client:
        assert [client.get("/").body for _ in range(3)] == [b"begun by parent"] * 3


LATE = """
import ctypes, threading
from served_app import HANDLERS, application, hello

def late(environ, start_response, rest):
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    for thread in threading.enumerate():
        if thread.name.startswith("replica-slot") and thread is not threading.current_thread():
            raise_in(ctypes.c_ulong(thread.ident), ctypes.py_object(RuntimeError))
    return hello(environ, start_response, rest)

HANDLERS["late"] = late
"""


def test_a_process_that_has_lost_a_slot_to_a_late_exception_of_the_apps_is_replaced(
    start, stage, mode
):
    """It is raised when the slot has taken its next request, of which nobody knows then."""
    if mode == "gevent":
        pytest.skip("its slots are in one thread")
    config = {"processes_per_replica": 1, "threads_per_process": 2}
    server = start(config=config, app="late:application", files={"late.py": LATE})
    (before,) = server.workers
    assert server.get("/late").status == 200
    clients = hold(server, 0, 2)
    for _ in clients:
        stage.next().finish()
    wait_for(lambda: before not in server.workers, "its end")
    assert [client.reply().status for client in clients] == [200, 200]
    holds_all_slots(server, stage, 0, 2)


ALARM = """
import signal
from served_app import HANDLERS, application, hello

def raises(number, frame):
    raise TimeoutError

def alarm(environ, start_response, rest):
    signal.signal(signal.SIGALRM, raises)
    return hello(environ, start_response, rest)

HANDLERS["alarm"] = alarm
"""


def test_a_handler_of_the_apps_that_raises_timeout_error_while_a_slot_waits_deafens_no_process(
    start, stage
):
    """A request has left its alarm behind. What that raises is an OSError, as the kernel's are."""
    server = start(config=ONE, app="alarm:application", files={"alarm.py": ALARM})
    (before,) = server.workers
    assert server.get("/alarm").status == 200
    server.wait_numbers(running=0)
    server.tell(signal.SIGALRM, before)
    wait_for(lambda: before not in server.workers, "its end")
    holds_all_slots(server, stage, 0, 1)


ENDS = """
import gc, os
from served_app import HANDLERS, application, hello
from replica_plugin.worker import ReplicaWorker

def number(name):
    workers = (each for each in gc.get_objects() if isinstance(each, ReplicaWorker))
    return getattr(next(filter(None, (each._channel for each in workers))), name).fileno()

def close(environ, start_response, name):
    os.close(number(name))
    return hello(environ, start_response, name)

def replace(environ, start_response, name):
    os.dup2(0, number(name))
    return hello(environ, start_response, name)

HANDLERS.update({"close-end": close, "replace-end": replace})
"""


@pytest.mark.parametrize("config", [ONE, TWO], ids=["1x1", "2x2"])
@pytest.mark.parametrize("path", ["/close-end/sock", "/replace-end/deck"])
def test_a_process_that_has_lost_an_end_of_ours_to_the_app_ends_and_is_replaced(
    start, stage, config, path
):
    """The app closes a number of its own twice. Meanwhile it was given to us; and is, to others."""
    server = start("--timeout", "0", config=config, app="ends:application", files={"ends.py": ENDS})
    loses_one_process(server, stage, config, path)


@pytest.mark.parametrize("config", [ONE, TWO], ids=["1x1", "2x2"])
def test_a_process_whose_descriptors_the_app_has_closed_ends_and_is_replaced(start, stage, config):
    server = start("--timeout", "0", config=config)
    loses_one_process(server, stage, config, "/close-all")


def loses_one_process(server: Server, stage: Stage, config: dict[str, int], path: str) -> None:
    """It is replaced, and nothing has been lost."""
    before = set(server.workers)
    with server.connect() as client:
        client.ask(path)
        wait_for(lambda: before - set(server.workers), "one has ended")
    wait_for(lambda: len(server.workers) == len(before), "a successor")
    slots = config["processes_per_replica"] * config["threads_per_process"]
    server.wait_numbers(slots=slots, processes=len(before))
    holds_all_slots(server, stage, 0, slots)
