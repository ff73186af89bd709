"""Exempt paths: served while the replica is full, and counted nowhere.

That is thread mode's, with a slot of their own beside several. With one, and in gevent mode, there
is none, and they only come first.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from server import BOTH, Server, empty, wait_for
from stage import Stage

CROWDED = "All slots for exempt paths are busy, and 16 requests wait for them, as many as may.\n"


def config(p: int = 2, t: int = 2, **more: object) -> dict[str, object]:
    return {
        "processes_per_replica": p,
        "threads_per_process": t,
        "max_replica_concurrency": 10,
        "exempt": ["/hold/exempt", "/hello"],
        **more,
    }


@pytest.fixture(scope="module")
def replica(module_start):
    return module_start(config=config(), bind=BOTH)


@pytest.fixture
def stage(replica, module_start) -> Iterator[Stage]:
    yield module_start.stage
    replica.wait_numbers(running=0, waiting=0)


def fill(server: Server, stage: Stage, running: int, which: int = 0) -> tuple[list, list]:
    """Ten requests in flight, of which so many run."""
    server.wait_numbers(running=0, waiting=0)
    clients = [server.connect(which).ask(f"/hold/{n}") for n in range(10)]
    server.wait_numbers(running=running, waiting=10 - running)
    return clients, stage.take(running)


def test_an_exempt_request_is_served_at_once_while_the_replica_is_full(replica, stage, which):
    clients, actors = fill(replica, stage, 4, which)
    assert replica.get("/numbers", which).status == 503
    assert replica.get("/hello", which).status == 200
    assert replica.get("/hello?x=1", which).status == 200
    empty(clients, actors, stage, 6)


@pytest.mark.parametrize(
    "path", ["/hell%6f", "/hello/", "//hello", "/Hello", "/hello;x", "/hello#x"]
)
def test_a_path_that_is_not_the_same_byte_for_byte_is_not_exempt(replica, stage, path):
    clients, actors = fill(replica, stage, 4)
    assert replica.get(path).status == 503
    empty(clients, actors, stage, 6)


def test_a_head_that_two_readers_may_take_for_two_is_not_exempt(replica, stage):
    clients, actors = fill(replica, stage, 4)
    with replica.connect() as client:
        client.send("GET /hello HTTP/1.1\r\nHost: test\r\nX: y\r\n folded\r\n\r\n")
        assert client.reply().status == 503
    empty(clients, actors, stage, 6)


def test_exempt_requests_that_run_are_not_in_flight_and_there_is_one_slot_a_process(replica, stage):
    exempt = [replica.connect().ask("/hold/exempt") for _ in range(2)]
    first = stage.take(2)
    assert len({actor.pid for actor in first}) == 2
    clients, actors = fill(replica, stage, 4)
    exempt.append(replica.connect().ask("/hold/exempt"))
    first[0].finish()
    next_one = stage.next()
    assert (next_one.name, next_one.pid) == ("exempt", first[0].pid)
    replica.wait_numbers(running=4, waiting=6)
    empty(clients, actors, stage, 6)
    empty(exempt, [first[1], next_one], stage, 0)


def test_sixteen_exempt_requests_may_wait_and_the_next_gets_503(replica, stage):
    clients = [replica.connect().ask("/hold/exempt") for _ in range(18)]
    actors = stage.take(2)
    assert replica.get("/-/readyz").status == 200  # it came behind them, so they are judged
    replies = [replica.connect().ask("/hold/exempt") for _ in range(3)]
    refused = [each for each in replies if each.reply().body.decode() == CROWDED]
    assert len(refused) == 3
    assert replica.get("/numbers").status == 200
    empty(clients, actors, stage, 16)


def test_queue_timeout_holds_for_exempt_requests_too(replica, stage):
    clients = [replica.connect().ask("/hold/exempt") for _ in range(2)]
    actors = stage.take(2)
    assert replica.get("/hello", X_Queue_Timeout="0.1").status == 503
    empty(clients, actors, stage, 0)


@pytest.mark.parametrize(
    ("mode", "t"), [("thread", 1), ("gevent", 1), ("gevent", 2)], indirect=["mode"]
)
def test_without_a_slot_of_its_own_an_exempt_request_goes_to_the_head_of_the_queue(start, t):
    server, stage = start(config=config(1, t)), start.stage
    clients, actors = fill(server, stage, t)
    exempt = server.connect().ask("/hold/exempt")
    assert server.get("/numbers").status == 503
    actors.pop().finish()
    first = stage.next()
    assert (first.name, first.main) == ("exempt", True)
    server.wait_numbers(running=t - 1, waiting=10 - t)
    assert stage.is_empty()
    empty([exempt], [first], stage, 0)
    empty(clients, actors, stage, 10 - t)
    assert server.get("/numbers").json["high"] == t


def test_the_cap_holds_while_exempt_requests_run_and_the_dispatcher_dies(start):
    server, stage = start(config=config(1, 2)), start.stage
    clients = [server.connect().ask(path) for path in ("/hold/a", "/hold/exempt", "/hold/b")]
    actors = {actor.name: actor for actor in stage.take(3)}
    before = server.dispatcher
    server.tell(signal.SIGKILL, before)
    wait_for(lambda: server.dispatcher != before, "another dispatcher")
    clients.append(server.connect().ask("/hold/c"))
    server.wait_numbers(running=2, waiting=1)
    actors["exempt"].finish()
    assert clients[1].reply().status == 200
    server.wait_numbers(running=2, waiting=1)
    assert stage.is_empty()
    actors["a"].finish()
    actors["c"] = stage.next()
    assert actors["c"].name == "c"
    empty([clients[0], *clients[2:]], [actors["b"], actors["c"]], stage, 0)


def test_paths_that_become_exempt_in_a_reload_get_a_slot_of_their_own(start):
    server, stage = start(config=config(1, 2, exempt=[])), start.stage
    server.write_config(config(1, 2))
    old = server.workers
    server.tell(signal.SIGHUP)
    wait_for(lambda: server.workers and not set(server.workers) & set(old), "new processes")
    clients, actors = fill(server, stage, 2)
    assert server.get("/hello").status == 200
    empty(clients, actors, stage, 8)
