"""Requests of every kind: the same bytes to ours and to gunicorn's own, and the same outcome.

Each is sent whole, over TCP and over a Unix socket, and then to ours again in small parts:
the dispatcher looks at what has come so far, and must come to the same end however it comes.
"""

from __future__ import annotations

import pytest
from server import IN_BOTH_MODES
from wire import AGAIN, Outcome, Pair, Situation, Wire, chunked, post, request, start_pair

pytestmark = IN_BOTH_MODES

GET = AGAIN
MEBIBYTE = 1 << 20


def te(value: str, body: bytes = b"3\r\nabc\r\n0\r\n\r\n", version: str = "1.1") -> bytes:
    return request("/echo", f"Transfer-Encoding:{value}", method="POST", version=version) + body


def length(value: str, body: bytes = b"abc") -> bytes:
    return request("/echo", f"Content-Length:{value}", method="POST") + body


WELL_FORMED = [
    Situation("plain", GET),
    Situation("head", request("/hello", method="HEAD"), ["HEAD"]),
    Situation("options_star", request("*", method="OPTIONS")),
    Situation("unusual_method", request("/method", method="PROPFIND")),
    Situation("absolute_form", request("http://else.where/method?a=b")),
    Situation("query_and_fragment", request("/everything?a=b#c")),
    Situation("connect", request("/method", method="CONNECT") + GET, ["CONNECT"]),
    Situation("escaped_path", request("/met%68od/%2e%2E")),
    Situation("leading_crlf", b"\r\n" + GET),
    Situation("crlf_between", GET + b"\r\n" + GET, ["GET"] * 2),
    Situation("no_host", b"GET /method HTTP/1.1\r\n\r\n"),
    Situation("http_1_0", request("/hello", version="1.0") + GET),
    Situation("http_1_0_kept", request("/hello", "Connection: keep-alive", version="1.0")),
    Situation("http_1_0_unsized", request("/unsized", "Connection: keep-alive", version="1.0")),
    Situation("http_1_2", post("/echo", b"abc", version="1.2")),
    Situation("close", request("/hello", "Connection: close") + GET),
    Situation("close_spelt_otherwise", request("/hello", "CONNECTION:\tClose ") + GET),
    Situation("close_among_others", request("/hello", "Connection: close, te")),
    Situation("keep_alive_first", request("/hello", "Connection: keep-alive", "Connection: close")),
    Situation("empty_body", post("/echo", b"")),
    Situation("small_body", post("/echo", b"abc")),
    Situation("lines", post("/lines", b"a\nb\n\nc")),
    Situation("body_on_get", request("/echo", body=b"abc")),
    Situation("length_with_tabs", length("\t3\t")),
    Situation("length_with_zeros", length(" " + "0" * 40 + "3")),
    Situation("unread_body", post("/ignore", b"abc") + GET, ["POST", "GET"]),
    Situation("half_read_body", post("/partly/3", b"abcdef") + GET, ["POST", "GET"]),
    Situation("unread_60k", post("/ignore", b"x" * 60_000) + GET, ["POST", "GET"]),
    Situation("chunked", chunked("/echo", b"abc", b"defgh")),
    Situation("chunked_empty", chunked("/echo")),
    Situation("chunked_upper_case", te(" CHUNKED", b"A\r\n0123456789\r\n0\r\n\r\n")),
    Situation("chunked_tab", te("\tchunked")),
    Situation("chunked_zeros", te(" chunked", b"003\r\nabc\r\n000\r\n\r\n")),
    Situation("chunked_extensions", te(" chunked", b'3;a=b;c="d"\r\nabc\r\n0 ; x\r\n\r\n')),
    Situation("chunked_trailers", chunked("/echo", b"abc", end=b"0\r\nA: b\r\nC: d\r\n\r\n")),
    Situation("chunked_looks_ended", chunked("/echo", b"0\r\n\r\n", b"0\r\n\r\n")),
    Situation("chunked_unread", chunked("/ignore", b"abc") + GET, ["POST", "GET"]),
    Situation("gzip_then_chunked", te(" gzip, chunked")),
    Situation("two_coding_fields", te(" identity\r\nTransfer-Encoding: chunked")),
    Situation("field_like_coding", request("/hello", "Transfer-Encoding-X: chunked")),
    Situation("field_like_length", request("/hello", "Content-Length-X: 5")),
    Situation("pipelined_2", GET * 2, ["GET"] * 2),
    Situation("pipelined_10", GET * 10, ["GET"] * 10),
    Situation("pipelined_300", GET * 300, ["GET"] * 300),
    Situation("pipelined_then_close", GET + request("/hello", "Connection: close"), ["GET"] * 2),
    Situation(
        "pipelined_bodies",
        post("/echo", b"one") + chunked("/echo", b"two") + GET + post("/echo", b"3"),
        ["POST", "POST", "GET", "POST"],
    ),
    Situation("expect_bad", post("/echo", b"abc", "Expect: miracles")),
    Situation("expect_1_0", post("/echo", b"abc", "Expect: 100-continue", version="1.0")),
    Situation("expect_sent_anyway", post("/echo", b"abc", "Expect: 100-continue"), ["POST"] * 2),
    Situation("expect_no_body", request("/hello", "Expect: 100-continue"), ["GET"] * 2),
    Situation("expect_pipelined", GET + post("/echo", b"a", "Expect: 100-Continue"), ["GET"] * 3),
    Situation("script_name", request("/method/rest", "Script_Name: /method")),
    Situation("script_name_wrong", request("/hello", "Script_Name: /else")),
    Situation("underscore", request("/everything", "X_Y: z", "X-Y: z")),
    Situation("100_fields", request("/hello", *(f"A{n}: b" for n in range(99)))),
]

MALFORMED = [
    Situation("garbage", b"GARBAGE\r\n"),
    Situation("tls", b"\x16\x03\x01\x02\x00\x01\x00\r\n"),
    Situation("two_words", b"GET /hello\r\n\r\n"),
    Situation("four_words", b"GET /hello HTTP/1.1 x\r\n\r\n"),
    Situation("lower_case_method", request("/hello", method="get")),
    Situation("star_with_get", request("*")),
    Situation("raw_bytes_in_target", b"GET /\xc3\xa9 HTTP/1.1\r\n\r\n"),
    Situation("http_2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    Situation("http_0_9", request("/hello", version="0.9")),
    Situation("bare_lf", GET.replace(b"\r\n", b"\n")),
    Situation("bare_lf_in_field", b"GET /hello HTTP/1.1\r\nA: b\nC: d\r\n\r\n" + GET),
    Situation("two_leading_crlf", b"\r\n\r\n" + GET),
    Situation("nul_in_field", request("/hello", "A: b\0c")),
    Situation("cr_in_field", request("/hello", "A: b\rc")),
    Situation("folded", request("/hello", "A: b\r\n c")),
    Situation("folded_first", b"GET /hello HTTP/1.1\r\n A: b\r\n\r\n"),
    Situation("no_colon", request("/hello", "Abc")),
    Situation("no_name", request("/hello", ": abc")),
    Situation("space_in_name", request("/hello", "A b: c")),
    Situation("space_before_colon", request("/echo", "Content-Length : 3", method="POST") + b"abc"),
    Situation("two_hosts", request("/hello", "Host: other")),
    Situation("line_too_long", request("/" + "a" * 5000)),
    Situation("line_too_long_unfinished", b"GET /" + b"a" * 5000),
    Situation("field_too_large", request("/hello", "A: " + "b" * 9000)),
    Situation("too_many_fields", request("/hello", *(f"A{n}: b" for n in range(101)))),
    Situation("length_signed", length(" +3")),
    Situation("length_negative", length(" -3")),
    Situation("length_twice", length(" 3\r\nContent-Length: 3")),
    Situation("length_list", length(" 3, 3")),
    Situation("length_empty", length("")),
    Situation("length_hex", length(" 0x3")),
    Situation("length_vertical_tab", length(" \x0b3")),
    Situation("length_and_chunked", te(" chunked\r\nContent-Length: 3")),
    Situation("chunked_and_length", length(" 3\r\nTransfer-Encoding: chunked")),
    Situation("chunked_1_0", te(" chunked", version="1.0")),
    Situation("identity", te(" identity")),
    Situation("gzip_only", te(" gzip")),
    Situation("unknown_coding", te(" xchunked")),
    Situation("chunked_vertical_tab", te(" \x0bchunked")),
    Situation("chunked_quoted", te(' "chunked"')),
    Situation("chunked_semicolon", te(" chunked;q=1")),
    Situation("chunked_twice", te(" chunked, chunked")),
    Situation("chunked_not_last", te(" chunked, gzip")),
    Situation("chunk_size_bad", te(" chunked", b"zz\r\nabc\r\n0\r\n\r\n")),
    Situation("chunk_size_bad_and_no_more", te(" chunked", b"zz\r\n")),
    Situation("chunk_size_empty", te(" chunked", b"\r\nabc\r\n0\r\n\r\n")),
    Situation("chunk_size_signed", te(" chunked", b"+3\r\nabc\r\n0\r\n\r\n")),
    Situation("chunk_size_underscore", te(" chunked", b"0_3\r\nabc\r\n0\r\n\r\n")),
    Situation("chunk_size_spaces", te(" chunked", b"3 \r\nabc\r\n0\r\n\r\n")),
    Situation("chunk_size_endless", te(" chunked", b"1" * 9000)),
    Situation("chunk_too_long", te(" chunked", b"3\r\nabcd\r\n0\r\n\r\n")),
    Situation("chunk_extension_bad", te(" chunked", b"3;a\rb\r\nabc\r\n0\r\n\r\n")),
    Situation("trailer_bad", te(" chunked", b"3\r\nabc\r\n0\r\nA b: c\r\n\r\n")),
    Situation("trailer_forbidden", te(" chunked", b"3\r\nabc\r\n0\r\nHost: evil\r\n\r\n")),
    Situation("trailer_bare_lf", te(" chunked", b"3\r\nabc\r\n0\r\nA: b\n\n")),
]

LARGE = [
    Situation("length_1m_less_1", post("/digest", b"x" * (MEBIBYTE - 1))),
    Situation("length_1m", post("/digest", b"x" * MEBIBYTE)),
    Situation("length_1m_and_1", post("/digest", b"x" * (MEBIBYTE + 1))),
    Situation("length_20m", post("/digest", b"x" * 20_000_000)),
    Situation("chunked_100k", chunked("/digest", b"x" * 100_000)),
    Situation("chunked_1m", chunked("/digest", b"x" * MEBIBYTE)),
    Situation("chunked_8m_in_64k", chunked("/digest", *[b"x" * 65_536] * 128)),
    Situation("chunked_in_1k", chunked("/digest", *[b"x" * 1000] * 900)),
    Situation("chunked_in_single_bytes", chunked("/digest", *[b"x"] * 20_000)),
]


@pytest.fixture(scope="module")
def pair(module_start) -> Pair:
    return start_pair(module_start)


def seen_by_both(pair: Pair, situation: Situation, which: int) -> Outcome:
    ours, stock = pair.outcomes([situation.sent], *situation.methods, which=which)
    assert ours == stock
    return ours


@pytest.mark.parametrize("which", [0, 1], ids=["tcp", "unix"])
@pytest.mark.parametrize("situation", WELL_FORMED, ids=str)
def test_well_formed_request_has_the_outcome_it_has_with_gunicorns_own(pair, situation, which):
    outcome = seen_by_both(pair, situation, which)
    assert len(outcome.replies) == len(situation.methods)


@pytest.mark.parametrize("which", [0, 1], ids=["tcp", "unix"])
@pytest.mark.parametrize("situation", MALFORMED, ids=str)
def test_malformed_request_is_refused_as_gunicorns_own_refuses_it(pair, situation, which):
    outcome = seen_by_both(pair, situation, which)
    assert [status // 100 in (4, 5) for status in outcome.statuses] == [True]
    assert not outcome.stays


@pytest.mark.parametrize("which", [0, 1], ids=["tcp", "unix"])
@pytest.mark.parametrize("situation", LARGE, ids=str)
def test_large_body_arrives_whole(pair, situation, which):
    outcome = seen_by_both(pair, situation, which)
    size = situation.sent.count(b"x")
    assert [reply.body for reply in outcome.replies] == [b"%d %d" % (size, size)]
    assert outcome.stays


@pytest.mark.parametrize("situation", LARGE, ids=str)
def test_large_body_arrives_whole_on_a_kept_connection(pair, situation):
    with Wire(pair.ours.address) as wire:
        wire.send(GET).reply()
        outcome = wire.send(situation.sent).outcome("POST")
    assert (outcome.statuses, outcome.stays) == ([200], True)


SMALL = [each for each in WELL_FORMED + MALFORMED if len(each.sent) < 2000]


SPLIT = ["small_body", "chunked_trailers", "chunked_extensions", "pipelined_2", "leading_crlf",
         "unread_body", "expect_sent_anyway", "length_and_chunked", "trailer_bad"]  # fmt: skip
IN_BYTES = [pytest.param(each, 0, id=f"{each}-tcp") for each in SMALL]
IN_BYTES += [pytest.param(each, 1, id=f"{each}-unix") for each in SMALL if each.name in SPLIT]


@pytest.mark.parametrize(("situation", "which"), IN_BYTES)
def test_request_that_comes_byte_by_byte_has_the_same_outcome(pair, situation, which):
    with Wire(pair.ours.addresses[which]) as wire:
        whole = wire.send_if_it_can(situation.sent).outcome(*situation.methods)
    with Wire(pair.ours.addresses[which]) as wire:
        parts = [bytes([byte]) for byte in situation.sent]
        assert wire.send_if_it_can(*parts).outcome(*situation.methods) == whole


@pytest.mark.parametrize("which", [0, 1], ids=["tcp", "unix"])
@pytest.mark.parametrize("situation", [s for s in SMALL if s.name in SPLIT], ids=str)
def test_request_in_two_parts_has_the_same_outcome_wherever_it_is_cut(pair, situation, which):
    address, sent = pair.ours.addresses[which], situation.sent
    with Wire(address) as wire:
        whole = wire.send(sent).outcome(*situation.methods)
    wires = [Wire(address).send(sent[:cut]) for cut in range(1, len(sent))]
    for cut, wire in enumerate(wires, 1):
        wire.send_if_it_can(sent[cut:])
    for cut, wire in enumerate(wires, 1):
        with wire:
            assert wire.outcome(*situation.methods) == whole, (sent[:cut], sent[cut:])


def test_request_behind_a_body_whose_end_came_with_it_is_answered(pair):
    with Wire(pair.ours.address) as wire:
        for _ in range(3):
            head, body = post("/echo", b"x" * 20_000)[:-20_000], b"x" * 20_000
            wire.send(head)
            wire.send(body + GET)
            assert [wire.reply("POST").status, wire.reply().body] == [200, b"hello\n"]


def test_body_that_is_sent_after_100_continue_only_is_read(pair):
    for server in (pair.ours, pair.stock):
        with Wire(server.address) as wire:
            wire.send(request("/echo", "Expect: 100-continue", "Content-Length: 3", method="POST"))
            assert wire.reply().status == 100
            outcome = wire.send(b"abc").outcome("POST")
            assert (outcome.replies[0].body, outcome.stays) == (b"abc", True)


def test_last_of_pipelined_requests_may_still_be_on_its_way(pair):
    with Wire(pair.ours.address) as wire:
        wire.send(GET * 3 + GET[:-2])
        assert [wire.reply().status for _ in range(3)] == [200] * 3
        assert wire.send(GET[-2:]).outcome("GET").statuses == [200]


@pytest.mark.parametrize("which", [0, 1], ids=["tcp", "unix"])
@pytest.mark.parametrize("size", [65_536, 200_000])
def test_body_left_unread_that_is_large_ends_the_connection_as_with_gthread(pair, size, which):
    """gunicorn's gevent worker reads on, however much there is."""
    servers = [pair.ours] if pair.ours.mode == "gevent" else [pair.ours, pair.stock]
    for server in servers:
        with Wire(server.addresses[which]) as wire:
            outcome = wire.send_if_it_can(post("/ignore", b"x" * size) + GET).outcome("POST")
            assert (outcome.statuses, outcome.stays) == ([200], False)


def test_body_left_unread_closes_the_connection_without_a_second_answer(pair):
    """gthread sends a 400 behind the answer, which a client takes for that to its next request."""
    with Wire(pair.ours.address) as wire:
        wire.send(request("/ignore", "Transfer-Encoding: chunked", method="POST") + b"zz\r\n")
        assert wire.reply("POST").body == b"ignored\n"
        assert wire.rest() == b""


def test_answer_arrives_although_20_mb_were_left_unread(pair):
    """gthread resets, and the client that still sends never sees the answer."""
    with Wire(pair.ours.address) as wire:
        wire.send_if_it_can(post("/ignore", b"x" * 20_000_000))
        assert wire.reply("POST").body == b"ignored\n"


def test_body_that_ends_early_is_not_run(pair):
    """gthread runs it with what has come."""
    with Wire(pair.ours.address) as wire:
        wire.send(post("/echo", b"abc")[:-1]).sock.shutdown(1)
        assert wire.rest() == b""
