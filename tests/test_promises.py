"""P1 to P10 on a replica of 2 x 2, request by request, on the stage."""

from __future__ import annotations

from collections import Counter

import pytest
from server import IN_BOTH_MODES, Server

pytestmark = IN_BOTH_MODES


@pytest.fixture
def server(start) -> Server:
    return start(config={"processes_per_replica": 2, "threads_per_process": 2})


def test_four_requests_all_begin_at_once_and_a_fifth_waits_for_the_first_slot_free(server, stage):
    pending = [server.later(f"/hold/{n}") for n in range(5)]
    actors = stage.take(4)
    assert Counter(actor.pid for actor in actors) == dict.fromkeys(server.workers, 2)
    assert stage.is_empty()
    first = actors.pop(2)
    first.finish()
    last = stage.next()
    assert (last.pid, last.thread) == (first.pid, first.thread)
    for actor in [*actors, last]:
        actor.finish()
    assert [each.result().status for each in pending] == [200] * 5


@pytest.mark.parametrize("count", [3, 4])
def test_bursts_up_to_the_slots_begin_at_once_round_after_round(server, stage, count):
    clients = [server.connect() for _ in range(count)]
    for _ in range(10):
        for client in clients:
            client.ask("/hold/x")
        for actor in stage.take(count):
            actor.finish()
        assert [client.reply().status for client in clients] == [200] * count
    for client in clients:
        client.close()


def test_requests_begin_in_the_order_in_which_they_became_ready(server, stage):
    running = [server.connect().ask(f"/hold/first{n}") for n in range(4)]
    actors = stage.take(4)
    waiting = []
    for n in range(12):
        waiting.append(server.connect().ask(f"/hold/{n}"))
        server.wait_numbers(waiting=n + 1)
    order = []
    for _ in range(12):
        actors.pop(0).finish()
        actors.append(stage.next())
        order.append(actors[-1].name)
    for actor in actors:
        actor.finish()
    assert order == [str(n) for n in range(12)]
    assert {client.reply().status for client in running + waiting} == {200}
