"""P8: liveness and readiness, asked while the replica can do nothing else."""

from __future__ import annotations

import signal
from collections import Counter

import pytest
from server import BOTH, IN_BOTH_MODES, Server, empty
from stage import Stage

pytestmark = IN_BOTH_MODES

TWO = {"processes_per_replica": 2, "threads_per_process": 2}
HEALTHY, READY = (200, b"healthy\n"), (200, b"ready\n")
NOT_READY = (503, b"not ready\n")


@pytest.fixture
def stage(start) -> Stage:
    return start.stage


def probe(server: Server, name: str, which: int = 0) -> tuple[int, bytes]:
    reply = server.get(f"/-/{name}", which)
    return reply.status, reply.body


def test_probes_answer_while_every_slot_keeps_the_gil_and_the_queue_is_full(start, stage, which):
    server = start(config={**TWO, "max_replica_concurrency": 8}, bind=BOTH)
    kept = server.connect(which)
    clients = [server.connect(which).ask("/seize/x") for _ in range(8)]
    actors = stage.take(2)
    server.wait_in_flight(8)
    assert server.get("/hello", which).status == 503
    for _ in range(10):
        assert probe(server, "healthz", which) == HEALTHY
        assert probe(server, "readyz", which) == READY
        assert kept.get("/-/healthz").status == 200
    assert sum(server.numbers()[4:6]) == 8  # not one of them has ended meanwhile
    empty(clients, actors, stage)


def test_hundreds_of_pipelined_probes_are_all_answered(start, which):
    """Each answer leads to the next request; were it a call in a call, the stack would end."""
    server = start(config=TWO, bind=BOTH)
    dispatcher = server.dispatcher
    with server.connect(which) as client:
        for _ in range(4):
            client.send(b"GET /-/healthz HTTP/1.1\r\nHost: test\r\n\r\n" * 250)
            assert Counter(client.reply().status for _ in range(250)) == {200: 250}
    assert server.dispatcher == dispatcher


def test_a_replica_is_ready_when_all_its_processes_are(start, stage):
    server = start(config=TWO, env={"HOLD_IMPORT": "1"}, ready=False)
    first = stage.next()
    assert (probe(server, "readyz"), probe(server, "healthz")) == (NOT_READY, HEALTHY)
    first.finish()
    server.wait_numbers(processes=1)
    assert (probe(server, "readyz"), probe(server, "healthz")) == (NOT_READY, HEALTHY)
    assert server.get("/hello").status == 200
    stage.next().finish()
    server.wait_ready()


def test_a_replica_that_stops_is_alive_but_not_ready(start, stage, which):
    server = start(config=TWO, bind=BOTH)
    running = server.connect(which).ask("/hold/x")
    actor = stage.next()
    probes = [server.connect(which).send("GET /-/") for _ in range(2)]
    server.wait_numbers(connections=3)
    server.tell(signal.SIGTERM)
    server.wait_closed()
    ready, healthy = (
        client.send(f"{name} HTTP/1.1\r\nHost: test\r\n\r\n").reply()
        for client, name in zip(probes, ("readyz", "healthz"), strict=True)
    )
    actor.finish()
    assert (ready.status, healthy.status) == (503, 200)
    assert running.reply().status == 200
    assert server.process.wait(20) == 0


def test_a_probes_path_with_a_query_and_a_head_request_are_probes_and_a_post_is_none(start):
    server = start(config=TWO)
    assert probe(server, "readyz?verbose") == READY
    with server.connect() as client:
        reply = client.ask("/-/healthz", method="HEAD").reply("HEAD")
        assert (reply.status, reply.body) == (200, b"")
        assert client.ask("/-/healthz", method="POST", body=b"").reply().status == 404


def test_probes_that_are_off_are_requests_like_others(start):
    server = start(config={**TWO, "probes": False})
    assert server.get("/-/healthz").status == 404
