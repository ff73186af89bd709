"""What clients do, well-behaved and otherwise; each writes into the ledger what became of it.

All of them are coroutines of one loop, which runs in a thread of its own. A client chooses by a
random generator of its own, so that what it does depends on the seed and its number alone.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from chaos.ledger import Entry, Ledger
from chaos.network import Network

PATIENCE = 60.0
"""Seconds after which a client that waits says that nothing came, which fails the run."""

Client = Callable[["Visit"], Awaitable[None]]
_RESET = struct.pack("ii", 1, 0)
PIECE = 1 << 16


class EndError(Exception):
    """The connection has ended."""


class Connection:
    """Bytes to the server and back."""

    def __init__(self, address: Any, source: str | None, buffer: int) -> None:
        self._address = address
        self._loop = asyncio.get_running_loop()
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.sock.setblocking(False)
        if buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        if source is not None:
            self.sock.bind((source, 0))
        self._data = b""
        self.connected_at = 0.0
        self.idle_since = 0.0

    async def connect(self) -> None:
        """Raises OSError. A Unix socket whose backlog is full says so at once."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                await self._loop.sock_connect(self.sock, self._address)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.01)
        self.connected_at = time.monotonic()

    async def send(self, data: bytes) -> None:
        """Raises EndError."""
        try:
            await self._loop.sock_sendall(self.sock, data)
        except OSError as error:
            raise EndError(repr(error)) from None

    async def more(self) -> None:
        try:
            part = await self._loop.sock_recv(self.sock, PIECE)
        except OSError as error:
            raise EndError(repr(error)) from None
        if not part:
            raise EndError("end of stream")
        self._data += part

    async def until(self, end: bytes) -> bytes:
        while end not in self._data:
            await self.more()
        found, _, self._data = self._data.partition(end)
        return found

    async def exactly(self, size: int) -> bytes:
        while len(self._data) < size:
            await self.more()
        found, self._data = self._data[:size], self._data[size:]
        return found

    async def rest(self) -> bytes:
        """Everything until the end, however that comes."""
        try:
            while True:
                await self.more()
        except EndError:
            found, self._data = self._data, b""
            return found

    @property
    def has_begun(self) -> bool:
        return bool(self._data)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.sock.close()


class Visit:
    """One client: its connection, and its choices."""

    def __init__(self, crowd: Crowd, kind: str, number: int) -> None:
        self.crowd = crowd
        self.kind = kind
        self.random = random.Random(f"{crowd.seed} {number}")
        self.connection: Connection | None = None

    def open(self, action: str = "", argument: str = "", *traits: str, sent: bytes = b"") -> Entry:
        if not action:
            action, argument = self.pick()
        entry = self.crowd.ledger.open(
            self.kind, action, argument, sent=sent, traits=frozenset(traits)
        )
        if self.connection is not None:
            entry.connected_at = self.connection.connected_at
            entry.idle_since = self.connection.idle_since
        return entry

    def pick(self) -> tuple[str, str]:
        """Something for the app to do that is over soon."""
        action = self.random.choices(
            ["nap", "burn", "large", "stream", "child", "orphan", "command", "fail", "late"],
            [60, 8, 6, 4, 1, 1, 1, 2, 2],
        )[0]
        argument = {
            "nap": str(self.random.choice((0, 0, 5, 20, 60, 150))),
            "burn": str(self.random.randint(1, 10)),
            "large": str(self.random.choice((4, 70, 900))),
            "stream": str(self.random.choice((4, 200, 900))),
            "late": "100",
        }.get(action, "0")
        return action, argument

    async def connect(
        self, entry: Entry | None = None, source: str | None = None, buffer: int = 0
    ) -> Connection | None:
        """None, and the entry has ended, if there is no connection to be had."""
        addresses = self.crowd.addresses
        address = addresses[0] if source else self.random.choice(addresses)
        self.connection = Connection(address, source, buffer)
        if entry is not None:
            entry.connected_at = time.monotonic()
            entry.tell(f"connects to {address}")
        try:
            await self.connection.connect()
        except OSError as error:
            if entry is not None:
                entry.end("refused", repr(error))
            return None
        return self.connection

    def head(self, entry: Entry, *fields: str) -> bytes:
        lines = [f"{'POST' if entry.sent else 'GET'} {entry.path} HTTP/1.1", "Host: chaos", *fields]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def send(
        self, entry: Entry, *parts: bytes, pause: float = 0.0, to_end: bool = True
    ) -> bool:
        """Send a request, or its beginning; whether that was possible. An answer may be there."""
        assert self.connection is not None
        entry.began_at = entry.began_at or time.monotonic()
        entry.tell(f"sends {sum(map(len, parts))} bytes")
        try:
            for part in parts:
                entry.note_pause()
                await self.connection.send(part)
                entry.last_sent_at = time.monotonic()
                if pause:
                    await asyncio.sleep(pause)
        except EndError as error:
            entry.tell(f"cannot send: {error}")
            return False
        if to_end:
            entry.sent_at = time.monotonic()
        return True

    async def reply(self, entry: Entry, closes: bool = True) -> bool:
        """Read the answer; whether the connection goes on."""
        try:
            return await asyncio.wait_for(self._reply(entry, closes), PATIENCE)
        except asyncio.TimeoutError:
            entry.end("silence")
            return False

    async def _reply(self, entry: Entry, closes: bool) -> bool:
        assert self.connection is not None
        connection, head = self.connection, b""
        try:
            head = await connection.until(b"\r\n\r\n")
            while head.split()[1].startswith(b"1"):
                head = await connection.until(b"\r\n\r\n")
            entry.status = int(head.split()[1])
            fields = _fields(head)
            goes_on = await self._body(entry, fields)
        except EndError as error:
            entry.end("cut" if head or connection.has_begun else "closed", str(error))
            return False
        except (ValueError, IndexError) as error:
            entry.end("garbled", repr(error))
            return False
        entry.end("answered", _version(fields))
        if closes or not goes_on:
            entry.beyond = await connection.rest()
            return False
        connection.idle_since = time.monotonic()
        return True

    async def _body(self, entry: Entry, fields: dict[str, str]) -> bool:
        assert self.connection is not None
        if "content-length" in fields:
            entry.body = await self.connection.exactly(int(fields["content-length"]))
        elif fields.get("transfer-encoding") == "chunked":
            while size := int(await self.connection.until(b"\r\n"), 16):
                entry.body += (await self.connection.exactly(size + 2))[:-2]
            await self.connection.exactly(2)
        else:
            entry.body = await self.connection.rest()
            return False
        return fields.get("connection", "").lower() != "close"

    def close(self) -> None:
        if self.connection is not None:
            self.connection.sock.close()


CLOSE = "Connection: close"


async def plain(visit: Visit, action: str = "", argument: str = "") -> None:
    """A request on a connection of its own."""
    entry = visit.open(action, argument)
    if await visit.connect(entry):
        await visit.send(entry, visit.head(entry, CLOSE))
        await visit.reply(entry)


async def kept(visit: Visit, action: str = "", argument: str = "") -> None:
    """Requests one after another on one connection, with pauses; the first of them this one."""
    for n in range(visit.random.randint(2, 6)):
        entry = visit.open() if n else visit.open(action, argument)
        if n == 0 and not await visit.connect(entry):
            return
        await visit.send(entry, visit.head(entry))
        if not await visit.reply(entry, closes=False):
            return
        await asyncio.sleep(visit.random.choice((0, 0, 0.05, 0.5, 1.0, 2.5)))


async def posting(visit: Visit) -> None:
    """A body of a known length; some go beyond request_buffer."""
    body = visit.random.randbytes(visit.random.choice((1, 500, 20_000, 90_000, 400_000)))
    entry = visit.open(sent=body)
    if await visit.connect(entry):
        await visit.send(entry, visit.head(entry, CLOSE, f"Content-Length: {len(body)}"), body)
        await visit.reply(entry)


async def chunky(visit: Visit) -> None:
    """A chunked body."""
    body = visit.random.randbytes(visit.random.choice((1, 5_000, 90_000)))
    entry = visit.open(sent=body)
    if await visit.connect(entry):
        chunks = [body[at : at + 4000] for at in range(0, len(body), 4000)]
        sent = [b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks]
        head = visit.head(entry, CLOSE, "Transfer-Encoding: chunked")
        await visit.send(entry, head, *sent, b"0\r\n\r\n")
        await visit.reply(entry)


async def expecting(visit: Visit) -> None:
    """Wait a little for 100 Continue."""
    body = visit.random.randbytes(3000)
    entry = visit.open(sent=body)
    if await visit.connect(entry):
        fields = (CLOSE, f"Content-Length: {len(body)}", "Expect: 100-continue")
        if await visit.send(entry, visit.head(entry, *fields), to_end=False):
            await asyncio.sleep(visit.random.random() * 0.2)
            await visit.send(entry, body)
        await visit.reply(entry)


async def dribbling(visit: Visit) -> None:
    """A head in pieces, but in time."""
    entry = visit.open()
    if await visit.connect(entry):
        head = visit.head(entry, CLOSE)
        await visit.send(entry, *_pieces(head, 5), pause=visit.random.random() * 0.2)
        await visit.reply(entry)


async def stalling_head(visit: Visit) -> None:
    """A head that never ends."""
    entry = visit.open("", "", "slow head")
    if await visit.connect(entry):
        head = visit.head(entry, CLOSE)
        await visit.send(entry, head[: visit.random.randint(1, len(head) - 3)], to_end=False)
        await visit.reply(entry)


async def pausing_body(visit: Visit) -> None:
    """A body with a long pause, but in time."""
    body = visit.random.randbytes(visit.random.choice((2000, 150_000)))
    entry = visit.open(sent=body)
    if await visit.connect(entry):
        head = visit.head(entry, CLOSE, f"Content-Length: {len(body)}")
        half = len(body) // 2
        await visit.send(entry, head + body[:half], to_end=False)
        await asyncio.sleep(visit.random.random() * 1.5)
        await visit.send(entry, body[half:])
        await visit.reply(entry)


async def stalling_body(visit: Visit) -> None:
    """Half a body, and no more. With one above request_buffer the app waits for the rest."""
    body = visit.random.randbytes(visit.random.choice((2000, 2000, 2000, 150_000)))
    entry = visit.open("", "", "slow body", sent=body)
    if await visit.connect(entry):
        head = visit.head(entry, CLOSE, f"Content-Length: {len(body)}")
        await visit.send(entry, head + body[: len(body) // 2], to_end=False)
        await visit.reply(entry)


async def silent(visit: Visit) -> None:
    """Nothing at all."""
    entry = visit.open("", "", "silent")
    if await visit.connect(entry):
        await visit.reply(entry)


async def slow_reader(visit: Visit) -> None:
    """A large answer, taken slowly, but taken."""
    entry = visit.open(visit.random.choice(("large", "stream")), "3000")
    connection = await visit.connect(entry, buffer=1 << 16)
    if connection:
        await visit.send(entry, visit.head(entry, CLOSE))
        more = connection.more

        async def slowly() -> None:
            await asyncio.sleep(0.01)
            await more()

        connection.more = slowly  # type: ignore[method-assign]
        await visit.reply(entry)


async def never_reader(visit: Visit) -> None:
    """A large answer of which nothing is taken for longer than send_timeout; then what is there.

    Some of them hold a slot for so long: those beyond response_buffer, and those streamed.
    """
    choices = [("large", "900")] * 4 + [("large", "5000"), ("stream", "5000")]
    entry = visit.open(*visit.random.choice(choices), "takes nothing")
    if await visit.connect(entry, buffer=1 << 14):
        await visit.send(entry, visit.head(entry, CLOSE))
        await asyncio.sleep(3 * visit.crowd.ledger.times.send)
        await visit.reply(entry)


async def leaving(visit: Visit) -> None:
    """Leave before the answer, politely or not; some in the middle of the request."""
    body = visit.random.randbytes(visit.random.choice((0, 2000, 150_000)))
    entry = visit.open("", "", "leaves", sent=body)
    connection = await visit.connect(entry)
    if connection:
        sent = visit.head(entry, CLOSE, f"Content-Length: {len(body)}") + body
        await visit.send(entry, sent[: visit.random.choice((20, len(sent), len(sent) - 1))])
        await asyncio.sleep(visit.random.choice((0, 0.01, 0.2, 1.0)))
        entry.end("left")
        if visit.random.random() < 0.5:
            connection.reset()


async def lingering(visit: Visit) -> None:
    """Read the answer, and keep the connection for a while; it is not closed by this client."""
    entry = visit.open()
    if await visit.connect(entry):
        await visit.send(entry, visit.head(entry))
        if await visit.reply(entry, closes=False):
            await asyncio.sleep(3 * visit.crowd.ledger.times.keepalive)


async def half_closing(visit: Visit) -> None:
    """Say that no more will come, which looks as if the client left."""
    entry = visit.open("", "", "half-closed")
    connection = await visit.connect(entry)
    if connection and await visit.send(entry, visit.head(entry, CLOSE)):
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            entry.tell(repr(error))
        await visit.reply(entry)


async def impatient(visit: Visit) -> None:
    entry = visit.open("", "", "impatient")
    if await visit.connect(entry):
        patience = visit.random.choice((0, 0.05, 0.5))
        await visit.send(entry, visit.head(entry, CLOSE, f"X-Queue-Timeout: {patience}"))
        await visit.reply(entry)


async def large_head(visit: Visit) -> None:
    entry = visit.open("", "", "large head")
    if await visit.connect(entry):
        fields = [f"X-{n}: {'x' * 8000}" for n in range(120)]
        await visit.send(entry, visit.head(entry, CLOSE, *fields))
        await visit.reply(entry)


async def malformed(visit: Visit) -> None:
    entry = visit.open("", "", "malformed")
    if await visit.connect(entry):
        await visit.send(entry, visit.head(entry, CLOSE, "A b: no field has a name like this"))
        await visit.reply(entry)


async def exempt(visit: Visit) -> None:
    entry = visit.open("nap", "5")
    if await visit.connect(entry):
        await visit.send(entry, visit.head(entry, CLOSE))
        await visit.reply(entry)


async def probe(visit: Visit) -> None:
    entry = visit.open("nap", "0")
    if await visit.connect(entry):
        name = visit.random.choice(("readyz", "healthz"))
        await visit.send(entry, f"GET /-/{name} HTTP/1.1\r\nHost: c\r\n{CLOSE}\r\n\r\n".encode())
        await visit.reply(entry)


async def severed(visit: Visit) -> None:
    """The network is cut at some moment, for some time or for ever."""
    network = visit.crowd.network
    source = await network.address()
    body = visit.random.randbytes(visit.random.choice((0, 2000, 150_000)))
    entry = visit.open("", "", "severed", sent=body)
    if visit.random.random() < 0.3:
        entry.action, entry.argument = "large", "3000"
    try:
        if await visit.connect(entry, source=source):
            cut = asyncio.create_task(_cut(visit, entry, source))
            sent = visit.head(entry, CLOSE, f"Content-Length: {len(body)}") + body
            half = visit.random.choice((0, len(sent) // 2))
            await visit.send(entry, sent[:half], to_end=False)
            await asyncio.sleep(visit.random.random() * 0.1)
            await visit.send(entry, sent[half:])
            try:
                await asyncio.wait_for(visit.reply(entry), 8.0)
            except asyncio.TimeoutError:
                entry.end("severed")
            await cut
            if (entry.outcome, entry.status) != ("answered", 200):
                entry.outcome = "severed"
    finally:
        await network.release(source)


async def _cut(visit: Visit, entry: Entry, source: str) -> None:
    await asyncio.sleep(visit.random.random() * 0.15)
    entry.tell("the network is cut")
    await visit.crowd.network.cut(source)
    await asyncio.sleep(visit.random.choice((0.3, 1.5, 7.0)))
    entry.tell("the network is back")
    await visit.crowd.network.heal(source)


MIX: dict[Client, int] = {
    plain: 40,
    kept: 20,
    posting: 10,
    chunky: 4,
    expecting: 2,
    dribbling: 3,
    stalling_head: 2,
    pausing_body: 3,
    stalling_body: 1,
    silent: 2,
    slow_reader: 1,
    never_reader: 1,
    leaving: 6,
    lingering: 2,
    half_closing: 3,
    impatient: 3,
    large_head: 1,
    malformed: 2,
    exempt: 3,
    probe: 4,
    severed: 3,
}
"""How often each kind comes."""


class Crowd:
    """All clients of a run."""

    def __init__(
        self, ledger: Ledger, addresses: list[Any], network: Network, seed: int, rate: float
    ) -> None:
        self.ledger = ledger
        self.addresses = addresses
        self.network = network
        self.seed = seed
        self._rate = rate
        self._random = random.Random(f"{seed} crowd")
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._comes = False
        self._coming: Future[None] | None = None
        self.errors: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="crowd", daemon=True)
        self._thread.start()
        self._closing = threading.Event()
        self._lags = asyncio.run_coroutine_threadsafe(self._see_lags(), self._loop)

    # Called by the thread that owns the crowd.

    def come(self) -> None:
        """From now on clients come, one after the other, until `pause`."""
        self._comes = True
        self._coming = asyncio.run_coroutine_threadsafe(self._go_on(), self._loop)

    def send(self, client: Client, count: int = 1, *arguments: str) -> None:
        """So many clients of a kind, at once."""
        self._loop.call_soon_threadsafe(self._start, client, count, arguments)

    def pause(self) -> None:
        """No more clients come; wait until those that are there have gone."""
        self._comes = False
        if self._coming is not None:
            self._coming.result(PATIENCE)
        asyncio.run_coroutine_threadsafe(self._all_gone(), self._loop).result(3 * PATIENCE)

    def close(self) -> None:
        self._closing.set()
        self._lags.result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # In the loop.

    def _start(self, client: Client, count: int, arguments: tuple[str, ...] = ()) -> None:
        for _ in range(count):
            self._count += 1
            visit = Visit(self, client.__name__, self._count)
            task = asyncio.get_running_loop().create_task(self._visit(visit, client, arguments))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _visit(self, visit: Visit, client: Any, arguments: tuple[str, ...]) -> None:
        try:
            await client(visit, *arguments)
        except Exception as error:
            self.errors.append(f"{visit.kind}: {error!r}")
        finally:
            visit.close()

    async def _see_lags(self) -> None:
        """Note when this loop had no CPU: then clients have seen and done everything too late."""
        while not self._closing.is_set():
            before = time.monotonic()
            await asyncio.sleep(0.05)
            late = time.monotonic() - before - 0.05
            if late > 0.1:
                self.ledger.lags.append((time.monotonic(), late))

    async def _go_on(self) -> None:
        mix = {c: n for c, n in MIX.items() if c is not severed or self.network.can_cut}
        while self._comes:
            if len(self._tasks) < 400:
                self._start(self._random.choices(list(mix), list(mix.values()))[0], 1)
            await asyncio.sleep(self._random.expovariate(self._rate))

    async def _all_gone(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)


def _fields(head: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
    return {name.lower(): value.strip() for name, _, value in pairs}


def _version(fields: dict[str, str]) -> str:
    return f"by version {fields['x-version']}" if "x-version" in fields else ""


def _pieces(data: bytes, count: int) -> list[bytes]:
    size = len(data) // count + 1
    return [data[at : at + size] for at in range(0, len(data), size)]
