"""A slot's work on one request, of which the end is another's to tell."""

from __future__ import annotations

import errno
import socket
from functools import partial
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.workers.base import Worker
from server import Pending
from test_clients import REQUEST
from test_overdue import Nobody, job

from replica_plugin.cells import Cells
from replica_plugin.channel import End, Report
from replica_plugin.client_socket import ClientSocket
from replica_plugin.errors import OverdueError
from replica_plugin.exchange import Exchange
from replica_plugin.overdue import Run
from replica_plugin.rest import Rest
from replica_plugin.settled import Settled


class Process:
    """A process with one app."""

    handle_error = Worker.handle_error

    def __init__(self, app: Any) -> None:
        self.cfg = Settled(Config())
        self.log = Quiet()
        self.wsgi = app

    def count_request(self) -> None:
        pass


class Quiet:
    """A log, which notes what access it would have, and which exceptions."""

    def __init__(self) -> None:
        self.accesses: list[str] = []
        self.exceptions: list[str] = []

    def access(self, response: Any, *more: Any) -> None:
        self.accesses.append(response.status)

    def exception(self, text: str, *arguments: Any) -> None:
        self.exceptions.append(text % arguments)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: None


def answers(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


def fails(environ: Any, start_response: Any) -> list[bytes]:
    raise RuntimeError


def failing(*parts: Any) -> Rest:
    raise OSError(errno.EMFILE, "Too many open files")


def serve(app: Any, run: Run) -> tuple[Report, bytes]:
    """The report, and what the client has read."""
    client, ours = socket.socketpair()
    client.sendall(REQUEST)
    sock = ClientSocket(
        ours.family, ours.type, ours.detach(), run.may_write, lambda: None, lambda: 0
    )
    run.client = sock
    with client, sock:
        process = Process(app)
        report = Exchange(process, job(), sock, run).run()
        if report.end == End.UNTAKEN:
            assert "200 OK" not in process.log.accesses, "the dispatcher's answer is in the log"
        sock.shutdown(socket.SHUT_WR)
        return report, client.recv(1 << 16)


@pytest.mark.parametrize("app", [answers, fails])
def test_a_slot_that_may_not_begin_its_response_any_more_says_that_it_has_not(app):
    """Else nobody would answer: by its cell the dispatcher takes it for one that has begun.

    1. dispatcher: silence
    2. slot: marks its cell, and sees that
    3. dispatcher: sees the mark
    """
    cells = Cells(1)
    cells.begin(0, 7)
    cells.silence()
    report, read = serve(app, Run(job(), None, partial(cells.answering, 0), Nobody()))
    assert cells.begun() == {7: True}
    assert (report.end, read) == (End.UNTAKEN, b"")


def test_one_that_is_silenced_and_then_interrupted_says_that_it_has_not():
    cells = Cells(1)
    cells.begin(0, 7)
    cells.silence()
    run = Run(job(), None, partial(cells.answering, 0), Nobody())

    def late(environ: Any, start_response: Any) -> Any:
        run.answer()
        raise OverdueError

    report, read = serve(late, run)
    assert (report.end, read) == (End.UNTAKEN, b"")


class Slow(ClientSocket):
    """That of a client which takes nothing of the last part."""

    def _send_or_leave(self, data: bytes, flags: int = 0) -> None:
        self.left.append(memoryview(data))


class Left:
    """The channel of its slot."""

    def __init__(self) -> None:
        self.told: list[Report] = []

    def leave(self, report: Report, rest: Rest) -> bool:
        self.told.append(report)
        rest.close()
        return True


def serve_slowly(app: Any, head: bytes) -> tuple[list[Report], Report]:
    """What was left to the dispatcher, and the report."""
    client, ours = socket.socketpair()
    client.sendall(head)
    channel = Left()
    run = Run(job(), channel, lambda: True, Nobody())
    sock = Slow(ours.family, ours.type, ours.detach(), run.may_write, lambda: None, lambda: 0)
    run.client = sock
    with client, sock:
        return channel.told, Exchange(Process(app), job(), sock, run).run()


def test_a_body_that_has_ended_is_not_asked_again():
    """It may wait for ever then, for what somebody else would have to put there."""
    asked = []

    class Body:
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> bytes:
            asked.append(len(asked))
            if len(asked) > 1:
                raise StopIteration
            return b"x"

    def app(environ: Any, start_response: Any) -> Body:
        start_response("200 OK", [])
        return Body()

    serve_slowly(app, REQUEST)
    assert asked == [0, 1]


def test_an_app_that_asks_for_its_request_when_it_was_thrown_away_is_told_so():
    """Its response was complete, and its client slow; an empty body would be a lie."""
    read = []

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Length", "1")])
        yield b"x"
        try:
            read.append(environ["wsgi.input"].read())
        except OSError as error:
            read.append(str(error))

    told, _ = serve_slowly(app, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\ndata")
    assert [each.end for each in told] == [End.KEEP]
    assert read == ["The rest of the request's body went with its response"]


def test_what_a_slot_must_send_itself_does_not_change_how_the_connection_goes_on(monkeypatch):
    """Of the request's body a part has not come; to ask for it twice would say that it is late."""
    monkeypatch.setattr(Rest, "of", failing)
    size = 4 << 20  # more than the kernel takes

    def large(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Length", str(size))])
        return [b"x" * size]

    client, ours = socket.socketpair()
    client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf")
    run = Run(job(), None, lambda: True, Nobody())
    sock = ClientSocket(
        ours.family, ours.type, ours.detach(), run.may_write, lambda: None, lambda: 2 * size
    )
    run.client = sock
    reading = Pending(lambda: sum(len(part) for part in iter(partial(client.recv, 1 << 20), b"")))
    with client, sock:
        report = Exchange(Process(large), job(), sock, run).run()
        sock.shutdown(socket.SHUT_WR)
        assert report.end == End.LINGER
        assert reading.result() > size


class Interrupted(ClientSocket):
    """A write that waits for its client is interrupted."""

    def _send_some(self, data: memoryview, flags: int) -> int:
        raise OverdueError


@pytest.mark.parametrize(
    ("error", "logged"), [(RuntimeError, ["Error handling request /"]), (OverdueError, [])]
)
def test_what_an_app_raises_after_an_interrupted_write_is_no_error_of_the_socket_s(error, logged):
    class Body:
        def __iter__(self) -> Any:
            return iter([b"x" * (4 << 20)])

        def close(self) -> None:
            raise error

    def app(environ: Any, start_response: Any) -> Body:
        start_response("200 OK", [])
        return Body()

    client, ours = socket.socketpair()
    client.sendall(REQUEST)
    run = Run(job(), None, lambda: True, Nobody())
    sock = Interrupted(
        ours.family, ours.type, ours.detach(), run.may_write, lambda: None, lambda: 0
    )
    run.client = sock
    process = Process(app)
    with client, sock:
        assert Exchange(process, job(), sock, run).run().end == End.ABORT
    assert process.log.exceptions == logged


@pytest.mark.parametrize("app", [answers, fails])
def test_a_slot_whose_request_the_attendant_has_answered_says_so(app):
    run = Run(job(), None, lambda: True, Nobody())

    def late(environ: Any, start_response: Any) -> Any:
        run.answer()
        return app(environ, start_response)

    report, read = serve(late, run)
    assert report.end == End.LINGER
    assert read.startswith(b"HTTP/1.1 504 ") and read.count(b"HTTP/1.1 ") == 1
