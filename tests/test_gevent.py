"""What is particular to gevent mode; what it has in common with thread mode, IN_BOTH_MODES."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
from server import Client, Load, Server, descriptors, wait_for
from stage import Actor, Stage
from wire import Wire, request

from replica_plugin import early
from replica_plugin.channel import Job, close_all, decode_job, pair, send_job
from replica_plugin.green import GreenEnd

GEVENT = {"mode": "gevent", "processes_per_replica": 2, "threads_per_process": 2}
ONE = {**GEVENT, "processes_per_replica": 1}
STALL_SEEN = 2.0  # seconds
STALL = r"The hub of process (\d+) does not turn"


@pytest.fixture
def stage(start) -> Stage:
    return start.stage


def hold(server: Server, *names: str) -> list[Client]:
    return [server.connect().ask(f"/hold/{name}") for name in names]


def finish(*actors: Actor) -> None:
    for actor in actors:
        actor.finish()


def close(clients: list[Client]) -> None:
    assert [client.reply().status for client in clients] == [200] * len(clients)
    for client in clients:
        client.close()


def holds_four(server: Server, stage: Stage) -> None:
    """So many requests, and no more, run at once."""
    clients = hold(server, *"abcde")
    actors = stage.take(4)
    server.wait_numbers(running=4, waiting=1)
    finish(*actors)
    stage.next().finish()
    close(clients)


# Where it runs.


@pytest.mark.parametrize("threads", [1, 3])
def test_the_app_is_imported_and_runs_on_the_main_thread_of_its_process(start, stage, threads):
    server = start(config={**ONE, "threads_per_process": threads})
    clients = hold(server, *"abc"[:threads])
    actors = stage.take(threads)
    assert [actor.main for actor in actors] == [True] * threads
    finish(*actors)
    close(clients)


def holds_gevent(pid: int) -> bool:
    return "-packages/gevent/" in Path(f"/proc/{pid}/maps").read_text()


def test_gevent_is_imported_by_master_and_processes_of_gevent_mode_only(start):
    server = start(config=GEVENT)
    assert [holds_gevent(pid) for pid in server.workers] == [True, True]
    assert not holds_gevent(server.supervisor) and not holds_gevent(server.dispatcher)
    server = start(config={**GEVENT, "mode": "thread"})
    assert not any(map(holds_gevent, [server.process.pid, *server.workers]))
    assert not [name for name in server.get("/modules").json if name.startswith("gevent")]


def test_a_process_has_one_hub(start):
    (worker,) = start(config=ONE).workers
    kinds = [*descriptors(worker).values()]
    assert kinds.count("anon_inode:[eventpoll]") == 1


PATCHED = """
import json, socket
from gevent import monkey
AT_IMPORT = monkey.is_module_patched("socket")

def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps([AT_IMPORT, monkey.is_module_patched("socket")]).encode()]
"""


@pytest.mark.parametrize(
    ("arguments", "patched"), [((), [True, True]), (("--preload",), [False, True])]
)
def test_the_patch_comes_before_the_app_unless_that_is_preloaded(start, arguments, patched):
    server = start(*arguments, config=ONE, app="patched:application", files={"patched.py": PATCHED})
    assert server.get("/").json == patched


# Greenlets.

LEFTOVERS = """
import gevent, gevent.local
from contextvars import ContextVar

context, local = ContextVar("context", default="none"), gevent.local.local()

def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    if environ["PATH_INFO"] == "/leave":
        gevent.sleep(0.001)
        gevent.Timeout(0.01).start()
        context.set("left")
        local.value = "left"
        return [b"left"]
    gevent.sleep(0.1)
    return [f"{context.get()} {getattr(local, 'value', 'none')}".encode()]
"""


def test_what_a_request_that_waited_leaves_behind_meets_no_later_one(start):
    files = {"leftovers.py": LEFTOVERS}
    config = {**ONE, "threads_per_process": 1}
    server = start(config=config, app="leftovers:application", files=files)
    for _ in range(3):
        assert server.get("/leave").body == b"left"
        assert server.get("/").body == b"none none"


STRAY = """
import gevent

def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    gevent.Timeout(0.05).start()
    return [b"left"]
"""


def test_a_timeout_that_a_request_left_running_costs_no_slot(start):
    config = {**ONE, "threads_per_process": 1}
    server = start(config=config, app="stray:application", files={"stray.py": STRAY})
    assert server.get("/").status == 200
    beat = server.numbers().beat
    wait_for(lambda: server.numbers().beat > beat + 1, "the timeout")
    assert server.get("/").status == 200


BROKEN_OFF = """
import gevent
from served_app import answer

def application(environ, start_response):
    if environ["PATH_INFO"] != "/read":
        return answer(start_response, "stolen")
    timeout = gevent.Timeout(0.05)
    timeout.start()
    try:
        environ["wsgi.input"].read()
    except gevent.Timeout:
        return answer(start_response, "too slow")
    finally:
        timeout.close()
"""


@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", "Content-Length: 48"])
def test_a_body_whose_read_a_timeout_broke_off_is_no_request(start, framing):
    """Expect has a slot take the request before its body is there."""
    stolen = request("/stolen")
    config = {**ONE, "threads_per_process": 1}
    server = start(config=config, app="broken:application", files={"broken.py": BROKEN_OFF})
    with Wire(server.address) as wire:
        wire.send(request("/read", framing, "Expect: 100-continue", method="POST"))
        assert wire.reply().line == b"HTTP/1.1 100 Continue"
        wire.send_if_it_can(b"%x\r\n" % len(stolen) if "chunked" in framing else b"")
        assert wire.reply().body == b"too slow"
        wire.send_if_it_can(stolen)
        assert wire.rest() == b""


CROWDED = """
import gc, gevent, os, socket
import served_app
from replica_plugin.channel import TURNING
from replica_plugin.gevent_worker import GeventWorker

def throw(greenlet):
    os.write(2, b"thrown\\n")
    greenlet.throw(gevent.Timeout)

def application(environ, start_response):
    if environ["PATH_INFO"].startswith("/hold"):
        worker = next(each for each in gc.get_objects() if type(each) is GeventWorker)
        body = served_app.application(environ, start_response)
        try:
            while True:
                worker._channel.sock.send(TURNING, socket.MSG_DONTWAIT)
        except BlockingIOError:
            gevent.spawn_later(0.05, throw, gevent.getcurrent())
        return body
    return served_app.application(environ, start_response)
"""


def test_a_timeout_that_comes_while_a_slot_waits_to_report_costs_no_slot(start, stage):
    config = {**ONE, "threads_per_process": 1}
    server = start(config=config, app="crowded:application", files={"crowded.py": CROWDED})
    client = server.connect().ask("/hold/x")
    actor = stage.next()
    server.tell(signal.SIGSTOP, server.dispatcher)
    actor.finish()
    server.wait_log("thrown")
    server.tell(signal.SIGCONT, server.dispatcher)
    assert client.reply().status == 200
    assert server.get("/hello").status == 200


FROZEN = """
import gc, socket
import served_app
from replica_plugin.channel import TURNING
from replica_plugin.gevent_worker import GeventWorker

def application(environ, start_response):
    if environ["PATH_INFO"] != "/hold/x":
        return served_app.application(environ, start_response)
    worker = next(each for each in gc.get_objects() if type(each) is GeventWorker)
    served_app.application(environ, lambda *arguments: None)
    try:
        while True:
            worker._channel.sock.send(TURNING, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return served_app.application({**environ, "PATH_INFO": "/freeze/y"}, start_response)
"""


def test_the_attendant_does_not_wait_for_room_to_say_that_the_hub_stands_still(start, stage):
    server = start(config=ONE, app="frozen:application", files={"frozen.py": FROZEN})
    (worker,) = server.workers
    client = server.connect().ask("/hold/x")
    actor = stage.next()
    helpers = [server.supervisor, server.dispatcher]  # one would kill the other, which hangs
    for each in helpers:
        server.tell(signal.SIGSTOP, each)
    actor.finish()
    frozen = stage.next()
    until = time.monotonic() + STALL_SEEN
    wait_for(
        lambda: time.monotonic() > until, "a look of the attendant's at a hub that has stalled"
    )
    server.tell(signal.SIGCONT, helpers[1])
    server.wait_log(STALL)
    server.tell(signal.SIGCONT, helpers[0])
    frozen.finish()
    assert client.reply().status == 200
    kinds = [*descriptors(worker).values()]
    assert kinds.count("anon_inode:[eventpoll]") == 1  # to wait it would have made a hub


def test_a_killed_greenlet_costs_its_request_and_no_slot(start, stage):
    killer = "import gevent\n\ndef application(environ, start_response):\n"
    killer += "    if environ['PATH_INFO'] == '/kill':\n        gevent.getcurrent().kill()\n"
    killer += "    import served_app\n    return served_app.application(environ, start_response)\n"
    server = start(config=ONE, app="killer:application", files={"killer.py": killer})
    assert [server.get("/kill").status for _ in range(5)] == [500] * 5
    clients = hold(server, "a", "b")
    finish(*stage.take(2))
    close(clients)


FORKING = """
import gc, gevent, os
from replica_plugin.gevent_worker import GeventWorker

PID, released = os.getpid(), []
gevent.get_hub().loop.install_sigchld()  # or the end of the first child may be missed

def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "1")])
    if environ["PATH_INFO"] == "/wait":
        while os.getpid() == PID and not released:
            gevent.sleep(0.01)
        return [b"-"]
    pid = os.fork()
    if not pid:
        gevent.sleep(0.2)  # the child's copy of the request that waits ends meanwhile
        os._exit(0)
    os.waitpid(pid, 0)
    released.append(True)
    worker = next(each for each in gc.get_objects() if type(each) is GeventWorker)
    return [b"%d" % len(worker._cells.begun())]
"""


def test_what_a_child_that_the_app_forks_ends_does_not_end_for_its_parent(start):
    """Else a request that runs would count as not begun, and run again if its process died."""
    server = start(config=ONE, app="forking:application", files={"forking.py": FORKING})
    client = server.connect().ask("/wait")
    server.wait_numbers(running=1)
    assert server.get("/fork").body == b"2"
    assert (client.reply().body, client.get("/fork").body) == (b"-", b"1")  # not "-" of the child
    client.close()


# A hub that does not turn.


def block_one(server: Server, stage: Stage) -> tuple[Client, Actor]:
    """One process does nothing but this request, and the dispatcher knows it."""
    client = server.connect().ask("/freeze/x")
    actor = stage.next()
    server.wait_log(STALL)
    return client, actor


def test_a_process_whose_hub_stands_still_is_sent_nothing_until_it_turns_again(start, stage):
    server = start(config=GEVENT)
    client, blocked = block_one(server, stage)
    others = hold(server, "a", "b", "c", "d")
    actors = stage.take(2)
    server.wait_numbers(running=3, waiting=2)
    assert blocked.pid not in {actor.pid for actor in actors}
    assert stage.is_empty()
    blocked.finish()
    last = stage.next()
    assert last.pid == blocked.pid
    finish(*actors, last)
    stage.next().finish()
    close([client, *others])
    assert "request_timeout" not in server.log


def test_what_was_sent_to_a_hub_that_stands_still_goes_to_others_in_its_order(start, stage):
    server = start(config={**GEVENT, "threads_per_process": 3})
    clients = [server.connect().ask("/freeze/x")]
    blocked = stage.next()
    for count, name in enumerate("abcde", start=2):
        clients += hold(server, name)
        server.wait_in_flight(count)
    actors = stage.take(3)  # a, c and e, if all were sent before anybody noticed
    server.wait_numbers(running=4, waiting=2)
    for name in sorted(set("abcde") - {actor.name for actor in actors}):
        actors.pop(0).finish()
        actors.append(stage.next())
        assert actors[-1].name == name and actors[-1].pid != blocked.pid
    finish(*actors, blocked)
    close(clients)


def test_of_a_hub_that_turns_again_the_log_says_nothing(start, stage):
    server = start(config=ONE)
    client, actor = block_one(server, stage)
    before = server.log
    actor.finish()
    close([client])
    assert server.get("/hello").status == 200
    assert server.log == before


def test_probes_answer_while_every_hub_stands_still_and_the_replica_is_ready(start, stage):
    server = start(config=GEVENT)
    clients = [server.connect().ask("/freeze/x") for _ in range(2)]
    actors = stage.take(2)
    server.wait_log(STALL, count=2)
    assert (server.get("/-/healthz").status, server.get("/-/readyz").status) == (200, 200)
    waiting = hold(server, "a")
    server.wait_numbers(running=2, waiting=1)
    finish(*actors)
    stage.next().finish()
    close([*clients, *waiting])


def test_the_log_says_once_a_process_who_keeps_its_hub_where_and_what_to_do(start, stage):
    server = start(config=ONE)
    for _ in range(2):
        client, actor = block_one(server, stage)
        actor.finish()
        close([client])
    (line,) = (line for line in server.log.splitlines() if "does not turn" in line)
    assert f"process {actor.pid} does not turn, so it is sent nothing: GET /freeze/x keeps" in line
    assert "with 0 % of a CPU" in line and "served_app.py" in line and "(freeze)" in line
    assert "use mode: thread, or fewer threads_per_process" in line


def test_a_handler_that_keeps_the_gil_is_named_in_the_log_when_it_lets_go(start):
    server = start(config=ONE)
    named = r"GET /grip/1.6 keeps it, with \d+ % of a CPU, in \w+.py:\d+"
    wait_for(lambda: server.get("/grip/1.6").status == 200 and re.search(named, server.log), named)


def test_a_process_whose_hub_turns_no_more_is_replaced_after_timeout(start, stage):
    server = start("--timeout", "2", config=GEVENT)
    client = server.connect().ask("/freeze/x")
    actor = stage.next()
    assert actor.vanished()
    server.wait_log(rf"WORKER TIMEOUT \(pid:{actor.pid}\)")
    assert client.reply().status in (500, 502)
    wait_for(lambda: len(server.workers) == 2 and actor.pid not in server.workers, "another")
    assert server.get("/hello").status == 200


def test_a_slow_request_is_not_stuck_however_old_it_is(start, stage):
    server = start("--timeout", "3", config=ONE)
    clients = hold(server, "slow")
    actor = stage.next()
    before = server.numbers().beat
    wait_for(lambda: server.numbers().beat > before + 7, "more than it, twice")
    assert server.workers == [actor.pid]
    actor.finish()
    close(clients)


def test_a_job_that_cannot_be_given_back_for_want_of_memory_waits_for_the_hub(monkeypatch):
    ours, theirs = pair()
    with ours, theirs, socket.socket() as client:
        sent = Job(7, 1, "", "", b"", b"", False, 0.0, math.inf)
        send_job(theirs, sent, client.fileno())
        end = GreenEnd(ours, ours)
        errands = []
        monkeypatch.setattr(end, "sock", WithoutMemory(ours))
        end.give_back(lambda *errand: errands.append(errand))
        ((deliver, message),) = errands
        deliver(message)
        data, fds = end.receive()
        assert decode_job(data) == sent
        close_all(fds)
        end._watcher.close()


class WithoutMemory:
    """A socket that has room for what comes, and none for what is said."""

    def __init__(self, sock: socket.socket) -> None:
        self.recvmsg = sock.recvmsg

    def send(self, data: bytes, flags: int) -> int:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))


# Signals and settings.


def test_a_reload_changes_the_mode_and_fails_no_request(start, stage):
    server = start(config={**GEVENT, "mode": "thread"})
    with Load(server) as load:
        for mode, threads in (("gevent", 4), ("thread", 2)):
            before = server.workers
            load.go_on(20)
            server.write_config({**GEVENT, "mode": mode, "threads_per_process": threads})
            server.tell(signal.SIGHUP)
            server.wait_log(rf"2 processes x {threads} threads? = .* \({mode} mode\)")
            wait_for(lambda: not set(before) & set(server.workers), "the old ones gone")
            load.go_on(20)
    assert load.failures == []
    holds_four(server, stage)


def test_usr1_reopens_the_logs_of_processes(start):
    server = start("--access-logfile", "access.log", config=ONE)
    server.get("/hello")
    log = server.folder / "access.log"
    wait_for(lambda: "/hello" in log.read_text(), "the access log")
    log.rename(server.folder / "old.log")
    server.tell(signal.SIGUSR1)

    def logged() -> bool:
        server.get("/numbers")
        return log.exists() and "/numbers" in log.read_text()

    wait_for(logged, "the new access log")


NO_GEVENT = "import sys\nsys.modules['gevent'] = None\nfrom replica_plugin.conf import *\n"


def test_without_gevent_gevent_mode_does_not_start_and_says_what_to_install(start):
    files = {"conf.py": NO_GEVENT, "replica.yaml": "mode: gevent\n"}
    ended = start.to_its_end(base=("-c", "conf.py"), files=files)
    assert ended.code != 0 and not ended.listened and "Traceback" not in ended.output
    assert (
        "replica.yaml:1: mode: gevent is not installed. Install it with "
        "`pip install 'replica-plugin[gevent]'`, or say mode: thread."
    ) in ended.output


BROKEN_GEVENT = {
    "gevent.py": "raise ValueError('greenlet.greenlet size changed')\n",
    "conf.py": "import sys\nsys.path.insert(0, '')\nfrom replica_plugin.conf import *\n",
}
CANNOT_BE_IMPORTED = (
    "replica.yaml:1: mode: gevent cannot be imported: "
    "ValueError('greenlet.greenlet size changed'). Mend its installation, or say mode: thread."
)


def test_with_a_gevent_that_cannot_be_imported_gevent_mode_does_not_start_and_says_why(start):
    files = {**BROKEN_GEVENT, "replica.yaml": "mode: gevent\n"}
    ended = start.to_its_end(base=("-c", "conf.py"), files=files)
    assert ended.code != 0 and not ended.listened and "Traceback" not in ended.output
    assert CANNOT_BE_IMPORTED in ended.output


def test_hup_to_a_gevent_that_cannot_be_imported_is_a_mistake_like_any_other(start):
    server = start(base=("-c", "conf.py"), files=BROKEN_GEVENT)
    before = server.workers
    server.write_config({"mode": "gevent"})
    server.tell(signal.SIGHUP)
    server.wait_log(r"The settings from before go on to hold\.")
    assert CANNOT_BE_IMPORTED in server.log
    wait_for(lambda: server.workers and not set(before) & set(server.workers), "new processes")
    assert server.get("/hello").status == 200


# Preload, and patches that come early.

PATCHED_EARLY = "from gevent import monkey\nmonkey.patch_all()\nfrom replica_plugin.conf import *\n"
HOLDS = "from socket import create_connection\nfrom ssl import SSLContext\n"
USES = "import holds\nfrom served_app import application\n"
WARNING = (
    "Imported before gevent's patch, which does not reach them: "
    "holds (SSLContext, create_connection)."
)


def test_preloaded_libraries_that_hold_what_gevent_replaces_are_warned_of(start):
    files = {"holds.py": HOLDS, "uses.py": USES}
    server = start("--preload", config=ONE, app="uses:application", files=files)
    assert WARNING in server.log
    assert server.get("/hello").status == 200
    server = start(config=ONE, app="uses:application", files=files)
    assert "gevent's patch" not in server.log


def test_a_process_with_a_preloaded_flask_app_ends_without_a_word(start):
    files = {"plain.py": "from flask import Flask\n\napplication = Flask('plain')\n"}
    server = start("--preload", config=ONE, app="plain:application", files=files)
    assert server.stop() == 0
    assert "Exception ignored" not in server.log


def test_a_configuration_that_patches_first_works_with_preload(start, stage):
    files = {"conf.py": PATCHED_EARLY, "holds.py": HOLDS, "uses.py": USES}
    base = ("-c", "conf.py", "--preload")
    server = start(config=GEVENT, base=base, app="uses:application", files=files)
    assert "gevent's patch" not in server.log
    holds_four(server, stage)
    assert server.stop() == 0


def test_grpc_is_warned_of_with_what_it_needs(monkeypatch):
    monkeypatch.setitem(early.sys.modules, "grpc", object())
    warning = early.warning(lambda module, name: object())
    assert "grpc (which also needs `grpc.experimental.gevent.init_gevent()`)" in warning


# Many.


def fill(server: Server, count: int) -> list[Client]:
    return [server.connect().ask("/hold/x") for _ in range(count)]


@pytest.mark.parametrize("bound", [4000, 1024])
def test_two_thousand_clients_of_four_hundred_slots(start, stage, bound):
    """All slots run; exactly what is above the bound is refused."""
    config = {**GEVENT, "threads_per_process": 200, "max_replica_concurrency": bound}
    server = start(config=config)
    clients = fill(server, 2000)
    refused = max(0, 2000 - bound)
    actors = stage.take(400)
    server.wait_numbers(running=400, waiting=1600 - refused)
    assert Counter(actor.pid for actor in actors) == dict.fromkeys(server.workers, 200)
    wait_for(lambda: sum(client.is_readable() for client in clients) == refused, "refusals")
    finish(*actors)
    for _ in range(1600 - refused):
        stage.next().finish()
    statuses = Counter(client.reply().status for client in clients)
    assert statuses == Counter({200: 2000 - refused, 503: refused})
    for client in clients:
        client.close()


PATCHING = "from gevent import monkey\nmonkey.patch_all()\nfrom served_app import application\n"


@pytest.mark.parametrize("arguments", [(), ("--preload",)], ids=["loaded", "preloaded"])
def test_in_thread_mode_with_one_slot_an_app_that_has_gevent_patch_python_is_served(
    start, stage, arguments
):
    """A greenlet in place of the attendant's thread would never run, and nothing would say so."""
    config = {"processes_per_replica": 1, "threads_per_process": 1}
    files = {"patching.py": PATCHING}
    server = start(*arguments, config=config, app="patching:application", files=files)
    clients = hold(server, "a", "b")
    actor = stage.next()
    server.wait_numbers(running=1, waiting=1)
    finish(actor)
    stage.next().finish()
    close(clients)


@pytest.mark.parametrize("threads", [1, 2])
def test_in_thread_mode_a_configuration_that_patches_first_leaves_a_stuck_request_interrupted(
    start, stage, threads
):
    """gevent's name for a thread is not the system's: to signal that one would end the process."""
    config = {"processes_per_replica": 1, "threads_per_process": threads, "request_timeout": "1s"}
    base, files = ("-c", "conf.py"), {"conf.py": PATCHED_EARLY}
    server = start(config=config, base=base, app="stuck_app:application", files=files)
    stuck = server.later("/spin/x")
    finish(stage.next())
    assert stuck.result().status == 504
    server.wait_numbers(running=0, processes=1)
    assert re.search(r'stuck_app.py", line \d+, in spin', server.log)
    assert server.get("/count").status == 200
