"""One request and its response, in the hands of a slot.

    read (gunicorn's parser) -> call the app -> write, close the body -> how it ended

What the client has not taken when the response is complete goes to the dispatcher at once, with the
connection: what the app does after its last part, and when its body is closed, does not delay it.

It is gunicorn's own worker loop for one request: the same parser, environ, response, hooks
and access log, and the same answers to what goes wrong. What it adds is the way it ends: a
report says how the connection goes on.
"""

from __future__ import annotations

import errno
import io
import json
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Protocol

from gunicorn import http, util
from gunicorn.http import wsgi
from gunicorn.http.errors import NoMoreData

from .channel import LARGEST, End, Job, Kind, Report
from .client_socket import AnsweredError, ClientSocket, ReceiveTimeoutError, SendTimeoutError
from .environ import WAITED
from .errors import OverdueError
from .overdue import Run
from .permit import is_on_disk
from .settled import Request, get_parser

DRAIN = 1 << 16  # bytes of a body the app left unread that are read to keep the connection
_CLIENT_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN)


class Worker(Protocol):
    """What an exchange asks of the process it is in; a gunicorn worker. `cfg` is settled."""

    cfg: Any
    log: Any
    wsgi: Any

    def count_request(self) -> None: ...
    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None: ...


class Exchange:
    """One request and its response."""

    _took: timedelta | None = None  # until the body was sent
    _whole = False  # the response is complete; what is left of it goes out in any case
    _given = False  # the connection is the dispatcher's again
    _end: int | None = None  # how it goes on, where that was found out before the app's end
    _input: _Input | None = None  # the request's body, if it has one
    _body: Any = None  # the response's
    _parts: Any = ()

    def __init__(self, worker: Worker, job: Job, sock: ClientSocket, run: Run) -> None:
        self._worker = worker
        self._cfg = worker.cfg
        self._log = worker.log
        self._job = job
        self._sock = sock
        self._run = run
        self._parser = get_parser(worker.cfg, sock, job.client)
        self._parser.req_count = job.number - 1
        if self._parser.mesg_class is http.Request:
            self._parser.mesg_class = Request
        self._request: Any = None
        self._carry = job.carry
        if job.ahead:
            self._parser.unreader.unread(job.ahead)

    def run(self) -> Report:
        """Serve it. Everything that can go wrong is dealt with here, and says how it ended."""
        end = self._work()
        if self._sock.left and end != End.ABORT:
            end = self._end_with_rest(end)
        return self._report(end)

    def _work(self) -> int:
        """How the connection goes on."""
        try:
            self._request = self._run.asked = next(self._parser)
            self._know_proxy()
            self._know_input()
            response = self._respond()
            return self._end_of(response)
        except BaseException as error:  # CancelledError and the like are none of the slot's
            if self._has_left(error):
                self._log.debug("Closing connection: the client left. %s", error)
                return End.ABORT
            return End.ABORT if self._given else self._on_error(error)

    def _has_left(self, error: BaseException) -> bool:
        """Whether the parser found the stream at its end; an app may raise StopIteration, too."""
        return isinstance(error, NoMoreData) or (
            isinstance(error, StopIteration) and self._request is None
        )

    def _report(self, end: int) -> Report:
        ahead = self._parser.unreader.buf.getvalue() if end == End.KEEP else b""
        if len(ahead) + len(self._carry) > LARGEST // 2:
            ahead, end = b"", End.LINGER
        return Report(Kind.DONE, self._job.request, end, ahead, self._carry)

    def _know_proxy(self) -> None:
        """The PROXY line comes once a connection; later requests are from the same client."""
        info = self._request.proxy_protocol_info
        if info:
            self._carry = json.dumps(info).encode()
        elif self._carry:  # another process has written it: no marshal, which can crash this one
            self._request.proxy_protocol_info = json.loads(self._carry)

    def _know_input(self) -> None:
        body = self._request.body
        if getattr(body.reader, "length", None) != 0:  # most requests have none
            body.reader = self._input = _Input(body.reader)

    # The app.

    def _respond(self) -> Any:
        """Call the app and write what it answers, as gunicorn's own workers do."""
        request, sock, cfg = self._request, self._sock, self._cfg
        environ: dict[str, Any] = {}
        response = None
        try:
            cfg.pre_request(self._worker, request)
            began = datetime.now()
            response, environ = wsgi.create(request, sock, self._job.client, self._job.server, cfg)
            environ["wsgi.multithread"] = cfg.threads > 1
            environ[WAITED] = self._job.waited
            self._worker.count_request()
            if self._job.last or not cfg.keepalive:
                response.force_close()
            self._call_app(environ, response, began)
            return response
        except OverdueError:
            if self._whole:  # what was interrupted is not the client's concern
                return response
            raise
        except BaseException:
            if response is not None and response.headers_sent and sock.trouble is None:
                sock.flush()
                self._log.exception("Error handling request %s", request.uri)
                raise _CutShortError from None
            raise
        finally:
            self._after(environ, response)

    def _call_app(self, environ: dict[str, Any], response: Any, began: datetime) -> None:
        """Only the app's own code is interrupted: an exception in a logger may leave it locked."""
        try:
            try:
                self._run.window(partial(self._run_app, environ, response, began))
            finally:
                if self._whole and self._sock.left:
                    self._go_on_without_client(response)
        finally:
            took = self._took
            answered = self._run.is_answered or isinstance(self._sock.trouble, AnsweredError)
            if took is not None and not answered:  # else that answer is in the log
                if self._sock.trouble is not None and self._is_too_late:
                    response.status = "408 Request Timeout"
                self._log.access(response, self._request, environ, took)

    def _run_app(self, environ: dict[str, Any], response: Any, began: datetime) -> None:
        sock = self._sock
        body = self._body = self._worker.wsgi(environ, response.start_response)
        if type(body) in (list, tuple):
            sock.finish()
        try:
            if isinstance(body, environ["wsgi.file_wrapper"]):
                if isinstance(body.filelike, io.BytesIO) or is_on_disk(body.filelike):
                    sock.finish()  # else more may come, as of a pipe
                response.write_file(body)
            else:
                self._parts = iter(body)
                for part in self._parts:
                    complete = _completes(part, response)
                    if complete:
                        sock.finish()
                    response.write(part)
                    sock.flush()  # nothing, unless the part was empty
                    if complete and sock.left:
                        break
                else:
                    self._parts = ()  # to ask again what has ended may wait for ever
            sock.finish()
            response.close()
            sock.flush()
            self._whole = True
        finally:
            self._took = datetime.now() - began
            if not (self._whole and sock.left):
                self._close()

    def _close(self) -> None:
        if hasattr(self._body, "close"):
            self._body.close()

    def _go_on_without_client(self, response: Any) -> None:
        """Leave the rest to the dispatcher, and then only let the app do what it still has to."""
        end = self._end = self._end_of(response)
        try:
            self._leave_rest(end)
        finally:
            self._run.window(self._end_app)

    def _end_app(self) -> None:
        try:
            for _ in self._parts:
                pass
        finally:
            self._close()

    def _after(self, environ: dict[str, Any], response: Any) -> None:
        try:
            self._cfg.post_request(self._worker, self._request, environ, response)
        except BaseException:
            self._log.exception("Exception in post_request hook")

    # The end.

    def _leave_rest(self, end: int) -> None:
        """Give the connection back, with what is left of the response; or send that, if nobody
        takes it. Raises OSError.

        The app has no descriptor then by which it could read the next request as this one's body.
        """
        rest = self._sock.rest()
        report = self._report(end)._replace(kind=Kind.REST)
        self._given = rest is not None and self._run.channel.leave(report, rest)
        if self._given:
            self._sock.discard()
            self._sock.close()
            self._sock.trouble = None  # what comes now is the app's
        else:
            self._sock.send_left()

    def _end_with_rest(self, end: int) -> int:
        try:
            self._leave_rest(end)
        except BaseException:  # a timeout that the request has left behind, say
            return End.ABORT
        return End.ABORT if self._given else end

    def _end_of(self, response: Any) -> int:
        """How the connection goes on after a whole response."""
        if self._given:
            return End.ABORT
        if self._end is not None:
            return self._end
        if self._sock.trouble is not None:
            return End.ABORT
        drained = self._drained()
        if not response.should_close():
            return End.KEEP if drained else End.LINGER
        return End.CLOSE if drained and self._request.should_close() else End.LINGER

    def _drained(self) -> bool:
        """Whether the rest of the body, which the app did not read, has been thrown away."""
        body, left = self._request.body, DRAIN
        if self._input is None:
            return True
        self._sock.read_only_what_is_there()
        ended = False
        with suppress(Exception):  # malformed, or not there yet: where it ends is unknown
            while left > 0 and not ended:
                part = body.read(min(left, 8192))
                left -= len(part)
                ended = not part
        self._input.is_lost = left < DRAIN or not ended
        return ended and not self._input.broken_off

    def _on_error(self, error: BaseException) -> int:
        """Say what went wrong to the client, if it can still be told, and to the log."""
        trouble = self._sock.trouble
        if self._is_too_late:
            return self._too_late()
        if isinstance(trouble, SendTimeoutError):
            self._log.warning("A client took nothing for send_timeout: cut off")
            return End.ABORT
        if trouble is not None:
            if isinstance(trouble, AnsweredError):
                return self._answered()
            if isinstance(error, OverdueError):
                return End.ABORT
            if trouble.errno not in _CLIENT_GONE:
                self._log.exception("Socket error processing request.")
            return End.ABORT
        if isinstance(error, OverdueError):
            return self._overdue()
        if isinstance(error, _CutShortError):
            return End.LINGER
        if self._sock.answering:
            self._log.exception("Error after the response to %s", self._request.uri)
            return End.LINGER
        self._worker.handle_error(self._request, self._sock, self._job.client, error)
        return self._told()

    @property
    def _is_too_late(self) -> bool:
        """Whether the body stopped before the response began, whatever the app made of that."""
        return isinstance(self._sock.trouble, ReceiveTimeoutError) and not self._sock.written

    def _too_late(self) -> int:
        self._sock.discard()  # what an app says that has caught it
        self._sock.trouble = None
        mesg = "Nothing of the request's body came for receive_timeout."
        self._log.warning("408: %s", mesg)
        util.write_error(self._sock, 408, "Request Timeout", mesg)
        return self._told()

    def _overdue(self) -> int:
        """The attendant has answered, unless the slot has begun its response, or was about to."""
        self._sock.discard()
        if self._sock.written:
            return End.LINGER
        if self._run.is_answered:
            return self._answered()
        util.write_error(self._sock, 504, "Gateway Timeout", str(OverdueError()))
        return self._told()

    def _told(self) -> int:
        """Send the error that gunicorn has written."""
        self._sock.finish()
        try:
            self._sock.flush()
        except AnsweredError:
            return self._answered()
        except OSError:
            return End.ABORT
        return End.LINGER

    def _answered(self) -> int:
        """The attendant has answered; or a stop has taken that from us, and nobody has yet."""
        return End.LINGER if self._run.was_answered else End.UNTAKEN


def _completes(part: Any, response: Any) -> bool:
    """Whether the client has all of its answer with this part of the body."""
    length = response.response_length
    if length is not None and isinstance(part, bytes) and response.sent + len(part) >= length:
        return True
    status = getattr(response, "status_code", None)  # an app may have given none
    return response.req.method == "HEAD" or status in (204, 304)  # the head is all


class _Input:
    """What gunicorn reads a body with, and whether a read was ever broken off.

    Then nobody knows where the request ends: what was raised there, by a timeout of the app's, say,
    has ended the generator that follows the chunks, which looks as if the last one had come.

    What has been thrown away at the end of the response is lost to an app that asks for it later.
    """

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.broken_off = False
        self.is_lost = False

    def read(self, size: int) -> bytes:
        if self.is_lost:
            raise OSError("The rest of the request's body went with its response")
        try:
            data: bytes = self._reader.read(size)
        except BaseException:
            self.broken_off = True
            raise
        return data


class _CutShortError(Exception):
    """The app failed after the first byte: the client must see that something is missing."""
