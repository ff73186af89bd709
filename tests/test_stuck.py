"""P11: requests that run for longer than request_timeout, on real servers."""

from __future__ import annotations

import http.client
import re
import signal
import time
from contextlib import suppress

import pytest
from server import IN_BOTH_MODES, STOCK, Load, Server, cpu, wait_for
from stage import PATIENCE, Actor, Stage
from wire import Wire, request

from replica_plugin import overtime

LIMIT = 1.5
SHORT_GRACE = """\
from replica_plugin import overtime
overtime.GRACE = {}
from replica_plugin.conf import *
"""
LOGGER = """\
import os
from gunicorn.glogging import Logger
class Spinning(Logger):
    def access(self, *arguments):
        while not os.path.exists("go"):
            pass
        super().access(*arguments)
"""
SLOW_HOOK = """\
import os
from replica_plugin.conf import *
def pre_request(worker, request):
    while request.path == "/hold/x" and not os.path.exists("go"):
        pass
"""
TOLD = f"The app did not answer within request_timeout ({LIMIT} s).\n".encode()


@pytest.fixture
def stage(start) -> Stage:
    return start.stage


@pytest.fixture
def serve(start):
    """A server with a short request_timeout; and with a short grace, if it is to end anything."""

    def serve(
        threads: int, processes: int = 1, grace: float = 0, *arguments: str, limit: float = LIMIT
    ) -> Server:
        config = {
            "processes_per_replica": processes,
            "threads_per_process": threads,
            "request_timeout": limit,
        }
        base = ("-c", "short.py") if grace else ("-c", "python:replica_plugin.conf")
        files = {"short.py": SHORT_GRACE.format(grace)} if grace else None
        app = "stuck_app:application"
        return start(
            "--access-logfile", "-", *arguments, config=config, app=app, base=base, files=files
        )

    return serve


def let(stage: Stage, name: str) -> int:
    """Let the request of this name get stuck; the pid of its process."""
    actor = stage.next()
    assert actor.name == name
    release(actor)
    return actor.pid


def release(actor: Actor) -> None:
    """Let it go on, unless its time was over as it was held: it went on by itself."""
    with suppress(BrokenPipeError):
        actor.finish()


both = pytest.mark.parametrize("threads", [1, 2])


@IN_BOTH_MODES
@both
@pytest.mark.parametrize("how", ["spin", "clean"])
def test_python_code_is_interrupted_and_its_slot_goes_on(serve, stage, threads, how):
    server = serve(threads)
    stuck = server.later(f"/{how}/x")
    pid = let(stage, "x")
    reply = stuck.result()
    assert (reply.status, reply.body, reply.headers["Connection"]) == (504, TOLD, "close")
    server.wait_numbers(running=0, processes=1)
    assert server.get("/count").json == {"ended": int(how == "clean"), "pid": pid}
    server.wait_log(rf"GET /{how}/x in process {pid} has run for longer than request_timeout")
    assert re.search(r'stuck_app.py", line \d+, in spin', server.log)
    assert re.findall(rf'"GET /{how}/x HTTP/1.1" (\d+)', server.log) == ["504"]
    assert f"504: {TOLD.decode().strip()}" in server.log


@IN_BOTH_MODES
@pytest.mark.parametrize("how", ["sleep/100", "read/sleep"])
def test_with_one_thread_a_call_that_blocks_is_interrupted(serve, stage, how):
    server = serve(1)
    stuck = server.later(f"/{how}")
    pid = let(stage, "sleep")
    assert stuck.result().status == 504
    server.wait_numbers(running=0)
    assert server.get("/count").json["pid"] == pid


def test_a_call_that_blocks_beside_others_is_answered_in_time_and_keeps_its_slot_until_it_ends(
    serve, stage
):
    """With two threads there is no way to end a sleep; what waits gets the slot when it ends."""
    server = serve(2)
    stuck = [server.later("/sleep/6") for _ in range(2)]
    (pid,) = {let(stage, "sleep") for _ in range(2)}
    assert [each.result().status for each in stuck] == [504] * 2
    waiting = server.later("/count")
    server.wait_numbers(running=2, waiting=1)
    assert waiting.result().json["pid"] == pid
    server.wait_numbers(running=0)


@IN_BOTH_MODES
@both
def test_a_response_that_has_begun_is_cut_short_and_its_slot_goes_on(serve, stage, threads):
    server = serve(threads)
    with server.connect() as client:
        client.ask("/begun/x")
        pid = let(stage, "x")
        with pytest.raises(http.client.IncompleteRead) as cut:
            client.reply()
        assert cut.value.partial == b"some"
    server.wait_numbers(running=0)
    assert server.get("/count").json["pid"] == pid
    assert re.findall(r'"GET /begun/x HTTP/1.1" (\d+)', server.log) == ["200"]


@IN_BOTH_MODES
@both
def test_early_hints_do_not_stand_in_for_an_answer(serve, stage, threads):
    server = serve(threads)
    with Wire(server.address) as wire:
        wire.send(request("/hinted/x"))
        let(stage, "x")
        assert [wire.reply().status, wire.reply().body] == [103, TOLD]
        server.wait_numbers(running=0, processes=1)
    assert re.findall(r'"GET /hinted/x HTTP/1.1" (\d+)', server.log) == ["504"]


@IN_BOTH_MODES
@both
def test_a_response_that_is_complete_arrives_whole_though_its_close_is_interrupted(
    serve, stage, threads
):
    server = serve(threads)
    with server.connect() as client:
        client.ask("/closing/x")  # and reads nothing: the kernel has room for a part of it
        let(stage, "x")
        server.wait_log("in process \\d+ has run for longer than request_timeout")
        server.wait_numbers(running=0)
        assert client.reply().body == b"c" * (7 << 20)


@IN_BOTH_MODES
@both
def test_a_connection_goes_on_after_a_complete_response_whose_close_is_interrupted(
    serve, stage, threads
):
    server = serve(threads, 1, 0, "--keep-alive", "20")
    with server.connect() as client:
        assert client.get("/folding/x").body == b"c"
        let(stage, "x")
        server.wait_log("in process \\d+ has run for longer than request_timeout")
        assert client.get("/count").status == 200


@IN_BOTH_MODES
@both
def test_code_that_swallows_the_interrupt_keeps_its_slot_until_it_ends(serve, stage, threads):
    server = serve(threads)
    stuck = server.later("/swallow/x")
    pid = let(stage, "x")
    assert stuck.result().status == 504
    actor = stage.next()
    assert actor.name == "x-swallowed"
    server.wait_numbers(running=1, processes=1)
    actor.finish()
    server.wait_numbers(running=0)
    assert server.get("/count").json["pid"] == pid


@IN_BOTH_MODES
@both
def test_code_that_does_not_end_within_the_grace_costs_its_process_and_nobody_else(
    serve, stage, threads
):
    server = serve(threads, 2, 1.0, limit=3.0)
    stuck = server.later("/swallow/x")
    pid = let(stage, "x")
    assert stuck.result().status == 504
    with Load(server) as load:
        assert stage.next().vanished()
        wait_for(lambda: len(server.workers) == 2 and pid not in server.workers, "a successor")
        server.wait_numbers(processes=2)
        load.go_on(20)
    assert load.failures == []
    server.wait_log(f"Process {pid} runs only stuck requests: killing it")


@IN_BOTH_MODES
@both
def test_code_that_keeps_the_gil_costs_its_process_and_what_waits_goes_on(serve, stage, threads):
    server = serve(threads, 1, 1.0)
    stuck = server.later("/grip/x")
    pid = let(stage, "x")
    used = cpu(pid)
    wait_for(lambda: cpu(pid) > used + 0.1, "it keeps the GIL")
    waiting = [server.later("/count") for _ in range(3)]
    reply = stuck.result()
    assert (reply.status, reply.body) == (504, TOLD)
    assert {each.result().status for each in waiting} == {200}
    assert server.get("/count").json["pid"] != pid
    server.wait_log(f"Process {pid} does not answer, and has a stuck request: killing it.")
    assert "it finishes what else it runs" not in server.log
    assert re.search(r'stuck_app.py", line \d+ in grip', server.log)
    assert re.findall(r'"GET /grip/x HTTP/1.1" (\d+)', server.log) == ["504"]


@IN_BOTH_MODES
def test_beside_one_that_keeps_the_gil_what_is_not_overdue_is_lost_with_the_process(serve, stage):
    """Its process is killed soon after the stuck one is overdue, long before it is."""
    server = serve(2, 1, 1.0, limit=6.0)
    began = time.monotonic()
    stuck = server.later("/grip/x")
    gripping = stage.next()
    wait_for(lambda: time.monotonic() > began + 3.0, "three seconds")
    beside = server.later("/hold/y")
    other = stage.next()
    assert other.name == "y"
    gripping.finish()
    assert (stuck.result().status, beside.result().status) == (504, 502)
    assert beside.result().body == b"The process that was working on this request died.\n"
    assert server.get("/count").json["pid"] != gripping.pid


@pytest.mark.slow
def test_processes_are_replaced_for_stuck_requests_no_more_often_than_they_may(serve, stage):
    """With one process it is one in CALM seconds: a deploy in which all get stuck cannot thrash."""
    server = serve(1, 1, 1.0)
    killed = []
    for name in "xy":
        stuck = server.later(f"/swallow/{name}")
        pid = let(stage, name)
        assert stuck.result().status == 504
        goes_on = stage.next()
        assert goes_on.name == f"{name}-swallowed"
        wait_for(lambda: pid not in server.workers, "its end", timeout=overtime.CALM + PATIENCE)
        killed.append(time.monotonic())
        server.wait_numbers(processes=1)
    assert killed[1] - killed[0] > overtime.CALM - 5
    assert server.get("/count").status == 200


def test_stock_gunicorn_does_not_notice_a_stuck_thread(start, stage):
    """The control: gthread's `timeout` watches over the process, which goes on."""
    options = ("--threads", "2", "--timeout", "3")
    server = start(*options, base=STOCK, app="stuck_app:application", ready=False)
    stuck = server.later("/sleep/7")
    pid = let(stage, "sleep")
    assert stuck.result().status == 200
    assert server.get("/count").json["pid"] == pid
    assert "TIMEOUT" not in server.log


@IN_BOTH_MODES
def test_a_process_that_is_stopped_is_killed_and_its_request_answered(serve, stage):
    server = serve(1, 1, 1.0)
    stuck = server.later("/hold/x")
    actor = stage.next()
    server.tell(signal.SIGSTOP, actor.pid)
    assert stuck.result().status == 504
    assert actor.vanished()
    assert server.get("/count").json["pid"] != actor.pid
    server.wait_log(r"Its stacks:\n\(not known\)")


@IN_BOTH_MODES
def test_processes_that_were_frozen_with_the_dispatcher_are_not_taken_for_stuck(serve, stage):
    server = serve(1, 1, 4.0)
    began = time.monotonic()
    stuck = server.later("/hold/x")
    actor = stage.next()
    frozen = [server.dispatcher, server.supervisor, actor.pid]  # it would kill one that hangs
    for each in frozen:
        server.tell(signal.SIGSTOP, each)
    wait_for(lambda: time.monotonic() > began + LIMIT + 4.5, "the end of the grace")
    thawed = time.monotonic()
    for each in frozen:
        server.tell(signal.SIGCONT, each)
        wait_for(lambda: each != server.dispatcher or server.numbers().beat > thawed, "its turn")
    assert stuck.result().status == 504
    server.wait_numbers(running=0)
    assert server.get("/count").json["pid"] == actor.pid
    assert "killing it" not in server.log


@IN_BOTH_MODES
@both
def test_without_the_dispatcher_that_sent_it_a_request_is_answered_too(serve, stage, threads):
    server = serve(threads)
    stuck = server.later("/spin/x")
    actor = stage.next()
    old = server.dispatcher
    server.tell(signal.SIGKILL, old)
    wait_for(lambda: server.children(server.supervisor) not in ([], [old]), "the next dispatcher")
    release(actor)
    reply = stuck.result()
    assert (reply.status, reply.body, reply.headers["Connection"]) == (504, TOLD, "close")
    server.wait_numbers(running=0)
    assert server.get("/count").json["pid"] == actor.pid


@IN_BOTH_MODES
@both
def test_a_dispatcher_that_hangs_and_dies_keeps_nobody_from_the_answer(serve, stage, threads):
    """It was told that the request is overdue, and never came to do anything about it."""
    server = serve(threads)
    stuck = server.later("/swallow/x")
    pid = let(stage, "x")
    old = server.dispatcher
    server.tell(signal.SIGSTOP, old)
    reply = stuck.result()
    assert (reply.status, reply.body, reply.headers["Connection"]) == (504, TOLD, "close")
    server.tell(signal.SIGKILL, old)
    wait_for(lambda: server.children(server.supervisor) not in ([], [old]), "the next dispatcher")
    stage.next().finish()
    server.wait_numbers(running=0)
    assert server.get("/count").json["pid"] == pid


@IN_BOTH_MODES
@both
def test_a_logger_is_not_interrupted_which_might_stay_locked(start, threads):
    config = {"threads_per_process": threads, "request_timeout": LIMIT}
    logger = ("--logger-class", "spinning.Spinning", "--access-logfile", "-", "--keep-alive", "20")
    server = start(*logger, config=config, files={"spinning.py": LOGGER})
    with server.connect() as client:
        client.get("/hello")
        server.wait_log("GET /hello in process .* has run for longer than request_timeout")
        (server.folder / "go").touch()
        server.wait_log('"GET /hello HTTP/1.1" 200')
        assert client.get("/hello").status == 200


@IN_BOTH_MODES
@both
def test_a_request_whose_time_is_over_in_a_hook_does_not_reach_the_app(start, stage, threads):
    config = {"threads_per_process": threads, "request_timeout": LIMIT}
    server = start(config=config, base=("-c", "hook.py"), files={"hook.py": SLOW_HOOK})
    reply = server.get("/hold/x")
    assert (reply.status, reply.body) == (504, TOLD)
    (server.folder / "go").touch()
    server.wait_numbers(running=0, processes=1)
    assert stage.is_empty()


@IN_BOTH_MODES
def test_requests_that_end_in_time_are_left_alone(serve, stage):
    server = serve(2, 2, limit=3.0)
    with Load(server, "/near/0.01") as load:
        load.go_on(200)
    assert load.failures == []
    assert "request_timeout" not in server.log


@IN_BOTH_MODES
@both
def test_a_response_that_is_interrupted_while_it_is_sent_is_cut_short_and_nothing_is_sent_twice(
    start, threads
):
    """Long before send_timeout, and without the end of its process."""
    server = start_hasty(start, threads, response_buffer="1Mi")
    workers = server.workers
    whole = b"".join(n.to_bytes(8, "big") for n in range(1 << 17)) * 24
    with server.connect() as client:
        client.ask("/large/24/one")
        server.wait_log("has run for longer than request_timeout")
        server.wait_numbers(running=0)
        received = bytearray()
        while part := client.sock.recv(1 << 20):
            received += part
    body = bytes(received).partition(b"\r\n\r\n")[2]
    assert len(body) < len(whole)
    assert whole.startswith(body)
    assert server.workers == workers


@IN_BOTH_MODES
@both
def test_a_file_that_a_client_does_not_take_is_cut_short_and_its_slot_goes_on(start, threads):
    server = start_hasty(start, threads, response_buffer="1Mi")
    workers = server.workers
    with server.connect() as client:
        client.ask(f"/file/{24 << 20}")
        server.wait_log("has run for longer than request_timeout")
        server.wait_numbers(running=0)
        assert client.sock.recv(15) == b"HTTP/1.1 200 OK"
    assert server.workers == workers


@IN_BOTH_MODES
@both
def test_a_body_that_stalls_is_answered_504_and_its_slot_goes_on(start, threads):
    server = start_hasty(start, threads, request_buffer="64Ki")
    workers = server.workers
    with server.connect() as client:
        client.send(f"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: {1 << 20}\r\n\r\n")
        client.send("x" * (1 << 17))
        assert client.reply().status == 504
        server.wait_numbers(running=0)
    assert server.workers == workers


def start_hasty(start, threads: int, **more: str) -> Server:
    """Patient with clients, not with requests: a process soon ends for one that is stuck."""
    config = {"threads_per_process": threads, "request_timeout": LIMIT}
    config |= {"send_timeout": "30s", "receive_timeout": "30s", **more}
    return start(
        config=config, base=("-c", "short.py"), files={"short.py": SHORT_GRACE.format(1.0)}
    )
