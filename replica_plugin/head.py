"""What the first bytes of a request tell, without framing it.

The dispatcher needs to know three things: has the head arrived, how much of the body
should be awaited, and is it a probe. Whatever looks malformed counts as arrived: judging
it, and answering 400, is the business of gunicorn's parser in a slot. Nothing that is
read here decides where a request ends, except for probes and refusals that have no body.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*\r\n")
_CONNECTION = re.compile(rb"\r\nconnection:([^\r\n]*)")
_LINE = re.compile(rb"([!-~]+) ([!-~]+) HTTP/1\.([01])\r\n")


class HeadTooLarge(Exception):
    """The head is longer than gunicorn's limits together allow."""


class Head(NamedTuple):
    """A head that has arrived.

    `size` counts its bytes, PROXY preamble and blank line included. `length` is the
    Content-Length, None without one. `method` is empty if the request line is malformed.
    """

    size: int
    text: bytes = b""
    method: bytes = b""
    path: bytes = b""
    keeps_alive: bool = False
    length: int | None = None
    chunked: bool = False
    expects: bool = False

    @property
    def has_body(self) -> bool:
        """Whether anything but another request may follow the head."""
        return self.chunked or self.length is not None


class Limits(NamedTuple):
    """Where looking ends: `head` and `line` in bytes; `proxy` if a PROXY line may come first."""

    head: int = 1 << 20
    line: int = 4094
    proxy: bool = False


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
    if _hopeless(data, start, limits):
        return Head(len(data))
    if len(data) - start > limits.head:
        raise HeadTooLarge
    return None


def _after_preamble(data: bytes | bytearray) -> int | None:
    """Where the head begins behind a PROXY preamble; None while that is incomplete."""
    if data.startswith(PROXY_V2[: len(data)]) and len(data) < 16:
        return None
    if data.startswith(PROXY_V2):
        size = 16 + int.from_bytes(data[14:16], "big")
        return size if len(data) >= size else None
    if b"PROXY ".startswith(bytes(data[:6])) and len(data) < 6:
        return None
    if data.startswith(b"PROXY "):
        end = data.find(b"\r\n")
        return end + 2 if end >= 0 else (None if len(data) < 108 else 0)
    return 0


def _hopeless(data: bytes | bytearray, start: int, limits: Limits) -> bool:
    """Whether gunicorn's parser would refuse this head now, without waiting for its end."""
    if data.count(b"\n", start) != data.count(b"\r\n", start):
        return True
    line = data.find(b"\r\n", start + 2)
    return 0 < limits.line < (line if line >= 0 else len(data) - 2) - start


def _parse(text: bytes, size: int) -> Head:
    line = _LINE.match(text, 2 if text.startswith(b"\r\n") else 0)
    if line is None:
        return Head(size, text)
    method, target, minor = line.groups()
    lower = text.lower()
    options = b",".join(_CONNECTION.findall(lower))
    keeps = b"close" not in options and (minor == b"1" or b"keep-alive" in options)
    length = _LENGTH.search(lower)
    return Head(
        size,
        text,
        method,
        target.partition(b"?")[0],
        keeps,
        int(length[1]) if length else (0 if b"\ncontent-length" in lower else None),
        b"\ntransfer-encoding" in lower,
        b"\nexpect:" in lower,
    )
