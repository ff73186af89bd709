"""The answers that the dispatcher gives without a slot, byte for byte."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from replica_plugin import answers
from replica_plugin.actions import Why
from replica_plugin.answers import Answer
from replica_plugin.decisions import Rules

TEXT = ("Content-Type", "text/plain; charset=utf-8")
JSON = ("Content-Type", "application/json")
DATE = "Sat, 01 Jan 2000 00:00:00 GMT"
ANSWER = Answer(503, "Say thät.", 7)


@pytest.fixture(autouse=True)
def _fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 946684800.9)


def head(*headers: str) -> bytes:
    return "".join(f"{line}\r\n" for line in ["GET / HTTP/1.1", *headers, ""]).encode()


def test_an_answer_is_text_that_no_cache_keeps():
    assert ANSWER.encode(head(), keep_alive=False, bodiless=False) == (
        b"HTTP/1.1 503 Service Unavailable\r\n"
        b"Server: gunicorn\r\n"
        b"Date: Sat, 01 Jan 2000 00:00:00 GMT\r\n"
        b"Connection: close\r\n"
        b"Content-Type: text/plain; charset=utf-8\r\n"
        b"Content-Length: 11\r\n"
        b"Cache-Control: no-store\r\n"
        b"Retry-After: 7\r\n"
        b"\r\n"
        b"Say th\xc3\xa4t.\n"
    )


def test_a_client_that_accepts_json_gets_json():
    assert ANSWER.encode(head("Accept: application/json"), keep_alive=True, bodiless=False) == (
        b"HTTP/1.1 503 Service Unavailable\r\n"
        b"Server: gunicorn\r\n"
        b"Date: Sat, 01 Jan 2000 00:00:00 GMT\r\n"
        b"Connection: keep-alive\r\n"
        b"Content-Type: application/json\r\n"
        b"Content-Length: 61\r\n"
        b"Cache-Control: no-store\r\n"
        b"Retry-After: 7\r\n"
        b"\r\n"
        b'{"error": "Service Unavailable", "detail": "Say th\\u00e4t."}\n'
    )


def test_an_answer_to_head_tells_the_length_of_the_body_and_has_none():
    assert Answer(200, "ready").encode(head(), keep_alive=True, bodiless=True) == (
        b"HTTP/1.1 200 OK\r\n"
        b"Server: gunicorn\r\n"
        b"Date: Sat, 01 Jan 2000 00:00:00 GMT\r\n"
        b"Connection: keep-alive\r\n"
        b"Content-Type: text/plain; charset=utf-8\r\n"
        b"Content-Length: 6\r\n"
        b"Cache-Control: no-store\r\n"
        b"\r\n"
    )


@pytest.mark.parametrize(
    ("method", "headers", "content"),
    [
        ("GET", [("HOST", "x")], b"Say th\xc3\xa4t.\n"),
        ("POST", [("HOST", "x"), ("ACCEPT", "application/json")], b"{"),
        ("HEAD", [], b""),
    ],
)
def test_an_answer_for_a_request_that_gunicorn_has_parsed_ends_the_connection(
    method, headers, content
):
    data = ANSWER.encode_for(SimpleNamespace(method=method, headers=headers))
    fields, _, body = data.partition(b"\r\n\r\n")
    assert b"\r\nConnection: close\r\n" in fields
    assert body.startswith(content) and bool(body) == bool(content)


def test_an_answer_for_a_request_that_was_not_parsed_yet_is_text():
    assert ANSWER.encode_for(None) == ANSWER.encode(b"", keep_alive=False, bodiless=False)


def test_overdue_without_a_limit_that_is_known_has_no_figure():
    assert answers.overdue(None).text == "The app did not answer within request_timeout."


def test_a_request_without_a_head_is_answered_with_text():
    assert b"text/plain" in Answer(408, "Late.").encode(b"", keep_alive=False, bodiless=False)


@pytest.mark.parametrize(
    "accept",
    [
        "application/json",
        "application/json;q=0.1",
        "Application/JSON; charset=utf-8",
        "text/html, application/json",
        "text/html;q=0.9,application/json;q=0.5,*/*;q=0.1",
        "application/problem+json",
        "application/vnd.github.v3+json",
        "application/ld+json, */*",
    ],
)
def test_json_goes_to_whoever_names_it_with_whatever_weight(accept):
    assert ANSWER.content(head("Host: x", f"Accept: {accept}", "X: y"))[0][0] == JSON


@pytest.mark.parametrize(
    "header",
    [
        "Accept: */*",
        "Accept: application/*",
        "Accept: text/html, text/plain;q=0.5",
        "Accept: application/jsonp",
        "Accept: application/json-seq",
        "Accept: application/json;q=0",
        "Accept: text/html, application/json; q=0.000, */*",
        "Accept:",
        "X-Accept: application/json",
        "Content-Type: application/json",
        "Accept-Encoding: application/json",
    ],
)
def test_anybody_else_gets_text(header):
    assert ANSWER.content(head(header))[0][0] == TEXT


def test_every_accept_header_counts_in_any_case():
    assert ANSWER.content(head("ACCEPT: text/html", "accept:application/json"))[0][0] == JSON


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            answers.refusal(Why.FULL, Rules(bound=12), 429, 3),
            Answer(
                429,
                "The replica is full: 12 requests are in flight, as many as "
                "max_replica_concurrency (12) admits.",
                3,
            ),
        ),
        (
            answers.refusal(Why.WAITED, Rules(queue_timeout=0.7), 429, 3),
            Answer(503, "No slot became free within queue_timeout (0.7 s).", 3),
        ),
        (
            answers.refusal(Why.WAITED, Rules(queue_timeout=0.7), 429, 3, 0.25),
            Answer(503, "No slot became free within X-Queue-Timeout (0.25 s).", 3),
        ),
        (
            answers.refusal(Why.WAITED, Rules(queue_timeout=0.7), 429, 3, 2.0),
            Answer(503, "No slot became free within queue_timeout (0.7 s).", 3),
        ),
        (
            answers.refusal(Why.CROWDED, Rules(), 429, 3),
            Answer(
                503,
                "All slots for exempt paths are busy, and 16 requests wait for them, "
                "as many as may.",
                1,
            ),
        ),
        (
            answers.refusal(Why.STOPPING, Rules(), 429, 3),
            Answer(503, "The server is shutting down, and no slot became free in time.", 1),
        ),
        (answers.LOST, Answer(502, "The process that was working on this request died.")),
        (
            answers.UNTAKEN,
            Answer(503, "The process that was to work on this request is out of descriptors.", 1),
        ),
        (
            answers.head_too_late(10.0),
            Answer(408, "The request's head did not arrive within header_timeout (10 s)."),
        ),
        (
            answers.body_too_late(0.5),
            Answer(408, "Nothing of the request's body came for receive_timeout (0.5 s)."),
        ),
        (
            answers.head_too_large(8192),
            Answer(
                431,
                "The request's head is larger than 8192 bytes "
                "(limit_request_fields x limit_request_field_size).",
            ),
        ),
        (answers.probe(True, "ready", "not ready"), Answer(200, "ready")),
        (answers.probe(False, "ready", "not ready"), Answer(503, "not ready")),
    ],
)
def test_an_answer_names_the_rule_and_its_value(answer, expected):
    assert answer == expected
