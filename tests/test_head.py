"""What the dispatcher sees of a request, beside gunicorn's own parser, which frames it."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from contextlib import suppress
from itertools import accumulate, pairwise
from typing import Any

import pytest
from gunicorn import http
from gunicorn.config import Config
from gunicorn.http.errors import NoMoreData, ParseException
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stage import PATIENCE

from replica_plugin.config.values import LONGEST
from replica_plugin.head import HEAD_KEPT, PROXY_V2, Head, HeadTooLarge, Limits, read_head

get_parser = getattr(http, "get_parser", None) or http.RequestParser  # get_parser since 25

PLAIN = b"GET /a?b=1 HTTP/1.1\r\nHost: x\r\n\r\n"
PROXY_V1 = b"PROXY TCP4 10.0.0.1 10.0.0.2 5000 80\r\n"
ADDRESSES = b"\x0a\0\0\x01\x0a\0\0\x02\x13\x88\0\x50"
PROXIED_V2 = PROXY_V2 + b"\x21\x11\0\x0c" + ADDRESSES
WITH_PROXY = Limits(proxy=True)


LIMITS = Limits()


def seen(data: bytes, limits: Limits = LIMITS, first: bool = True) -> Head:
    head = read_head(data, limits, first)
    assert head is not None
    return head


# When a head has arrived.


@pytest.mark.parametrize(
    ("data", "limits"),
    [
        (PLAIN, Limits()),
        (b"GET / HTTP/1.1\r\n\r\n", Limits()),
        (b"\r\n" + PLAIN, Limits()),
        (PLAIN, WITH_PROXY),
        (b"\r\n" + PLAIN, WITH_PROXY),
        (PROXY_V1 + PLAIN, WITH_PROXY),
        (PROXY_V1 + b"\r\n" + PLAIN, WITH_PROXY),
        (PROXIED_V2 + PLAIN, WITH_PROXY),
        (PROXIED_V2 + b"\r\n" + PLAIN, WITH_PROXY),
        (b"PROPFIND / HTTP/1.1\r\n\r\n", WITH_PROXY),  # not a PROXY line
    ],
)
def test_a_head_has_arrived_with_its_last_byte_and_not_before(data, limits):
    for end in range(len(data)):
        assert read_head(data[:end], limits, True) is None
    assert seen(data, limits).size == len(data)
    assert seen(data + b"body", limits).size == len(data)
    assert seen(bytearray(data), limits).size == len(data)


def test_a_preamble_counts_in_the_size_and_not_in_the_text():
    for preamble in (PROXY_V1, PROXIED_V2):
        assert seen(preamble + PLAIN, WITH_PROXY) == seen(PLAIN)._replace(
            size=len(preamble + PLAIN)
        )


def test_a_preamble_is_expected_on_the_first_request_only():
    assert seen(PROXY_V1 + PLAIN, WITH_PROXY, first=False).method == b""


def test_without_proxy_protocol_a_preamble_is_a_malformed_request():
    assert seen(PROXY_V1 + PLAIN).method == b""


@pytest.mark.parametrize(
    "data",
    [
        *(b"\n", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nHost: x\n"),  # bare line feeds
        *(b"GET /\r\n", b"GET  / HTTP/1.1\r\n", b"\r\n\r\n"),  # not a request line
    ],
)
def test_what_the_parser_refuses_counts_as_arrived_so_that_it_can_do_so_at_once(data):
    assert seen(data) == Head(len(data))


def test_with_a_parser_that_waits_for_the_end_of_what_is_malformed_that_end_is_awaited():
    """That of gunicorn 23 and the one in C do, and each such head would hold a slot."""
    limits = Limits(at_once=False)
    for data in (b"\n", b"GET / HTTP/1.1\nHost: x\n\n", b"GET  / HTTP/1.1\r\n", b"G" * 5000):
        assert read_head(data, limits, True) is None
        assert seen(data + b"\r\n\r\n", limits).method == b""


def test_a_line_that_is_longer_than_allowed_counts_as_arrived():
    limits = Limits(line=20)
    for blank in (b"", b"\r\n"):
        assert read_head(blank + b"G" * 22, limits, True) is None
        assert seen(blank + b"G" * 23, limits) == Head(len(blank) + 23)
        assert read_head(blank + b"GET /2345 HTTP/1.1\r\n", limits, True) is None
        assert read_head(blank + b"GET /234567 HTTP/1.1\r\n", limits, True) is None
        assert seen(blank + b"GET /2345678 HTTP/1.1\r\n", limits).method == b""
    assert read_head(b"G" * 5000, Limits(line=0), True) is None


@pytest.mark.parametrize("data", [b"\n", b"A\r\n\r\n", b"\r\n\r\n\r\n", b"PROXY " + b"x" * 5000])
def test_where_a_preamble_may_come_a_slot_is_not_taken_by_what_the_parser_would_wait_with(data):
    assert read_head(data, WITH_PROXY, True) is None


def test_a_head_above_the_limit_is_too_large_whether_it_has_ended_or_not():
    limits = Limits(head=50, line=0)
    assert seen(b"GET / HTTP/1.1\r\nA: " + b"x" * 31 + b"\r\n\r\n", limits).size == 54
    assert read_head(b"GET / HTTP/1.1\r\nA: " + b"x" * 31, limits, True) is None
    for end in (b"", b"\r\n\r\n"):
        with pytest.raises(HeadTooLarge):
            read_head(b"GET / HTTP/1.1\r\nA: " + b"x" * 32 + end, limits, True)


def test_the_preamble_does_not_count_towards_the_limit():
    limits = Limits(head=50, line=0, proxy=True)
    head = b"GET / HTTP/1.1\r\nA: " + b"x" * 31 + b"\r\n\r\n"
    assert seen(PROXY_V1 + head, limits).size == len(PROXY_V1) + 54


@pytest.mark.parametrize(
    "field",
    [
        "b'Content-Length: ' + b'0' * 500_000 + b'x'",
        "b'Content-Length: ' + b' ' * 500_000 + b'x'",
        "b'Content-Length: 1' + b' ' * 500_000 + b'x'",
        "b'Transfer-Encoding: x' + b' ' * 500_000 + b'y'",
        "b'Connection: x' + b' ' * 500_000 + b'y'",
        "b'Connection: x' + b' ,' * 250_000 + b'y'",
    ],
)
def test_a_head_that_is_one_long_run_takes_no_time_to_look_at(field):
    code = (
        "from replica_plugin.head import Limits, read_head; "
        f"head = read_head(b'GET / HTTP/1.1\\r\\n' + {field} + b'\\r\\n\\r\\n', Limits(), True); "
        "print(head.ends_request, head.keeps_alive)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


# What a head says.


def test_method_and_path_are_those_of_the_request_line():
    head = seen(b"DELETE /a/b?c=/d?e HTTP/1.1\r\n\r\n")
    assert (head.method, head.path) == (b"DELETE", b"/a/b")


@pytest.mark.parametrize(
    "line", [b"GET  / HTTP/1.1", b"GET /", b"GET / HTTP/20", b"GET /\xff HTTP/1.1", b" / HTTP/1.1"]
)
def test_a_malformed_request_line_leaves_the_method_empty(line):
    head = seen(line + b"\r\n\r\n")
    assert head == Head(len(line) + 4, line + b"\r\n\r\n")


@pytest.mark.parametrize("data", [b"G" * 999_999 + b" / ", b"GET /" + b"x" * 999_999 + b" "])
def test_little_is_kept_of_a_request_line_that_may_be_as_long_as_it_likes(data):
    head = read_head(data + b"HTTP/1.1\r\n\r\n", Limits(line=0), True)
    kept = head.shortened()
    assert (kept.method, kept.path) == (head.method[:HEAD_KEPT], head.path[:HEAD_KEPT])
    assert len(kept.text) == HEAD_KEPT
    assert HEAD_KEPT - len("healthz") > LONGEST  # else another path could be taken for one of ours


@pytest.mark.parametrize(
    ("version", "headers", "keeps"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: Close\r\n", False),
        (b"1.1", b"Connection:close\r\n", False),
        (b"1.1", b"CONNECTION: keep-alive\r\n", True),
        (b"1.1", b"Connection: upgrade\r\n", True),
        (b"1.1", b"Connection: keep-alive\r\nConnection: close\r\n", False),
        (b"1.0", b"Connection: x\r\nA: b\r\nConnection: keep-alive\r\n", True),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: \tKeep-Alive \r\n", True),
        (b"1.0", b"Connection: close\r\n", False),
        (b"1.0", b"X-Connection: keep-alive\r\n", False),
    ],
)
def test_a_connection_is_kept_alive_as_its_version_and_header_say(version, headers, keeps):
    head = seen(b"GET / HTTP/" + version + b"\r\n" + headers + b"\r\n")
    assert head.keeps_alive is keeps


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        (b"Content-Length: 12\r\n", 12),
        (b"content-length:12\r\n", 12),
        (b"CONTENT-LENGTH: \t12 \t\r\n", 12),
        (b"Content-Length: 0012\r\n", 12),
        (b"Content-Length: 0\r\n", 0),
        # Malformed, for the parser to refuse; none of it is awaited:
        (b"Content-Length: -1\r\n", 0),
        (b"Content-Length: 1_0\r\n", 0),
        (b"Content-Length:\r\n", 0),
        (b"Content-Length : 12\r\n", 0),
        (b"Content-Length: 12\r\nContent-Length: 12\r\n", 0),
        (b"Content-Length: 12\r\nTransfer-Encoding: chunked\r\n", 0),
    ],
)
def test_the_content_length_is_what_body_to_await_unless_it_is_malformed(headers, length):
    head = seen(b"POST / HTTP/1.1\r\n" + headers + b"\r\n")
    assert (head.length, head.chunked, head.framed) == (length, False, True)
    assert not head.ends_request


def test_an_absurd_length_is_a_large_number():
    head = seen(b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n")
    assert head.length == 10**18 - 1


@pytest.mark.parametrize(
    ("headers", "length", "chunked"),
    [
        (b"Content-Length: 12\r\nTransfer-Encoding-X: 1\r\n", 12, False),
        (b"Content-Length-X: 1\r\nTransfer-Encoding: chunked\r\n", 0, True),
        (b"Content-Length-X: 1\r\nTransfer-Encoding-X: 1\r\n", 0, False),
    ],
)
def test_a_field_whose_name_only_begins_like_one_for_a_body_says_nothing_of_it(
    headers, length, chunked
):
    head = seen(b"POST / HTTP/1.1\r\n" + headers + b"\r\n")
    assert (head.length, head.chunked, head.ends_request) == (length, chunked, False)


@pytest.mark.parametrize(
    ("version", "value", "chunked"),
    [
        (b"1.1", b"chunked", True),
        (b"1.1", b"Chunked", True),
        (b"1.1", b"gzip, chunked", True),
        (b"1.1", b"gzip", False),
        (b"1.1", b"chunked, gzip", False),
        (b"1.1", b"x, chunked", False),
        (b"1.0", b"chunked", False),
    ],
)
def test_chunks_are_awaited_where_the_parser_will_read_chunks(version, value, chunked):
    fields = b"\r\nTransfer-Encoding: " + value + b"\r\n\r\n"
    head = seen(b"POST / HTTP/" + version + fields)
    assert (head.length, head.chunked, head.framed) == (0, chunked, True)
    assert not head.ends_request


def test_an_expectation_is_seen():
    assert seen(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n").expects
    assert not seen(b"POST / HTTP/1.1\r\nX-Expect: 100-continue\r\n\r\n").expects


@pytest.mark.parametrize(
    ("data", "ends"),
    [
        (PLAIN, True),
        (b"\r\n" + PLAIN, True),
        (b"POST / HTTP/1.1\r\nX: \xe4\t1\r\n\r\n", True),
        (b"POST / HTTP/1.1\r\nX-Content-Length: 12\r\n\r\n", True),
        (b"CONNECT a:1 HTTP/1.1\r\n\r\n", False),
        (b"GET / HTTP/2.0\r\n\r\n", False),
        (b"GET / HTTP/1.1\r\nA : b\r\n\r\n", False),
        (b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", False),
        (b"GET / HTTP/1.1\r\nA: b\0\r\n\r\n", False),
        (b"GET / HTTP/1.1\r\nA: b\rContent-Length: 5\r\n\r\n", False),
        (b"GET / HTTP/1.1\r\nA: b\nContent-Length: 5\r\n\r\n", False),
        (b"GET / HTTP/1.1\r\nContent-Length : 5\r\n\r\n", False),
    ],
)
def test_a_request_surely_ends_with_a_head_that_all_read_alike_and_that_frames_no_body(data, ends):
    assert seen(data).ends_request is ends


# Beside gunicorn's parser.

LINE, FIELDS, FIELD = 60, 5, 40


@functools.cache
def config(proxy: bool) -> Config:
    cfg = Config()
    cfg.set("limit_request_line", LINE)
    cfg.set("limit_request_fields", FIELDS)
    cfg.set("limit_request_field_size", FIELD)
    cfg.set("proxy_protocol", proxy)
    return cfg


def decides(chunks: list[bytes], proxy: bool) -> bool:
    """Whether gunicorn's parser has a head, or an error; if not, it would wait for more."""
    parser = get_parser(config(proxy), [each for each in chunks if each], ("127.0.0.1", 1))
    try:
        next(parser)
    except (NoMoreData, StopIteration):
        return False
    except Exception:
        pass
    return True


def parsed(data: bytes, proxy: bool) -> Any:
    """The request that the parser reads, and the bytes it leaves behind the head."""
    parser = get_parser(config(proxy), [data], ("127.0.0.1", 1))
    return next(parser), parser.unreader.read()


def limits(proxy: bool) -> Limits:
    return Limits(LINE + FIELDS * (FIELD + 2) + 4, LINE, proxy)


tokens = st.text("abcXYZ019!#$%&'*+-.^`|~", min_size=1, max_size=8)
values = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
methods = st.text("GETPOSX-", min_size=3, max_size=8)
targets = values.map(lambda text: "/" + text.replace("#", ""))
fields = st.one_of(
    st.tuples(tokens.map(lambda name: "x-" + name), values),
    st.tuples(st.just("Content-Length"), st.integers(0, 99).map(str)),
    st.just(("Transfer-Encoding", "chunked")),
    st.just(("Expect", "100-continue")),
    st.tuples(st.just("Connection"), st.sampled_from(["close", "Keep-Alive", "upgrade", ""])),
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    lines = [f"{draw(methods)} {draw(targets)} HTTP/1.{draw(st.integers(0, 1))}"]
    several = draw(st.lists(fields, max_size=FIELDS, unique_by=lambda field: field[0]))
    framing = {"Content-Length", "Transfer-Encoding"}
    if len(framing & {name for name, _ in several}) == 2 or lines[0].endswith("0"):
        several = [field for field in several if field[0] not in framing]
    lines += [f"{name}:{value}" for name, value in several]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


preambles = st.sampled_from([b"", b"\r\n", PROXY_V1, PROXIED_V2, PROXIED_V2 + b"\r\n"])


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[bytes], bool]:
    """A valid request, what follows it, and where it is cut into pieces.

    Not right behind a PROXY preamble: what gunicorn's parser makes of a blank line there
    depends on whether it came with the same read, and a slot's comes with what lies there.
    """
    preamble = draw(preambles)
    data = preamble + draw(requests()) + draw(st.binary(max_size=20))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    cuts = [cut for cut in cuts if cut not in (len(PROXY_V1), len(PROXIED_V2))]
    return [data[a:b] for a, b in pairwise([0, *cuts, len(data)])], len(preamble) > 2


@settings(deadline=None)
@given(arrivals())
def test_the_head_of_a_valid_request_has_arrived_exactly_when_the_parser_has_it(arrival):
    chunks, proxy = arrival
    for count, data in enumerate(accumulate(chunks, initial=b"")):
        has_arrived = read_head(data, limits(proxy), True) is not None
        assert has_arrived == decides(chunks[:count], proxy)
    head = seen(data, limits(proxy))
    request, rest = parsed(data, proxy)
    assert data[head.size :] == rest
    assert (head.method.decode(), head.path.decode()) == (request.method, request.path)
    assert head.keeps_alive is not request.should_close()


pieces = st.sampled_from(
    [
        *(b"\r\n", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b" ", b":", b"G", b"x" * 40),
        *(PLAIN, b"GET / HTTP/1.1\r\n", b"A: b\r\n", b"A:", b"Content-Length: 3\r\n"),
        *(b"content-length : 3\r\n", b"Transfer-Encoding: chunked\r\n", b" folded\r\n", b"\xff"),
        *(PROXY_V1, b"PROXY ", b"PROXY TCP4", PROXY_V2, PROXIED_V2, PROXIED_V2[:13], ADDRESSES),
    ]
)


@settings(max_examples=500, deadline=None)
@given(data=st.lists(pieces, max_size=6).map(b"".join), proxy=st.booleans())
@example(data=b"A\n", proxy=True)
@example(data=b"\r\n\r\n\r\n", proxy=True)
@example(data=b"PROXY " + b"x" * 200, proxy=True)
@example(data=b"\r\n" + b"G" * (LINE + 1), proxy=False)
def test_whatever_counts_as_arrived_makes_no_parser_wait(data, proxy):
    """A slot would wait with it, for a client that is silent."""
    try:
        head = read_head(data, limits(proxy), True)
    except HeadTooLarge:
        return
    assert head is None or decides([data], proxy)


starts = st.sampled_from([b"", b"\r\n", PROXY_V1]).map(lambda start: start + b"POST / HTTP/1.1\r\n")


@settings(max_examples=500, deadline=None)
@given(start=starts, data=st.lists(pieces, max_size=4).map(b"".join))
def test_where_a_request_surely_ends_with_its_head_it_does_for_the_parser(start, data):
    """What lies behind it would be taken for another request, or for the answer to it."""
    proxy = start.startswith(b"PROXY")
    data = start + data + b"\r\n\r\nrest"
    try:
        head = seen(data, limits(proxy))
    except HeadTooLarge:
        return
    if head.ends_request:
        with suppress(ParseException):
            request, _ = parsed(data, proxy)
            assert request.body.read() == b""
            assert parsed(data, proxy)[1] == data[head.size :]


# The client's own wait limit.


@pytest.mark.parametrize(
    ("lines", "patience"),
    [
        ("Host: x", math.inf),
        ("X-Queue-Timeout: 0.5", 0.5),
        ("x-QUEUE-timeout:\t2 ", 2.0),
        ("X-Queue-Timeout: 0", 0.0),
        ("X-Queue-Timeout: 3\r\nX-Queue-Timeout: 1\r\nX-Queue-Timeout: 2", 1.0),
        ("X-Queue-Timeout: 3\r\nX-Queue-Timeout: soon", 3.0),
        ("X-Queue-Timeout: -1", math.inf),
        ("X-Queue-Timeout: 1, 2", math.inf),
        ("X-Queue-Timeout: 500ms", math.inf),
        ("X-Queue-Timeout: 1e3", math.inf),
        ("X-Queue-Timeout: inf", math.inf),
        ("X-Queue-Timeout: nan", math.inf),
        ("X-Queue-Timeout:", math.inf),
        ("X-Queue-Timeout: " + "1" * 400, math.inf),
        ("X-Queue-Timeout : 1", math.inf),
        ("Y: X-Queue-Timeout: 1", math.inf),
        ("Y: y\r\n X-Queue-Timeout: 1", math.inf),
    ],
)
def test_a_client_says_in_seconds_how_long_it_waits_at_most(lines, patience):
    data = f"GET / HTTP/1.1\r\n{lines}\r\n\r\n".encode()
    head = read_head(data, Limits(), True)
    assert head is not None
    assert head.patience == patience
