"""Apps that answer in every way, and fail in every way, beside gthread with the same app."""

from __future__ import annotations

import json
import os
import signal

import pytest
from server import IN_BOTH_MODES
from wire import AGAIN, Pair, Wire, request, start_pair

pytestmark = IN_BOTH_MODES

ALIKE = [
    "bad-header-name", "bad-status", "changes-its-mind", "changes-its-mind-late", "empty", "fail",
    "fail-late", "fail-late-unsized", "file-in-memory", "file-is-pipe", "file-part",
    "file-with-offset", "file/0", "file/100000", "hello", "hop-by-hop", "large-file", "long",
    "never-starts", "no-content-with-body", "not-modified", "nothing", "oserror-late",
    "raises-at-close", "returns-none", "returns-text", "splits-header", "starts-twice",
    "stream/3", "unsized", "unsized-single", "writes",
]  # fmt: skip

RAISES = ["cancelled", "exit", "interrupt", "oserror", "stop-iteration"]
RAISES_LATE = ["cancelled-late", "exit-late", "fail-late", "fail-late-unsized", "oserror-late"]


@pytest.fixture(scope="module", params=[4, 1], ids=["t=4", "t=1"])
def pair(module_start, request) -> Pair:
    return start_pair(module_start, threads=request.param)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ALIKE)
def test_response_has_the_outcome_it_has_with_gunicorns_own(pair, path, method, mode):
    if mode == "gevent" and path == "file-is-pipe":
        pytest.skip("it blocks the hub, of gunicorn's own gevent worker, too")
    for version, *fields in (["1.1"], ["1.0"], ["1.0", "Connection: keep-alive"]):
        sent = request(f"/{path}", *fields, method=method, version=version)
        ours, stock = pair.outcomes([sent], method)
        assert ours == stock, sent


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("path", ["hints", "hints-then-fails"])
def test_early_hints_go_out_as_with_gthread(pair, path, version):
    count = (3 if path == "hints" else 2) if version == "1.1" else 1
    ours, stock = pair.outcomes([request(f"/{path}", version=version)], *["GET"] * count)
    assert ours == stock
    assert ours.statuses[:-1] == [103] * (count - 1)


@pytest.mark.parametrize("path", RAISES)
def test_whatever_an_app_raises_is_answered_500_and_costs_no_slot(pair, path):
    """gthread closes without a word, and leaves its main loop at some of them."""
    workers = pair.ours.workers
    for _ in range(5):
        with Wire(pair.ours.address) as wire:
            outcome = wire.send(request(f"/{path}")).outcome("GET")
            assert (outcome.statuses, outcome.stays) == ([500], False)
    assert pair.ours.workers == workers


@pytest.mark.parametrize("path", RAISES_LATE)
def test_what_an_app_raises_after_the_first_byte_cuts_the_response_short(pair, path):
    for _ in range(5):
        with Wire(pair.ours.address) as wire:
            received = wire.send(request(f"/{path}")).rest()
            assert received.partition(b"\r\n\r\n")[2] in (b"some", b"4\r\nsome\r\n")


def test_slots_are_all_there_after_whatever_apps_raised(pair, module_start):
    """Runs as many requests at once as there are slots: a slot that was lost would be missed."""
    stage, server = module_start.stage, pair.ours
    for path in RAISES + RAISES_LATE:
        with Wire(server.address) as wire:
            wire.send(request(f"/{path}")).rest()
    pending = [server.later(f"/hold/{n}") for n in range(server.numbers().slots)]
    for actor in stage.take(len(pending)):
        actor.finish()
    assert {each.result().status for each in pending} == {200}


def test_connection_ends_while_a_child_of_the_app_holds_it(pair):
    for sent in (
        request("/forks", version="1.0"),
        request("/forks", "Connection: close"),
    ):
        with Wire(pair.ours.address) as wire:
            reply = wire.send(sent).reply()
            ended = wire.rest() == b""
            child = next(h for h in reply.headers if h.startswith(b"X-Child"))
            os.kill(int(child.split()[1]), signal.SIGKILL)
            assert ended


def test_response_shorter_than_announced_leaves_the_connection_open_as_gthread_does(pair):
    for server in (pair.ours, pair.stock):
        with Wire(server.address) as wire:
            wire.send(request("/short"))
            head = wire._until(b"some")
            assert b"Connection: keep-alive" in head
            assert wire.send(AGAIN).reply().body == b"hello\n"


def test_client_that_leaves_in_the_middle_of_a_response_costs_no_slot(pair):
    server = pair.ours
    for _ in range(5):
        with Wire(server.address) as wire:
            wire.send(request("/stream/1000"))
            assert wire.sock.recv(1000)
    server.wait_numbers(running=0)
    assert server.get("/hello").status == 200


def test_app_is_told_whether_it_runs_in_several_threads(pair):
    """gthread says that it does with one thread, too."""
    environ = json.loads(pair.outcomes([request("/everything")], "GET")[0].replies[0].body)
    assert environ["wsgi.multithread"] is (pair.ours.numbers().slots > 1)
