"""P4, P9 and P10: who is admitted, who waits in vain, and what they are told."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from server import BOTH, IN_BOTH_MODES, Client, Server, empty, wait_for
from stage import Actor, Stage

from replica_plugin import doubts

pytestmark = IN_BOTH_MODES

PIPELINED = 150
FULL = (
    "The replica is full: 10 requests are in flight, "
    "as many as max_replica_concurrency (10) admits."
)


def config(bound: int = 10, **more: object) -> dict[str, object]:
    two = {"processes_per_replica": 2, "threads_per_process": 2}
    return {**two, "max_replica_concurrency": bound, **more}


@pytest.fixture(scope="module")
def replica(module_start):
    kept = ("--keep-alive", "60")  # longer than any test
    return module_start(*kept, "--access-logfile", "access.log", config=config(), bind=BOTH)


@pytest.fixture
def stage(replica, module_start) -> Iterator[Stage]:
    yield module_start.stage
    replica.wait_numbers(running=0, waiting=0)


def fill(
    server: Server, stage: Stage, which: int, count: int = 10
) -> tuple[list[Client], list[Actor]]:
    """Clients of so many requests, of which the first four run."""
    server.wait_numbers(running=0, waiting=0)
    clients = [server.connect(which).ask("/hold/first") for _ in range(count)]
    server.wait_numbers(running=4, waiting=count - 4)
    return clients, stage.take(4)


def fifty_at_once(server: Server, stage: Stage, which: int) -> Counter[int]:
    """Statuses of 50 requests, of which none ends before all that are refused were told."""
    server.wait_numbers(running=0, waiting=0)
    clients = [server.connect(which).ask("/hold/x") for _ in range(50)]
    wait_for(lambda: sum(client.is_readable() for client in clients) >= 40, "40 refusals")
    server.wait_numbers(running=4, waiting=6)
    refused = [client for client in clients if client.is_readable()]
    statuses = Counter(client.reply().status for client in refused)
    empty([client for client in clients if client not in refused], stage.take(4), stage)
    return statuses


def test_fifty_clients_at_a_bound_of_ten_are_ten_answered_and_forty_refused(replica, stage, which):
    for _ in range(3):
        assert fifty_at_once(replica, stage, which) == {503: 40}


def test_refusals_have_the_status_that_was_asked_for(start, stage_of_start):
    server = start(config=config(overload_status=429), bind=BOTH)
    assert fifty_at_once(server, stage_of_start, 0) == {429: 40}


@pytest.fixture
def stage_of_start(start):
    return start.stage


@pytest.mark.parametrize(("method", "path"), [("GET", "/close/first"), ("HEAD", "/begun/first")])
def test_a_refusal_waits_for_a_slot_whose_answer_is_there_and_which_has_not_reported_yet(
    start, stage_of_start, method, path
):
    """The answer to a HEAD is there when its head is, whatever the app still makes of a body."""
    one = {"processes_per_replica": 1, "max_replica_concurrency": 1}
    server = start(config=one)
    first = server.connect().ask(path, method)
    actor = stage_of_start.next()
    assert first.reply(method).status == 200
    asked = time.monotonic()
    assert server.get("/hello").status == 503
    assert time.monotonic() - asked >= doubts.PATIENCE
    actor.finish()
    server.wait_numbers(running=0, waiting=0)


def test_a_refusal_names_key_and_value_and_when_to_come_again(replica, stage, which):
    clients, actors = fill(replica, stage, which)
    reply = replica.get("/hello", which)
    empty(clients, actors, stage)
    assert (reply.status, reply.body.decode()) == (503, f"{FULL}\n")
    assert reply.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert 1 <= int(reply.headers["Retry-After"]) <= 60


def test_a_refusal_is_json_for_who_accepts_json(replica, stage, which):
    clients, actors = fill(replica, stage, which)
    reply = replica.get("/hello", which, Accept="text/html, application/json;q=0.9")
    empty(clients, actors, stage)
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.json == {"error": "Service Unavailable", "detail": FULL}


def test_a_refused_get_leaves_its_connection_alive(replica, stage, which):
    clients, actors = fill(replica, stage, which)
    client = replica.connect(which)
    assert [client.get("/hello").status for _ in range(3)] == [503] * 3
    assert client.ask("/hello", method="HEAD").reply("HEAD").status == 503
    empty(clients, actors, stage)
    assert client.get("/hello").status == 200
    client.close()


@pytest.mark.parametrize("value", ["close", "Close", " foo , close"])
def test_a_refused_get_that_asks_for_the_end_of_its_connection_gets_it(
    replica, stage, which, value
):
    clients, actors = fill(replica, stage, which)
    client = replica.connect(which)
    client.send(f"GET /hello HTTP/1.1\r\nHost: test\r\nConnection:{value}\r\n\r\n")
    assert client.reply().headers["Connection"] == "close"
    assert client.is_closed()
    empty([*clients], actors, stage)
    client.close()


def test_a_refused_post_is_told_though_much_of_its_body_is_still_on_the_way(replica, stage, which):
    clients, actors = fill(replica, stage, which)
    with replica.connect(which) as client:
        reply = client.ask("/echo", method="POST", body=b"x" * 3_000_000).reply()
        assert (reply.status, reply.headers["Connection"]) == (503, "close")
        assert client.is_closed()
    empty(clients, actors, stage)


def test_hundreds_of_pipelined_requests_are_all_refused(replica, stage, which):
    """Each answer leads to the next request; were it a call in a call, the stack would end.

    Not more than a Unix socket holds the answers to (1,280 bytes each of 208 KiB), unread.
    """
    dispatcher = replica.dispatcher
    clients, actors = fill(replica, stage, which)
    with replica.connect(which) as client:
        for _ in range(4):
            client.send(b"GET /hello HTTP/1.1\r\nHost: test\r\n\r\n" * PIPELINED)
            assert Counter(client.reply().status for _ in range(PIPELINED)) == {503: PIPELINED}
    empty(clients, actors, stage)
    assert replica.dispatcher == dispatcher


def test_refusals_are_in_the_access_log(replica, stage, which):
    log = replica.folder / "access.log"
    clients, actors = fill(replica, stage, which)
    assert replica.get(f"/refused/{which}?q", which, User_Agent="me").status == 503
    empty(clients, actors, stage)
    assert replica.get(f"/hello?{which}", which).status == 200
    wait_for(lambda: f"/hello?{which}" in log.read_text(), "the access log")
    (line,) = (line for line in log.read_text().splitlines() if f"/refused/{which}?q" in line)
    size = len(FULL) + 1
    assert line.endswith(f'"GET /refused/{which}?q HTTP/1.1" 503 {size} "-" "me"')


def test_lowering_the_bound_evicts_nobody(start, stage_of_start):
    server = start(config=config())
    clients, actors = fill(server, stage_of_start, 0)
    server.write_config(config(bound=5))
    server.tell(signal.SIGHUP)
    server.wait_log(r"max_replica_concurrency 5\)")
    wait_for(lambda: "(5) admits" in server.get("/hello").body.decode(), "the new bound")
    empty(clients, actors, stage_of_start)
    assert server.get("/hello").status == 200


@pytest.mark.parametrize("leave", [Client.close, Client.reset], ids=["close", "reset"])
def test_a_waiting_request_whose_client_left_is_not_run(replica, stage, which, leave):
    clients, actors = fill(replica, stage, which, count=4)
    leaving = [replica.connect(which).ask("/hold/left") for _ in range(3)]
    replica.wait_numbers(waiting=3)
    clients.append(replica.connect(which).ask("/hold/stayed"))
    replica.wait_numbers(waiting=4)
    for client in leaving:
        leave(client)
    replica.wait_numbers(waiting=1)
    actors.pop().finish()
    actors.append(stage.next())
    assert actors[-1].name == "stayed"
    empty(clients, actors, stage, waiting=0)


def last(least: float, most: float, waits: Callable[[], list[float]]) -> None:
    """A busy machine makes waits longer, never shorter: of three times, once is enough."""
    for _ in range(3):
        seconds = waits()
        assert min(seconds) > least
        if max(seconds) < most:
            return
    pytest.fail(f"three times longer than {most} s, at last {seconds}")


def test_queue_timeout_is_kept_on_time_while_no_slot_frees_up(start, stage_of_start, which):
    server = start(config=config(bound=100, queue_timeout="700ms"), bind=BOTH)
    clients, actors = fill(server, stage_of_start, which, count=4)

    def wait_in_vain() -> list[float]:
        late, waits = [], []
        for _ in range(4):
            late.append((time.monotonic(), server.connect(which).ask("/hold/late")))
        for began, client in late:
            reply = client.reply()
            waits.append(time.monotonic() - began)
            assert reply.status == 503
            assert reply.body == b"No slot became free within queue_timeout (0.7 s).\n"
            client.close()
        return waits

    last(0.69, 1.5, wait_in_vain)
    assert stage_of_start.is_empty()
    empty(clients, actors, stage_of_start, waiting=0)


def test_a_client_may_shorten_its_own_wait_and_overtakes_nobody_with_it(replica, stage, which):
    clients, actors = fill(replica, stage, which, count=5)

    def wait_in_vain() -> list[float]:
        began = time.monotonic()
        reply = replica.get("/hold/late", which, X_Queue_Timeout="0.3")
        waited = time.monotonic() - began
        assert reply.status == 503
        assert reply.body == b"No slot became free within X-Queue-Timeout (0.3 s).\n"
        return [waited]

    last(0.29, 1.5, wait_in_vain)
    assert replica.get("/hold/late", which, X_Queue_Timeout="0").status == 503
    empty(clients, actors, stage, waiting=1)
    replica.wait_numbers(running=0)
    assert replica.get("/hello", which, X_Queue_Timeout="0").status == 200


def test_a_client_may_not_lengthen_its_wait(start, stage_of_start):
    server = start(config=config(bound=100, queue_timeout="300ms"))
    clients, actors = fill(server, stage_of_start, 0, count=4)
    reply = server.get("/hold/late", X_Queue_Timeout="60")
    assert reply.body == b"No slot became free within queue_timeout (0.3 s).\n"
    empty(clients, actors, stage_of_start, waiting=0)


def test_a_stream_of_refusals_takes_no_admitted_request_with_it(replica, stage, which):
    """New and kept-alive connections refused by the thousand while ten are in flight."""
    clients, actors = fill(replica, stage, which)
    kept = replica.connect(which)
    for _ in range(200):
        assert replica.get("/hello", which).status == 503
        assert [kept.get("/hello").status for _ in range(4)] == [503] * 4
    kept.close()
    assert replica.numbers()[4:6] == (6, 4)
    empty(clients, actors, stage)


def test_a_dry_run_admits_all_and_tells_how_many_would_have_been_refused(start, stage_of_start):
    server = start(config=config(overload_dry_run=True))
    clients, actors = fill(server, stage_of_start, 0)
    clients += [server.connect().ask("/hold/spared") for _ in range(5)]
    server.wait_numbers(waiting=11, spared=5)
    line = r"\[WARNING\] Dry run: beyond max_replica_concurrency \(10\), and admitted"
    assert server.wait_log(line)
    empty(clients, actors, stage_of_start, waiting=11)
    clients, actors = fill(server, stage_of_start, 0)
    empty(clients, actors, stage_of_start)
    assert server.numbers().spared == 5


def test_what_a_dry_run_counts_outlives_the_dispatcher(start, stage_of_start):
    server = start(config=config(5, overload_dry_run=True))
    clients, actors = fill(server, stage_of_start, 0, count=6)
    server.wait_numbers(spared=1)
    before = server.dispatcher
    server.tell(signal.SIGKILL, before)
    for actor in actors:
        actor.finish()
    assert [client.reply().status for client in clients[:4]] == [200] * 4
    wait_for(lambda: server.dispatcher != before, "another dispatcher")
    assert server.get("/hello").status == 200
    assert server.numbers().spared == 1
