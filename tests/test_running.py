"""P1, P2 and P3: which slot a request gets, how many run at once, and in which order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from server import BOTH, IN_BOTH_MODES, STOCK, Client, Server
from stage import Stage

pytestmark = IN_BOTH_MODES

ROUNDS = 20
KEPT = ("--keep-alive", "60")  # longer than any test


@pytest.fixture(scope="module")
def replica(module_start):
    config = {"processes_per_replica": 2, "threads_per_process": 2}
    return module_start(*KEPT, config=config, bind=BOTH)


@pytest.fixture
def stage(replica, module_start) -> Iterator[Stage]:
    yield module_start.stage
    replica.wait_numbers(running=0, waiting=0)


def burn_in_pairs(
    server: Server, which: int, kept: bool, settle: Callable[[], None] = lambda: None
) -> list[bool]:
    """Of each round, whether two requests that keep the GIL ran in different processes."""
    kept_alive = [server.connect(which) for _ in range(2)]
    outcomes = []
    for _ in range(ROUNDS):
        settle()
        clients = kept_alive if kept else [server.connect(which) for _ in range(2)]
        for client in clients:
            client.ask("/burn/1")
        outcomes.append(len({client.reply().json["pid"] for client in clients}) == 2)
        if not kept:
            close(clients)
    close(kept_alive)
    return outcomes


def close(clients: list[Client]) -> None:
    for client in clients:
        client.close()


@pytest.mark.parametrize(("which", "kept"), [(0, False), (1, True)], ids=["tcp-new", "unix-kept"])
def test_a_pair_that_keeps_the_gil_runs_in_different_processes_in_every_round(replica, which, kept):
    idle = partial(replica.wait_numbers, running=0)
    assert burn_in_pairs(replica, which, kept, idle) == [True] * ROUNDS


def test_control_stock_gthread_puts_pairs_that_keep_the_gil_into_one_process(start):
    server = start(*KEPT, "-w", "2", "--threads", "2", base=STOCK)
    kept_alive = [server.connect() for _ in range(3)]  # to two processes, so two share one
    pids = [client.get("/numbers/").json["pid"] for client in kept_alive]
    pair = [client for client, pid in zip(kept_alive, pids) if pids.count(pid) > 1][:2]
    for client in pair:
        client.ask("/burn/1")
    assert len({client.reply().json["pid"] for client in pair}) == 1
    close(kept_alive)


@pytest.mark.parametrize("kept", [False, True], ids=["new", "kept"])
def test_four_requests_begin_at_once_in_every_round(replica, stage, which, kept):
    clients = [replica.connect(which) for _ in range(4)]
    for _ in range(ROUNDS):
        for client in clients:
            client.ask("/hold/x")
        for actor in stage.take(4):
            actor.finish()
        assert [client.reply().status for client in clients] == [200] * 4
        if not kept:
            close(clients)
            clients = [replica.connect(which) for _ in range(4)]
    close(clients)


def test_sixty_clients_never_run_more_than_t_in_one_process(start):
    """The app itself counts, for as long as it is inside a request."""
    config = {"processes_per_replica": 2, "threads_per_process": 2}
    server = start(*KEPT, config=config, bind=BOTH)

    def ask(number: int) -> None:
        with server.connect(number % 2) as client:
            assert [client.get("/sleep/0.002").status for _ in range(5)] == [200] * 5

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = []
    for _ in range(2):
        server.wait_numbers(running=0)  # so that the one unused for longer takes the next
        numbers.append(server.get("/numbers").json)
    assert {each["pid"] for each in numbers} == set(server.workers)
    assert [each["high"] for each in numbers] == [2, 2]


def test_a_slot_is_held_until_the_body_is_closed_though_the_client_has_it_all(
    replica, stage, which
):
    clients = [replica.connect(which).ask("/close/x") for _ in range(4)]
    assert [client.reply().body for client in clients] == [b"body"] * 4
    closing = stage.take(4)
    last = replica.connect(which).ask("/hold/last")
    replica.wait_numbers(running=4, waiting=1)
    assert stage.is_empty()
    closing.pop().finish()
    actor = stage.next()
    assert actor.name == "last"
    for each in [actor, *closing]:
        each.finish()
    assert last.reply().status == 200
    close([*clients, last])


def test_requests_of_all_listeners_wait_in_one_queue(replica, stage):
    clients = [replica.connect(n % 2).ask("/hold/first") for n in range(4)]
    actors = stage.take(4)
    for n in range(8):
        clients.append(replica.connect(n % 2).ask(f"/hold/{n}"))
        replica.wait_numbers(waiting=n + 1)
    order = []
    for _ in range(8):
        actors.pop(0).finish()
        actors.append(stage.next())
        order.append(actors[-1].name)
    for actor in actors:
        actor.finish()
    assert {client.reply().status for client in clients} == {200}
    assert order == [str(n) for n in range(8)]
    close(clients)


def test_pipelined_requests_run_one_after_another_and_take_turns_with_other_clients(
    replica, stage, which
):
    others = [replica.connect(which).ask("/hold/other") for _ in range(3)]
    actors = stage.take(3)
    pipeline = replica.connect(which).send(b"".join(get(f"/hold/{n}") for n in range(3)))
    first = stage.next()
    waiting = replica.connect(which).ask("/hold/waiting")
    replica.wait_numbers(running=4, waiting=1)
    first.finish()
    second = stage.next()
    replica.wait_numbers(running=4, waiting=1)
    assert (first.name, second.name) == ("0", "waiting")
    second.finish()
    third = stage.next()
    assert third.name == "1"
    third.finish()
    stage.next().finish()
    for actor in actors:
        actor.finish()
    assert [pipeline.reply().json["name"] for _ in range(3)] == ["0", "1", "2"]
    assert {client.reply().status for client in [*others, waiting]} == {200}
    close([pipeline, waiting, *others])


def get(path: str, pad: int = 0) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: test\r\nX-Pad: {'x' * pad}\r\n\r\n".encode()


def test_a_request_behind_one_that_ends_with_the_parsers_read_is_seen(replica, stage, which):
    """Nothing is read ahead then, and the event of what lies in the kernel is long gone."""
    exact = get("/hello", pad=8192 - len(get("/hello")))
    assert len(exact) == 8192  # gunicorn's parser reads so much at a time
    with replica.connect(which) as client:
        assert client.get("/hello").status == 200
        client.send(exact + get("/hello"))
        assert [client.reply().status for _ in range(2)] == [200] * 2


@pytest.mark.parametrize("end", [b"0\r\nX: y\r\n\r\n", b"0;x=y\r\n\r\n", b"0\r\n\r\n"])
def test_a_chunked_body_with_something_behind_its_end_is_whole(replica, stage, which, end):
    head = b"POST /echo HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    with replica.connect(which) as client:
        client.send(head + b"5\r\nhello\r\n" + end + get("/hello"))
        assert [client.reply().body for _ in range(2)] == [b"hello", b"hello\n"]


def test_an_app_that_raises_a_base_exception_costs_no_slot(replica, stage, which):
    for _ in range(8):
        assert replica.get("/cancelled", which).status == 500
    clients = [replica.connect(which).ask("/hold/x") for _ in range(4)]
    for actor in stage.take(4):
        actor.finish()
    assert {client.reply().status for client in clients} == {200}
    close(clients)
