"""No request is run with a part of another's bytes, whoever answers the one before it.

The dispatcher answers probes and refusals, slots answer the rest; both read the same stream.
If they saw a request end in different places, a client behind a shared proxy could have its
bytes run as somebody else's request. STOLEN is what must never be answered then.

Most of this is up to the dispatcher alone; where slots read of the stream, it is so in both modes.
"""

from __future__ import annotations

import re

import pytest
from server import IN_BOTH_MODES, Pending
from wire import AGAIN, Wire, chunked, post, request, start_pair

STOLEN = request("/method?stolen")
PROBE = "/-/healthz"


@pytest.fixture(scope="module")
def server(module_start):
    return start_pair(module_start).ours


@pytest.fixture(scope="module")
def full(module_start):
    """A replica with one slot, which is taken, and no room to wait: everything is refused."""
    server = start_pair(module_start, threads=1, config={"max_replica_concurrency": 1}).ours
    held = server.connect().ask("/hold/x")
    actor = module_start.stage.next()
    yield server
    actor.finish()
    assert held.reply().status == 200
    held.close()


# Heads of which one reader or another could say that a body follows.
AMBIGUOUS = {
    "length": [f"Content-Length: {len(STOLEN)}"],
    "length_0": ["Content-Length: 0"],
    "length_lower_case": [f"content-length:{len(STOLEN)}"],
    "length_tab": [f"Content-Length:\t{len(STOLEN)}"],
    "length_twice": ["Content-Length: 0", f"Content-Length: {len(STOLEN)}"],
    "length_spaced": [f"Content-Length : {len(STOLEN)}"],
    "length_signed": [f"Content-Length: +{len(STOLEN)}"],
    "length_folded": [f"Content-Length:\r\n {len(STOLEN)}"],
    "length_behind_bare_lf": [f"A: b\nContent-Length: {len(STOLEN)}"],
    "length_behind_bare_cr": [f"A: b\rContent-Length: {len(STOLEN)}"],
    "chunked": ["Transfer-Encoding: chunked"],
    "chunked_upper_case": ["TRANSFER-ENCODING: CHUNKED"],
    "chunked_tab": ["Transfer-Encoding:\tchunked"],
    "chunked_spaced": ["Transfer-Encoding : chunked"],
    "chunked_folded": ["Transfer-Encoding:\r\n chunked"],
    "chunked_behind_bare_lf": ["A: b\nTransfer-Encoding: chunked"],
    "chunked_x": ["Transfer-Encoding: xchunked"],
    "identity": ["Transfer-Encoding: identity"],
    "chunked_and_length": ["Transfer-Encoding: chunked", f"Content-Length: {len(STOLEN)}"],
    "folded": ["A: b\r\n c"],
    "nul": ["A: b\0c"],
    "no_colon": ["Abc"],
}

# Ends of a head that one reader could see before the other.
EARLY_ENDS = {
    "lf_lf": b"GET %s HTTP/1.1\r\nHost: a\n\n" + STOLEN,
    "lf_only": b"GET %s HTTP/1.1\nHost: a\n\n" + STOLEN,
    "cr_cr": b"GET %s HTTP/1.1\r\nHost: a\r\r" + STOLEN,
    "lf_crlf": b"GET %s HTTP/1.1\r\nHost: a\n\r\n" + STOLEN,
    "http_0_9": b"GET %s\r\n" + STOLEN,
    "no_fields_lf": b"GET %s HTTP/1.1\n\r\n" + STOLEN,
    "blank_in_line": b"GET %s HTTP/1.1 \r\n\r\n" + STOLEN,
    "tab_in_line": b"GET\t%s\tHTTP/1.1\r\n\r\n" + STOLEN,
}


def assert_answered_once_at_most(wire: Wire) -> None:
    """The connection ends, with one answer or none: a second would be that to STOLEN.

    Seen in what comes, not by asking again: a full replica refuses that in any case.
    """
    received = wire.rest()
    assert len(re.findall(rb"HTTP/1\.\d \d{3} ", received)) <= 1, received
    assert b"stolen" not in received


@pytest.mark.parametrize("cut", [False, True], ids=["at_once", "body_later"])
@pytest.mark.parametrize("number", [1, 2], ids=["new", "kept"])
@pytest.mark.parametrize("fields", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
@pytest.mark.parametrize("target", ["probe", "refusal"])
def test_body_of_what_is_answered_without_a_slot_is_never_a_request(
    server, full, target, fields, number, cut
):
    """A body may follow, or a reader might think so: then the connection ends."""
    asked, path = (server, PROBE) if target == "probe" else (full, "/method")
    with Wire(asked.address) as wire:
        if number == 2:
            wire.send(request(PROBE)).reply()
        head = request(path, *fields)
        wire.send(*([head, STOLEN] if cut else [head + STOLEN]))
        assert_answered_once_at_most(wire)


@pytest.mark.parametrize("sent", EARLY_ENDS.values(), ids=EARLY_ENDS.keys())
@pytest.mark.parametrize("target", ["probe", "refusal"])
def test_head_that_ends_in_two_places_is_followed_by_nothing(server, full, target, sent):
    asked, path = (server, PROBE) if target == "probe" else (full, "/method")
    with Wire(asked.address) as wire:
        wire.send(request(PROBE)).reply()
        wire.send(sent % path.encode())
        assert_answered_once_at_most(wire)


def test_refusal_of_connect_ends_the_connection(full):
    with Wire(full.address) as wire:
        wire.send(request("a:1", method="CONNECT") + STOLEN)
        assert wire.reply().status == 503
        assert wire.rest() == b""


@pytest.mark.parametrize("number", [1, 2], ids=["new", "kept"])
def test_refused_requests_that_have_no_body_are_answered_one_by_one(full, number):
    with Wire(full.address) as wire:
        for _ in range(number):
            wire.send(request("/a") + request("/b", method="HEAD") + request("/c"))
            assert [wire.reply(m).status for m in ("GET", "HEAD", "GET")] == [503] * 3
        wire.send(request(PROBE) + request("/d"))
        assert [wire.reply().status, wire.reply().status] == [200, 503]


@pytest.mark.parametrize("count", [2000, 10000])
def test_thousands_of_pipelined_refusals_are_answered_by_the_same_dispatcher(full, count):
    """More than the kernel takes at once: the last one's beginning must not keep the rest out."""
    before = full.dispatcher
    with Wire(full.address) as wire:
        sending = Pending(lambda: wire.send(request("/a") * count))
        assert {wire.reply().status for _ in range(count)} == {503}
        sending.result()
    assert full.dispatcher == before


@IN_BOTH_MODES
@pytest.mark.parametrize("count", [2000, 10000])
def test_thousands_of_pipelined_probes_are_answered_by_the_same_dispatcher(server, count):
    before = server.dispatcher
    with Wire(server.address) as wire:
        sending = Pending(lambda: wire.send(AGAIN + request(PROBE) * count))
        assert {wire.reply().status for _ in range(count + 1)} == {200}
        sending.result()
    assert server.dispatcher == before


MIXED = [
    (request(PROBE), "GET", b"healthy\n"),
    (AGAIN, "GET", b"hello\n"),
    (request("/-/readyz", method="HEAD"), "HEAD", b""),
    (post("/echo", STOLEN), "POST", STOLEN),
    (chunked("/echo", STOLEN, b"0\r\n\r\n"), "POST", STOLEN + b"0\r\n\r\n"),
    (post("/ignore", STOLEN), "POST", b"ignored\n"),
    (chunked("/ignore", STOLEN), "POST", b"ignored\n"),
    (request("/method", method="OPTIONS"), "OPTIONS", b"OPTIONS /method /method"),
]


@IN_BOTH_MODES
@pytest.mark.parametrize("size", [1, 7, 100, 8192, 1 << 20])
@pytest.mark.parametrize("which", [0, 1], ids=["tcp", "unix"])
def test_probes_and_requests_in_one_stream_each_get_their_own_answer(server, which, size):
    """In parts of every size, so that ends of parts and of requests fall together in all ways."""
    rounds = {1: 2, 7: 8}.get(size, 40)
    order = [MIXED[(n * 5 + n // 8) % len(MIXED)] for n in range(len(MIXED) * rounds)]
    if which == 1:  # where a body that is left unread before all of it came ends the connection
        order = [each for each in order if b"/ignore" not in each[0]]
    stream = b"".join(sent for sent, _, _ in order)
    with Wire(server.addresses[which]) as wire:
        parts = [stream[at : at + size] for at in range(0, len(stream), size)]
        sending = Pending(lambda: wire.send(*parts))
        for _, method, body in order:
            assert wire.reply(method).body == body
        sending.result()
