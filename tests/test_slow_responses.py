"""P5: a response that the app has produced leaves its slot, however slowly the client takes it."""

from __future__ import annotations

import http.client
import os
import signal

import pytest
from server import BOTH, IN_BOTH_MODES, STOCK, Client, Server, wait_for

pytestmark = IN_BOTH_MODES

MIB = 1 << 20
ONE = {"processes_per_replica": 1, "threads_per_process": 1}


def body(mib: int) -> bytes:
    return b"".join(n.to_bytes(8, "big") for n in range(1 << 17)) * mib


def unread(server: Server, path: str, which: int = 0) -> Client:
    """A client that asks, and reads nothing; of 8 MiB the kernel's buffers hold a half at most."""
    return server.connect(which).ask(path)


def more(client: Client) -> bytes:
    part = client.sock.recv(1 << 16)
    assert part, "the end"
    return part


@pytest.fixture(scope="module")
def replica(module_start) -> Server:
    return module_start(config=ONE, bind=BOTH)


@pytest.mark.parametrize("how", ["one", "list", "file"])
def test_a_client_that_does_not_read_holds_no_slot_and_gets_every_byte(replica, which, how):
    path = f"/file/{8 * MIB}" if how == "file" else f"/large/8/{how}"
    client = unread(replica, path, which)
    wait_for(lambda: replica.numbers().unsent > MIB, "something left to the dispatcher")
    assert replica.get("/hello", which).status == 200  # the only slot is free
    wanted = b"f" * 8 * MIB if how == "file" else body(8)
    assert client.reply().body == wanted
    assert client.get("/hello").status == 200  # and the connection goes on
    client.close()
    replica.wait_numbers(unsent=0, running=0)


def test_control_on_stock_gthread_a_client_that_does_not_read_holds_the_only_thread(start):
    server = start("--threads", "1", base=STOCK, app="served_app:application")
    client = unread(server, "/large/16/one")
    wait_for(client.is_readable, "the response begins")
    other = server.later("/hello")
    assert not other.done
    client.close()
    assert other.result().status == 200


def test_a_response_of_known_length_leaves_the_slot_with_its_last_part(start, which):
    """Earlier parts do not: the app may take its time between two of them."""
    server = start(config={**ONE, "response_buffer": "16Mi"}, bind=BOTH)
    client = unread(server, "/large/8/parts", which)
    wait_for(client.is_readable, "the response begins")
    server.wait_numbers(running=1)
    taken = b""
    while server.numbers().running:
        if client.is_readable():
            taken += more(client)
    while b"\r\n\r\n" not in taken or len(taken.partition(b"\r\n\r\n")[2]) < 8 * MIB:
        taken += more(client)
    assert taken.partition(b"\r\n\r\n")[2] == body(8)
    client.close()


def test_what_a_pipe_has_by_and_by_goes_out_at_once_also_when_the_client_has_lagged(
    replica, module_start, which
):
    """It comes by wsgi.file_wrapper, as a file on disk does, but more may come at any time."""
    client = unread(replica, "/feed/x", which)
    wait_for(client.is_readable, "the response begins")
    response = client.begun_reply()
    assert response.read(7 * MIB) == b"f" * 7 * MIB
    for step in (b"more", b"end"):
        module_start.stage.next().finish()
        assert response.read(len(step)) == step
    assert response.read() == b""
    client.close()


def test_a_response_longer_than_response_buffer_holds_its_slot_until_so_much_is_left(
    replica, which
):
    """Which is more than the kernel takes at once, so that it is seen."""
    client = unread(replica, "/large/24/one", which)
    wait_for(client.is_readable, "the response begins")
    replica.wait_numbers(running=1, unsent=0)
    taken = bytearray()
    while not replica.numbers().unsent:
        if client.is_readable():
            taken += more(client)
    assert replica.numbers().unsent <= 8 * MIB
    replica.wait_numbers(running=0)
    while len(taken) < 24 * MIB + taken.index(b"\r\n\r\n") + 4:
        taken += more(client)
    assert taken.partition(b"\r\n\r\n")[2] == body(24)
    client.close()


def test_without_room_for_all_such_responses_together_the_next_one_holds_its_slot(start):
    server = start(config={**ONE, "response_buffer_total": "7Mi"})
    first = unread(server, "/large/8/one")
    wait_for(lambda: server.numbers().unsent, "what is left")
    server.wait_numbers(running=0)
    left = server.numbers().unsent
    assert MIB < left <= 7 * MIB
    second = unread(server, "/large/8/one")
    wait_for(second.is_readable, "the response begins")
    server.wait_numbers(running=1)
    assert first.reply().body == body(8)
    second.close()
    server.wait_numbers(running=0, unsent=0)
    first.close()


def test_nothing_is_left_to_the_dispatcher_with_a_buffer_of_nothing(start):
    server = start(config={**ONE, "response_buffer": 0})
    client = unread(server, "/large/8/one")
    wait_for(client.is_readable, "the response begins")
    server.wait_numbers(running=1, unsent=0)
    assert client.reply().body == body(8)
    client.close()


def test_a_client_that_takes_nothing_of_the_rest_is_cut_off_after_send_timeout(start, which):
    server = start(config={**ONE, "send_timeout": "300ms"}, bind=BOTH)
    client = unread(server, "/large/8/one", which)
    server.wait_log("A client took nothing for send_timeout: cut off")
    server.wait_numbers(unsent=0, running=0, connections=0)
    with pytest.raises(Exception):  # noqa: B017  # a reset or an incomplete read, as it happens
        client.reply()
    client.close()


def test_a_client_that_leaves_in_the_middle_of_the_rest_is_forgotten(replica, which):
    client = unread(replica, "/large/8/one", which)
    wait_for(lambda: replica.numbers().unsent > MIB, "something left to the dispatcher")
    client.reset()
    replica.wait_numbers(unsent=0, running=0, connections=0)


def test_pipelined_requests_wait_for_the_rest_of_the_response_before_them(replica, which):
    client = unread(replica, "/large/8/one", which)
    wait_for(lambda: replica.numbers().unsent > MIB, "something left to the dispatcher")
    client.ask("/hello").ask("/large/8/list").ask("/hello")
    assert [len(client.reply().body) for _ in range(4)] == [8 * MIB, 6, 8 * MIB, 6]
    client.close()


def test_a_stop_sends_the_rest_before_it_ends(start, which):
    server = start(config=ONE, bind=BOTH)
    client = unread(server, "/large/8/one", which)
    wait_for(lambda: server.numbers().unsent > MIB, "something left to the dispatcher")
    server.tell(signal.SIGTERM)
    server.wait_closed()
    assert client.reply().body == body(8)
    client.close()
    server.process.wait(20)


@pytest.mark.parametrize("step", ["closing", "going-on"])
def test_what_the_app_does_when_its_response_is_complete_does_not_delay_the_rest(
    replica, module_start, which, step
):
    """And its request counts until that is done; its connection goes on before."""
    client = unread(replica, f"/after/{step}", which)
    actor = module_start.stage.next()
    assert actor.name == f"x-{step}"
    assert client.reply().body == b"a" * 7 * MIB
    client.ask("/hello")
    replica.wait_numbers(running=1, waiting=1, unsent=0)
    actor.finish()
    assert client.reply().status == 200
    replica.wait_numbers(running=0)
    client.close()


@pytest.mark.parametrize("dies", ["process", "dispatcher"])
def test_a_death_while_the_app_closes_a_complete_response(start, stage, which, dies):
    """That of its process costs nothing any more; that of the dispatcher all that it sends."""
    server = start(config=ONE, bind=BOTH)
    client = unread(server, "/after/closing", which)
    actor = stage.next()
    wait_for(lambda: server.numbers().unsent, "something left to the dispatcher")
    os.kill(actor.pid if dies == "process" else server.dispatcher, signal.SIGKILL)
    if dies == "process":
        assert actor.vanished()
        assert client.reply().body == b"a" * 7 * MIB
        assert client.get("/hello").status == 200
    else:
        wait_for(lambda: server.get("/-/healthz").status == 200, "a successor")
        actor.finish()
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            client.reply()
        assert server.get("/hello").status == 200
    server.wait_numbers(running=0, unsent=0)
    client.close()


def test_a_client_that_leaves_while_the_app_closes_its_complete_response(
    replica, module_start, which
):
    client = unread(replica, "/after/closing", which)
    actor = module_start.stage.next()
    wait_for(lambda: replica.numbers().unsent, "something left to the dispatcher")
    client.reset()
    replica.wait_numbers(running=1, unsent=0, connections=0)
    actor.finish()
    replica.wait_numbers(running=0)
    assert replica.get("/hello", which).status == 200


def test_a_stop_sends_the_rest_of_a_response_that_the_app_still_closes(start, stage, which):
    server = start("--graceful-timeout", "10", config=ONE, bind=BOTH)
    client = unread(server, "/after/closing", which)
    actor = stage.next()
    server.tell(signal.SIGTERM)
    server.wait_closed()
    assert client.reply().body == b"a" * 7 * MIB
    assert client.is_closed()
    actor.finish()
    assert server.process.wait(20) == 0


def test_a_slot_whose_dispatcher_is_dead_sends_the_rest_itself(start, stage, which):
    server = start(config=ONE, bind=BOTH)
    client = unread(server, "/held-large/x", which)
    actor = stage.next()
    dispatcher = server.dispatcher
    os.kill(dispatcher, signal.SIGKILL)
    wait_for(lambda: server.children(server.supervisor) not in ([], [dispatcher]), "a successor")
    actor.finish()
    assert len(client.reply().body) == 8 * MIB
    assert client.get("/hello").status == 200  # its connection was handed to the successor
    client.close()
