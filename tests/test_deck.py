"""The deck, from which slots take for themselves: in order, and whoever dies meanwhile."""

from __future__ import annotations

import signal

import pytest
from server import IN_BOTH_MODES, Client, Server, wait_for
from stage import Actor, Stage
from test_deaths import ONE, TWO, holds_all_slots

from replica_plugin.decisions import DECK

MANY = DECK + 2  # more than there is room for on the deck
pytestmark = IN_BOTH_MODES
PAIR = {**ONE, "processes_per_replica": 2}
KILL, STOP, CONTINUE = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT


class Full:
    """A replica whose slots are all busy, and where requests named 0, 1, 2, ... wait."""

    def __init__(self, server: Server, stage: Stage, slots: int, waiting: int) -> None:
        self.server, self.stage = server, stage
        self.running, self.actors, self.waiting = [], [], []
        for _ in range(slots):
            self.running.append(server.connect().ask("/hold/first"))
            self.actors.append(stage.next())
        for number in range(waiting):
            self.waiting.append(server.connect().ask(f"/hold/{number}"))
            server.wait_numbers(running=slots, waiting=number + 1)
        self.dispatcher = server.dispatcher

    def stop_dispatcher(self) -> None:
        """For longer than its supervisor would wait."""
        self.server.tell(STOP, self.server.supervisor)
        self.server.tell(STOP, self.dispatcher)

    def continue_dispatcher(self) -> None:
        self.server.tell(CONTINUE, self.dispatcher)
        self.server.tell(CONTINUE, self.server.supervisor)

    def finish_one(self) -> Actor:
        """The one that runs longest; which begins then."""
        self.actors.pop(0).finish()
        self.actors.append(self.stage.next())
        return self.actors[-1]

    def finish_all(self) -> None:
        for actor in self.actors:
            actor.finish()

    def await_another_dispatcher(self) -> None:
        wait_for(lambda: self.server.dispatcher != self.dispatcher, "another dispatcher")


def was_reset(client: Client) -> bool:
    try:
        return client.sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_slots_take_in_the_queue_s_order_without_the_dispatcher(start, stage):
    server = start("--keep-alive", "20", config=TWO)
    names = list(map(str, range(DECK + 3)))
    full = Full(server, stage, 4, len(names))
    full.stop_dispatcher()
    assert [full.finish_one().name for _ in range(DECK)] == names[:DECK]
    full.actors.pop(0).finish()
    full.continue_dispatcher()
    full.actors.append(stage.next())
    assert full.actors[-1].name == names[DECK]
    assert [full.finish_one().name for _ in range(2)] == names[DECK + 1 :]
    full.finish_all()
    clients = full.running + full.waiting
    assert {client.reply().status for client in clients} == {200}
    assert {client.get("/hello").status for client in clients} == {200}
    holds_all_slots(server, stage, 0)
    assert server.dispatcher == full.dispatcher


def test_nobody_is_refused_because_of_what_slots_took_and_ended_unheard(start, stage):
    ended = DECK + 1  # with the one that runs
    server = start(config={**ONE, "max_replica_concurrency": ended + 1})
    full = Full(server, stage, 1, ended)
    full.stop_dispatcher()
    assert [full.finish_one().name for _ in range(DECK)] == list(map(str, range(DECK)))
    full.actors.pop(0).finish()
    answered, left = full.running + full.waiting[:DECK], full.waiting[DECK:]
    assert {client.reply().status for client in answered} == {200}
    again = [server.connect().ask("/hold/again") for _ in range(ended)]
    full.continue_dispatcher()
    full.actors.append(stage.next())
    server.wait_numbers(running=1, waiting=ended)
    assert {full.finish_one().name for _ in range(ended)} == {"again"}
    full.finish_all()
    assert [client.reply().status for client in left + again] == [200] * (1 + ended)


def test_what_lies_on_the_deck_ends_with_its_dispatcher(start, stage):
    server = start(config=PAIR)
    full = Full(server, stage, 2, MANY)
    server.tell(KILL, full.dispatcher)
    assert all(map(was_reset, full.waiting))
    full.finish_all()
    assert [client.reply().status for client in full.running] == [200] * 2
    holds_all_slots(server, stage, 0, 2)


def test_what_a_slot_has_taken_is_answered_though_the_dispatcher_dies_before_it_hears(start, stage):
    server = start("--keep-alive", "20", config=PAIR)
    full = Full(server, stage, 2, MANY)
    server.tell(STOP, full.dispatcher)
    assert full.finish_one().name == "0"
    server.tell(KILL, full.dispatcher)
    full.await_another_dispatcher()
    assert all(map(was_reset, full.waiting[1:]))
    full.finish_all()
    clients = [*full.running, full.waiting[0]]
    assert [client.reply().status for client in clients] == [200] * 3
    assert full.waiting[0].get("/hello").status == 200
    holds_all_slots(server, stage, 0, 2)


def test_a_killed_process_costs_what_it_had_taken_and_nothing_else(start, stage):
    server = start(config=PAIR)
    full = Full(server, stage, 2, MANY)
    server.tell(STOP, full.dispatcher)
    victim = full.finish_one()
    assert victim.name == "0"
    server.tell(KILL, victim.pid)
    server.tell(CONTINUE, full.dispatcher)
    assert full.running[0].reply().status == 200
    assert full.waiting[0].reply().status == 502
    full.actors.pop().vanished()
    names = []
    while len(names) < MANY - 1:
        full.actors.append(stage.next())
        names.append(full.actors[-1].name)
        full.actors.pop(0).finish()
    full.finish_all()
    assert names == list(map(str, range(1, MANY)))
    assert {client.reply().status for client in full.waiting[1:]} == {200}
    holds_all_slots(server, stage, 0, 2)


@pytest.mark.parametrize("number", [KILL, signal.SIGTERM])
def test_processes_that_end_one_after_another_leave_the_order_as_it_is(start, stage, number):
    """One that is told to leave takes nothing more once its successor is there."""
    server = start(config=PAIR)
    full = Full(server, stage, 2, MANY)
    names = []
    for actor in list(full.actors):
        server.tell(number, actor.pid)
        if number != KILL:
            actor.finish()
        full.actors.remove(actor)
        full.actors.append(stage.next())
        names.append(full.actors[-1].name)
    while len(names) < MANY:
        names.append(full.finish_one().name)
    full.finish_all()
    assert names == list(map(str, range(MANY)))
    assert {client.reply().status for client in full.waiting} == {200}
    holds_all_slots(server, stage, 0, 2)
