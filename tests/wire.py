"""Bytes to a server and back, and two servers that get the same bytes.

`Pair` is ours and gunicorn's own worker of the same mode, with the same app and settings.
`Outcome` is all that a client can see: every reply with its headers (Date aside) and its body as
it was framed, and whether the connection can be used again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from server import OURS, STOCK, STOCK_GEVENT, Client, Server
from stage import PATIENCE

AGAIN = b"GET /hello HTTP/1.1\r\nHost: again\r\n\r\n"


class Seen(NamedTuple):
    """One reply, as it came."""

    line: bytes
    headers: tuple[bytes, ...]
    body: bytes

    @property
    def status(self) -> int:
        return _status(self.line)


class Outcome(NamedTuple):
    """What a client saw of a connection: its replies, and whether it was still of use."""

    replies: tuple[Seen, ...]
    stays: bool

    @property
    def statuses(self) -> list[int]:
        return [reply.status for reply in self.replies]


class Wire:
    """A connection from which replies are read byte-exactly."""

    def __init__(self, address: Any) -> None:
        self.client = Client(address)
        self.sock = self.client.sock
        if self.sock.family != socket.AF_UNIX:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, *parts: bytes) -> Wire:
        for part in parts:
            self.sock.sendall(part)
        return self

    def send_if_it_can(self, *parts: bytes) -> Wire:
        """Send to a server that may close in between, as it does at what is malformed."""
        try:
            return self.send(*parts)
        except (BrokenPipeError, ConnectionResetError):
            return self

    def reply(self, method: str = "GET") -> Seen:
        """The next reply. EOFError if the connection ends before it begins, or within it."""
        head = self._until(b"\r\n\r\n")
        line, *headers = head[:-4].split(b"\r\n")
        pairs = (header.partition(b":") for header in headers)
        named = {name.lower(): value.strip() for name, _, value in pairs}
        kept = tuple(sorted(h for h in headers if not h.lower().startswith(b"date:")))
        return Seen(line, kept, self._body(_status(line), method, named))

    def outcome(self, *methods: str) -> Outcome:
        """So many replies, to requests of these methods; then one more request, if possible."""
        replies = []
        for method in methods:
            try:
                replies.append(self.reply(method))
            except EOFError:
                return Outcome(tuple(replies), False)
        return Outcome(tuple(replies), self.can_go_on())

    def can_go_on(self) -> bool:
        """Whether the connection serves another request, rather than being at its end."""
        try:
            self.send(AGAIN)
            return self.reply().body == b"hello\n"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return False

    def rest(self) -> bytes:
        """All that comes until the end of the stream."""
        while self._more():
            pass
        data, self._data = self._data, b""
        return data

    def _body(self, status: int, method: str, headers: dict[bytes, bytes]) -> bytes:
        if method == "HEAD" or status < 200 or status in (204, 304):
            return b""
        if headers.get(b"transfer-encoding") == b"chunked":
            return self._chunks()
        if b"content-length" in headers:
            return self._exactly(int(headers[b"content-length"]))
        return self.rest()

    def _chunks(self) -> bytes:
        body = b""
        while True:
            line = self._until(b"\r\n")
            chunk = self._exactly(int(line, 16) + 2)
            body += line + chunk
            if line == b"0\r\n":
                return body

    def _until(self, end: bytes) -> bytes:
        while end not in self._data:
            self._need_more()
        found, _, self._data = self._data.partition(end)
        return found + end

    def _exactly(self, size: int) -> bytes:
        while len(self._data) < size:
            self._need_more()
        found, self._data = self._data[:size], self._data[size:]
        return found

    def _need_more(self) -> None:
        if not self._more():
            raise EOFError(self._data)

    def _more(self) -> bool:
        try:
            data = self.sock.recv(1 << 16)
        except ConnectionResetError:
            return False
        self._data += data
        return bool(data)


@dataclass
class Situation:
    """Bytes that a client sends, and how many replies it expects, to which methods."""

    name: str
    sent: bytes
    methods: Sequence[str] = ("GET",)

    def __str__(self) -> str:
        return self.name


class Pair:
    """Our server and a stock one."""

    def __init__(self, ours: Server, stock: Server) -> None:
        self.ours = ours
        self.stock = stock

    def outcomes(self, parts: Iterable[bytes], *methods: str, which: int = 0) -> list[Outcome]:
        """The outcome of the same bytes with ours and with stock gunicorn."""
        parts = list(parts)
        found = []
        for server in (self.ours, self.stock):
            with Wire(server.addresses[which]) as wire:
                found.append(wire.send_if_it_can(*parts).outcome(*methods))
        return found


def start_pair(
    start: Any, *arguments: str, app: str = "odd_app:application", threads: int = 4, **options: Any
) -> Pair:
    """A process of so many threads each, with connections kept for longer than any test lasts."""
    config = {"threads_per_process": threads, **options.pop("config", {})}
    folder = start.stage.path.removesuffix("stage")
    servers = []
    stock = STOCK_GEVENT if start.mode == "gevent" else STOCK
    for name, base in (("ours", OURS), ("stock", stock)):
        unix = os.path.join(folder, f"{name}{len(start.servers)}")
        bind = options.get("bind", ("127.0.0.1:0", f"unix:{unix}"))
        here = (*arguments, "--threads", str(threads)) if base is stock else arguments
        kept = () if "--keep-alive" in arguments else ("--keep-alive", str(int(PATIENCE * 3)))
        more = {**options, "bind": bind, "config": config if base is OURS else None}
        servers.append(start(*kept, *here, base=base, app=app, **more))
    return Pair(*servers)


def request(
    path: str, *fields: str, body: bytes | None = None, method: str = "GET", version: str = "1.1"
) -> bytes:
    """A request's bytes; with a body, its Content-Length too."""
    lines = [f"{method} {path} HTTP/{version}", "Host: test", *fields]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def post(path: str, body: bytes, *fields: str, version: str = "1.1") -> bytes:
    return request(path, *fields, body=body, method="POST", version=version)


def chunked(path: str, *chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """A request with a chunked body."""
    content = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return request(path, "Transfer-Encoding: chunked", method="POST") + content + end


def _status(line: bytes) -> int:
    """The status of a reply; 0 for gunicorn's `None`, which an app gets that never set one."""
    code = line.split()[1]
    return int(code) if code.isdigit() else 0
