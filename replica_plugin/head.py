"""What the first bytes of a request tell, without framing it.

The dispatcher needs to know: has the head arrived, how much of the body should be awaited,
is it a probe, and how long does the client want to wait. Whatever looks malformed counts as
arrived: judging it, and answering 400, is the business of gunicorn's parser in a slot.
Nothing that is read here decides where a request ends, except for probes and refusals that
have no body.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

HEAD_KEPT = 1 << 14  # bytes of the head of a request that waits: for an answer, and the log
PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_LINE = re.compile(rb"([!-~]+) ([!-~]+) HTTP/(\d\.\d)\r\n")

# No two neighbours of these patterns match the same bytes: else a client's long run of blanks or
# zeros would be split between them in every possible way, which takes all day.
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(?:(\d+)[ \t]*)?(?=\r\n)")
_CODINGS = re.compile(rb"\r\ntransfer-encoding:([^\r\n]*)(?=\r\n)")
_BEFORE_CHUNKED = (b"identity", b"gzip", b"deflate", b"compress")
_PATIENCE = re.compile(rb"\r\nx-queue-timeout:[ \t]*(\d{1,9}(?:\.\d{1,9})?)[ \t]*(?=\r\n)")
_CONNECTION = re.compile(rb"\r\nconnection:([^\r\n]*)(?=\r\n)", re.IGNORECASE)
_PLAIN = re.compile(
    rb"(?:\r\n)?[!-~]+ [!-~]+ HTTP/1\.\d\r\n"
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t -~\x80-\xff]*\r\n)*\r\n"
)


class HeadTooLarge(Exception):
    """The head is longer than gunicorn's limits together allow."""


class Head(NamedTuple):
    """A head that has arrived.

    `size` counts its bytes, PROXY preamble and blank line included. `length` and `chunked` say
    what body to await; `framed`, that one is spoken of at all. `method` is empty if the request
    line is malformed. `patience` is the client's own wait limit in seconds: X-Queue-Timeout.
    `plain` is None while `text` is whole, and then what `is_plain` was.
    """

    size: int
    text: bytes = b""
    method: bytes = b""
    path: bytes = b""
    length: int = 0
    chunked: bool = False
    expects: bool = False
    framed: bool = False
    patience: float = math.inf
    plain: bool | None = None

    def shortened(self) -> Head:
        """With little of a long text, lest all that wait together take what memory there is."""
        if len(self.text) <= HEAD_KEPT:
            return self
        return self._replace(
            text=self.text[:HEAD_KEPT],
            method=self.method[:HEAD_KEPT],
            path=self.path[:HEAD_KEPT],  # longer than any probe's, or one that is exempt
            plain=self.is_plain,
        )

    @property
    def is_plain(self) -> bool:
        """Whether everybody who reads this head takes it for the same one."""
        return _PLAIN.fullmatch(self.text) is not None if self.plain is None else self.plain

    @property
    def ends_request(self) -> bool:
        """Whether the request has surely ended with its head, and another may follow.

        Of a head that was shortened nobody knows whether the client wants another.
        """
        return (
            self.plain is None and self.is_plain and not self.framed and self.method != b"CONNECT"
        )

    @property
    def keeps_alive(self) -> bool:
        """Whether the client expects to use the connection again (RFC 9112, section 9.3)."""
        fields = b",".join(_CONNECTION.findall(self.text)).lower()
        options = {each.strip(b" \t") for each in fields.split(b",")}
        if b"close" in options:
            return False
        return b"keep-alive" in options or b" HTTP/1.0\r\n" not in self.text


class Limits(NamedTuple):
    """Where looking ends: `head` and `line` in bytes; `proxy` if a PROXY line may come first.

    `at_once` if gunicorn's parser refuses what is malformed without waiting for the head's end.
    """

    head: int = 1 << 20
    line: int = 4094
    proxy: bool = False
    at_once: bool = True


def read_head(data: bytes | bytearray, limits: Limits, first: bool) -> Head | None:
    """The head at the start of `data`, or None if it has not arrived.

    `first` says that this is a connection's first request, which may have a PROXY preamble.
    Raises HeadTooLarge.
    """
    start = _after_preamble(data) if limits.proxy and first else 0
    if start is None:
        return None
    end = data.find(b"\r\n\r\n", start + 2 if data.startswith(b"\r\n", start) else start)
    if end >= 0:
        if end - start > limits.head:
            raise HeadTooLarge
        return _parse(bytes(data[start : end + 4]), end + 4)
    if limits.at_once and _hopeless(data, start, limits):
        return Head(len(data))
    if len(data) - start > limits.head:
        raise HeadTooLarge
    return None


def _after_preamble(data: bytes | bytearray) -> int | None:
    """Where the head begins behind a PROXY preamble; None while that is incomplete."""
    if len(data) < len(PROXY_V2):  # the parser waits for so much, whatever comes
        return None
    if data.startswith(PROXY_V2):
        size = 16 + int.from_bytes(data[14:16], "big")
        return size if len(data) >= size else None
    if data.startswith(b"PROXY "):
        end = data.find(b"\r\n")
        return end + 2 if end >= 0 else None
    return 0


def _hopeless(data: bytes | bytearray, start: int, limits: Limits) -> bool:
    """Whether gunicorn's parser would refuse this head now, without waiting for its end."""
    if data.count(b"\n", start) != data.count(b"\r\n", start):
        return True
    line = start + 2 if data.startswith(b"\r\n", start) else start
    end = data.find(b"\r\n", line)
    if end >= 0 and _LINE.match(data, line) is None:
        return True
    return 0 < limits.line < (end if end >= 0 else len(data) - 2) - line


def _parse(text: bytes, size: int) -> Head:
    line = _LINE.match(text, 2 if text.startswith(b"\r\n") else 0)
    if line is None:
        return Head(size, text)
    method, target, version = line.groups()
    lower = text.lower()
    length, chunked, framed = 0, False, False
    if b"\ncontent-length" in lower:
        lengths, framed = _LENGTH.findall(lower), True
        length = int(lengths[0].lstrip(b"0")[:18] or 0) if len(lengths) == 1 else 0
    if b"\ntransfer-encoding" in lower:
        framed = True
    if b"\ntransfer-encoding:" in lower:
        alone = b"\ncontent-length:" not in lower
        chunked = alone and version > b"1.0" and _is_chunked(lower)
        length = 0
    return Head(
        size,
        text,
        method,
        target.partition(b"?")[0],
        length,
        chunked,
        b"\nexpect:" in lower,
        framed,
        _patience(lower) if b"\nx-queue-timeout:" in lower else math.inf,
    )


def _patience(lower: bytes) -> float:
    """The shortest of the limits the client has set; one that is malformed is none."""
    return min(map(float, _PATIENCE.findall(lower)), default=math.inf)


def _is_chunked(lower: bytes) -> bool:
    """Whether the parser will read chunks; any other coding it refuses at once."""
    values = b",".join(_CODINGS.findall(lower)).split(b",")
    *others, last = (coding.strip(b" \t") for coding in values)
    return last == b"chunked" and all(coding in _BEFORE_CHUNKED for coding in others)
