"""PROXY protocol, v1 and v2: whose address an app sees, on every request of a connection."""

from __future__ import annotations

import json
import struct

import pytest
from server import IN_BOTH_MODES
from wire import AGAIN, Pair, Wire, chunked, post, request, start_pair

pytestmark = IN_BOTH_MODES

V1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 1111 2222\r\n"
V1_6 = b"PROXY TCP6 2001:db8::1 2001:db8::2 1111 2222\r\n"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
ADDRESSES = bytes([192, 0, 2, 1, 192, 0, 2, 2]) + struct.pack(">HH", 1111, 2222)
V2 = SIGNATURE + b"\x21\x11" + struct.pack(">H", 12) + ADDRESSES
V2_TLV = SIGNATURE + b"\x21\x11" + struct.pack(">H", 19) + ADDRESSES + b"\x04\0\x04\r\n\r\n"
V2_LONG = SIGNATURE + b"\x21\x11" + struct.pack(">H", 40015) + ADDRESSES
V2_LONG += b"\x04" + struct.pack(">H", 40000) + b"\r\n\r\n" * 10000
V2_6 = (
    SIGNATURE
    + b"\x21\x21"
    + struct.pack(">H", 36)
    + b"\0" * 15
    + b"\1"
    + b"\0" * 15
    + b"\2\4\x57\x08\xae"
)
V2_LOCAL = SIGNATURE + b"\x20\0\0\0"
EVERYTHING = request("/everything")


@pytest.fixture(scope="module")
def pair(module_start) -> Pair:
    return start_pair(module_start, "--proxy-protocol=auto")


def addresses(body: bytes) -> tuple:
    environ = json.loads(body)
    return tuple(environ.get(name) for name in ("REMOTE_ADDR", "REMOTE_PORT", "PROXY_ADDR"))


@pytest.mark.parametrize("which", [0, 1], ids=["tcp", "unix"])
@pytest.mark.parametrize(
    "line", [b"", V1, V1_6, V2, V2_TLV, V2_LONG, V2_6, V2_LOCAL],
    ids=["none", "v1", "v1-6", "v2", "v2-tlv", "v2-long", "v2-6", "v2-local"],
)  # fmt: skip
def test_environ_is_that_of_gunicorns_own(pair, line, which):
    ours, stock = pair.outcomes([line + EVERYTHING], "GET", which=which)
    assert ours == stock
    assert ours.statuses == [200]


@pytest.mark.parametrize("line", [V1, V2], ids=["v1", "v2"])
def test_address_holds_for_every_request_of_the_connection(pair, line):
    """gthread forgets it with the second request."""
    with Wire(pair.ours.address) as wire:
        wire.send(line + EVERYTHING)
        seen = [addresses(wire.reply().body)]
        wire.send(request("/-/healthz"))
        assert wire.reply().status == 200
        for _ in range(3):
            seen.append(addresses(wire.send(EVERYTHING).reply().body))
    assert seen == [("192.0.2.1", "1111", "192.0.2.2")] * 4


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.parametrize("line", [V1, V2], ids=["v1", "v2"])
def test_second_proxy_line_is_not_believed(pair, line, pipelined):
    forged = line.replace(b"192.0.2.1", b"198.51.100.1").replace(b"\xc0\0\2\1", b"\xc6\x33\x64\1")
    with Wire(pair.ours.address) as wire:
        wire.send(line + EVERYTHING)
        if not pipelined:
            assert wire.reply().status == 200
        wire.send(forged + EVERYTHING)
        if pipelined:
            assert wire.reply().status == 200
        outcome = wire.outcome("GET")
    assert (outcome.statuses, outcome.stays) == ([400], False)


def test_second_proxy_line_behind_a_probe_is_not_believed(pair):
    with Wire(pair.ours.address) as wire:
        wire.send(AGAIN).reply()
        wire.send(request("/-/healthz")).reply()
        outcome = wire.send(V1 + EVERYTHING).outcome("GET")
    assert (outcome.statuses, outcome.stays) == ([400], False)


@pytest.mark.parametrize("line", [V1, V2], ids=["v1", "v2"])
def test_probe_behind_a_proxy_line_is_answered_and_the_connection_ends(pair, line):
    """Nobody has read the line, so the next request would not have its address."""
    with Wire(pair.ours.address) as wire:
        outcome = wire.send(line + request("/-/readyz") + EVERYTHING).outcome("GET")
    assert (outcome.statuses, outcome.stays) == ([200], False)


def test_refusal_behind_a_proxy_line_ends_the_connection(module_start):
    pair = start_pair(
        module_start, "--proxy-protocol=auto", threads=1, config={"max_replica_concurrency": 1}
    )
    held = pair.ours.later("/hold/x")
    actor = module_start.stage.next()
    with Wire(pair.ours.address) as wire:
        assert wire.send(V1 + EVERYTHING + EVERYTHING).reply().status == 503
        assert wire.rest() == b""
    actor.finish()
    assert held.result().status == 200


@pytest.mark.parametrize(
    "line",
    [
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1111\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.300 1111 2222\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1111 99999\r\n",
        b"PROXY UNKNOWN\r\n",
        b"PROXY  TCP4 192.0.2.1 192.0.2.2 1111 2222\r\n",
        b"proxy TCP4 192.0.2.1 192.0.2.2 1111 2222\r\n",
        SIGNATURE + b"\x11\x11" + struct.pack(">H", 12) + ADDRESSES,
        SIGNATURE + b"\x21\x12" + struct.pack(">H", 12) + ADDRESSES,
        SIGNATURE + b"\x21\x11" + struct.pack(">H", 4) + ADDRESSES[:4],
        SIGNATURE[:-1] + b"X\x21\x11\0\0",
        V1 + V1,
    ],
    ids=lambda line: repr(line[:24] + line[-8:]),
)
def test_malformed_proxy_line_is_refused_as_by_gunicorns_own(pair, line):
    ours, stock = pair.outcomes([line + EVERYTHING], "GET")
    assert ours == stock
    assert not ours.stays


@pytest.mark.parametrize("which", [0, 1], ids=["tcp", "unix"])
@pytest.mark.parametrize("line", [b"", V1, V2, V2_TLV], ids=["none", "v1", "v2", "v2-tlv"])
@pytest.mark.parametrize(
    ("sent", "methods"),
    [
        (b"\r\n" + EVERYTHING, ["GET"]),
        (post("/echo", b"abc") + EVERYTHING, ["POST", "GET"]),
        (chunked("/echo", b"abc") + EVERYTHING, ["POST", "GET"]),
    ],
    ids=["crlf", "body", "chunked"],
)
def test_proxy_line_in_two_parts_has_the_same_outcome_wherever_it_is_cut(
    pair, line, sent, methods, which
):
    address, sent = pair.ours.addresses[which], line + sent
    with Wire(address) as wire:
        whole = wire.send(sent).outcome(*methods)
    assert whole.statuses == [200] * len(methods)
    cuts = range(1, len(line) + 30)
    wires = [Wire(address).send(sent[:cut]) for cut in cuts]
    for cut, wire in zip(cuts, wires, strict=True):
        wire.send(sent[cut:])
    for cut, wire in zip(cuts, wires, strict=True):
        with wire:
            assert wire.outcome(*methods) == whole, (sent[:cut], sent[cut:])
