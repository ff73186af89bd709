"""The HTTP answers that no app gives. They are written here and nowhere else."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from gunicorn import SERVER

from .actions import Why
from .decisions import EXEMPT_QUEUE, Rules

_JSON = re.compile(
    rb"\r\naccept:[^\r\n]*\bapplication/(?:[\w.-]+\+)?json(?![\w.+-])"
    rb"(?![ \t]*;[ \t]*q=0(?:\.0*)?[ \t]*[,;\r])",  # refused with a weight of 0
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """A status and one sentence; `retry_after` in whole seconds.

    The log says `rule` instead, where the sentence has a figure of the client's own: what repeats
    itself is counted there, and a client must not make it something else each time.
    """

    status: int
    text: str
    retry_after: int | None = None
    rule: str = field(default="", compare=False)

    def encode(self, head: bytes, keep_alive: bool, bodiless: bool) -> bytes:
        """The bytes for the client whose request had this head: JSON if it accepts JSON."""
        start, end, content = _encoded(self, _takes_json(head), keep_alive)
        parts = (start, _date(int(time.time())), end)
        return b"".join(parts if bodiless else (*parts, content))

    def encode_for(self, request: Any) -> bytes:
        """The same for a request as gunicorn has parsed it, or None, after which the connection
        ends."""
        if request is None:
            return self.encode(b"", False, False)
        fields = (f"\r\n{name}: {value}" for name, value in request.headers)
        head = "".join((*fields, "\r\n")).encode("latin-1", "replace")
        return self.encode(head, False, request.method == "HEAD")

    def as_wsgi(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        """The same answer, from within a WSGI app."""
        head = f"\r\nAccept: {environ.get('HTTP_ACCEPT', '')}\r\n".encode("latin-1")
        fields, content = self.content(head)
        start_response(self.status_line, fields)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else content]

    def content(self, head: bytes) -> tuple[list[tuple[str, str]], bytes]:
        """Header fields and body for the client whose request had this head."""
        return self._content(_takes_json(head))

    def _content(self, as_json: bool) -> tuple[list[tuple[str, str]], bytes]:
        if as_json:
            state = {"error": HTTPStatus(self.status).phrase, "detail": self.text}
            kind, body = "application/json", f"{json.dumps(state)}\n".encode()
        else:
            kind, body = "text/plain; charset=utf-8", f"{self.text}\n".encode()
        fields = [
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
        ]
        if self.retry_after is not None:
            fields.append(("Retry-After", str(self.retry_after)))
        return fields, body

    @property
    def status_line(self) -> str:
        """As HTTP has it behind the version; and gunicorn's access log."""
        return f"{self.status} {HTTPStatus(self.status).phrase}"


def _takes_json(head: bytes) -> bool:
    return _JSON.search(head) is not None


@lru_cache(512)
def _encoded(answer: Answer, as_json: bool, keep_alive: bool) -> tuple[bytes, bytes, bytes]:
    """What comes before the date, what behind it, and the body.

    Kept, since under overload the same answer goes out thousands of times a second.
    """
    fields, content = answer._content(as_json)
    start = f"HTTP/1.1 {answer.status_line}\r\nServer: {SERVER}\r\nDate: "
    lines = [
        "",
        f"Connection: {'keep-alive' if keep_alive else 'close'}",
        *(f"{name}: {value}" for name, value in fields),
    ]
    return start.encode("latin-1"), "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n", content


@lru_cache(1)
def _date(seconds: int) -> bytes:
    return formatdate(seconds, usegmt=True).encode("latin-1")


def refusal(
    why: Why, rules: Rules, overload_status: int, retry_after: int, patience: float = math.inf
) -> Answer:
    """What a client is told whose request was refused. `patience` is its own wait limit."""
    if why is Why.FULL:
        are = "request is" if rules.bound == 1 else "requests are"
        text = (
            f"The replica is full: {rules.bound} {are} in flight, as many as "
            f"max_replica_concurrency ({rules.bound}) admits."
        )
        return Answer(overload_status, text, retry_after)
    if why is Why.CROWDED:
        text = (
            "All slots for exempt paths are busy, and "
            f"{EXEMPT_QUEUE} requests wait for them, as many as may."
        )
        return Answer(503, text, 1)
    if why is Why.WAITED:
        name, limit, rule = "queue_timeout", rules.wait_limit, ""
        if patience < limit:
            name, limit = "X-Queue-Timeout", patience
            rule = "No slot became free within the client's X-Queue-Timeout."
        text = f"No slot became free within {name} ({_seconds(limit)})."
        return Answer(503, text, retry_after, rule)
    return Answer(503, "The server is shutting down, and no slot became free in time.", 1)


OUT_OF_TIME = Answer(503, "The server is shutting down, and this request was not done in time.", 1)


UNTAKEN = Answer(503, "The process that was to work on this request is out of descriptors.", 1)

LOST = Answer(502, "The process that was working on this request died.")


def overdue(seconds: float | None) -> Answer:
    """The app took too long; None if the limit is not known any more."""
    figure = "" if seconds is None else f" ({_seconds(seconds)})"
    return Answer(504, f"The app did not answer within request_timeout{figure}.")


def head_too_late(seconds: float) -> Answer:
    """The head did not arrive in time."""
    limit = f"header_timeout ({_seconds(seconds)})"
    return Answer(408, f"The request's head did not arrive within {limit}.")


def body_too_late(seconds: float) -> Answer:
    """The body stopped arriving."""
    limit = f"receive_timeout ({_seconds(seconds)})"
    return Answer(408, f"Nothing of the request's body came for {limit}.")


def head_too_large(limit: int) -> Answer:
    """The head is larger than the limits of gunicorn that bound it."""
    return Answer(
        431,
        f"The request's head is larger than {limit} bytes "
        "(limit_request_fields x limit_request_field_size).",
    )


def probe(good: bool, good_text: str, bad_text: str) -> Answer:
    """What a probe is told."""
    return Answer(200, good_text) if good else Answer(503, bad_text)


def _seconds(value: float) -> str:
    return f"{value:g} s"
