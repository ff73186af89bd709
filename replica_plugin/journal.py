"""What dispatcher and supervisor write to the logs: gunicorn's own, from its own settings.

Requests that no slot ran appear in the access log like any other; in the error log they
are one line at once, and then one a while for all that followed.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from logging import FileHandler
from typing import Any, NamedTuple

from gunicorn.config import Config
from gunicorn.glogging import Logger, loggers

from .answers import Answer
from .channel import Stall
from .connection import Connection

QUIET = 10.0
"""Seconds between two warnings about requests that were not run."""

SETTINGS = (
    "loglevel", "errorlog", "accesslog", "access_log_format", "capture_output",
    "logconfig", "logconfig_dict", "logconfig_json", "disable_redirect_access_to_syslog",
    "syslog", "syslog_addr", "syslog_prefix", "syslog_facility",
    "statsd_host", "statsd_prefix", "dogstatsd_tags", "proc_name", "default_proc_name",
    "user", "group",
)  # fmt: skip
"""gunicorn's settings that decide where and how is logged."""

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # no parser has refused them before us
_NOT_TEXT = ("logconfig", "logconfig_dict", "logconfig_json")


class _Response(NamedTuple):
    """As much of a response as gunicorn's access log asks for."""

    status: str
    sent: int
    headers: list[tuple[str, str]]


class _Request(NamedTuple):
    headers: list[tuple[str, str]]


class Journal:
    """The logs, as one process writes them."""

    def __init__(self, logging: Mapping[str, Any]) -> None:
        self.setup(logging)
        self._held: Counter[str] = Counter()
        self._quiet_until: float | None = None

    def setup(self, logging: Mapping[str, Any]) -> None:
        """Log as these settings say from now on."""
        self._logging = logging
        self._logger = _open(logging)

    def reopen(self) -> None:
        """Reopen the files, after they were moved away."""
        try:
            self._logger.reopen_files()
        except OSError as error:
            self._logger = _to_stderr(self._logging, error)

    @property
    def _counts(self) -> bool:
        """Whether the logger tells statsd, too, which is told of requests that are not logged."""
        return type(self._logger) is not Logger

    def info(self, message: str, *args: object) -> None:
        self._logger.info(message, *args)

    def warning(self, message: str, *args: object) -> None:
        self._logger.warning(message, *args)

    def error(self, message: str, *args: object) -> None:
        self._logger.error(message, *args)

    def exception(self, message: str, *args: object) -> None:
        self._logger.exception(message, *args)

    # Requests that no slot ran.

    def answered(self, conn: Connection, answer: Answer, now: float) -> None:
        """A request was answered without a slot, or in place of a slot that died."""
        self._access(conn, answer, max(0.0, now - conn.ready_at) if conn.ready_at else 0.0)
        self._warn(f"{answer.status}: {answer.rule or answer.text}", now)

    def spared(self, bound: int, now: float) -> None:
        """A request was let in that a bound in earnest would have refused."""
        self._warn(f"Dry run: beyond max_replica_concurrency ({bound}), and admitted", now)

    def shortage(self, now: float) -> None:
        """No more connections can be accepted for now."""
        self._warn(
            "Out of descriptors or memory: connections wait in the backlog (see ulimit -Hn)", now
        )

    def rest_lost(self, now: float) -> None:
        """There was no descriptor left for what a slot has left of a response."""
        self._warn("Out of descriptors: a response was cut short (see ulimit -Hn)", now)

    def untaken(self, pid: int, now: float) -> None:
        """A process had no descriptor left for a client."""
        self._warn(
            f"Out of descriptors: process {pid} could not take a request (see ulimit -n)", now
        )

    def undeliverable(self, error: OSError, now: float) -> None:
        """The kernel takes no message to a process for now, though it has room for it."""
        self._warn(
            f"Requests wait, since none can be handed to a process: {error.strerror} (memory is "
            "short, or all programs of this user have more descriptors under way than ulimit -n)",
            now,
        )

    def cut_off(self, now: float) -> None:
        """A client has taken nothing of its response for too long."""
        self._warn("A client took nothing for send_timeout: cut off", now)

    def _warn(self, text: str, now: float) -> None:
        """Say it at once, or, if something was said a moment ago, in a while with a count."""
        if self._quiet_until is None:
            self._logger.warning("%s", text)
            self._quiet_until = now + QUIET
        else:
            self._held[text] += 1

    def stalled(self, pid: int, conn: Connection | None, stall: Stall) -> None:
        """A process in gevent mode has told what keeps its hub."""
        what = "code outside of requests"
        if conn is not None and conn.head is not None:
            what = f"{conn.head.method.decode('latin-1')} {conn.head.path.decode('latin-1')}"
        self._logger.warning(
            "The hub of process %d does not turn, so it is sent nothing: %s keeps it, with %.0f %% "
            "of a CPU, in %s. In gevent mode a request that computes or blocks stops all of its "
            "process: use mode: thread, or fewer threads_per_process and more processes.",
            pid, what, stall.share * 100, stall.place,
        )  # fmt: skip

    def overdue(self, conn: Connection | None, pid: int, stack: str) -> None:
        """A process says that a request has reached request_timeout, and where it is."""
        method, target, *_ = _lines(conn.head.text if conn and conn.head else b"")
        self._logger.error(
            "%s %s in process %d has run for longer than request_timeout; it is at:\n%s",
            method, target, pid, stack.rstrip("\n"),
        )  # fmt: skip

    def next_deadline(self) -> float:
        return math.inf if self._quiet_until is None else self._quiet_until

    def tick(self, now: float) -> None:
        """Say what was held back since the last warning."""
        if self._quiet_until is None or now < self._quiet_until:
            return
        for text, count in self._held.items():
            self._logger.warning("%d more in %g s: %s", count, QUIET, text)
        self._quiet_until = now + QUIET if self._held else None
        self._held.clear()

    def _access(self, conn: Connection, answer: Answer, seconds: float) -> None:
        if not (self._counts or getattr(self._logger, "access_log_enabled", True)):
            return
        head = conn.head.text if conn.head else b""
        method, target, version, headers = _lines(head)
        names = {name.upper(): value for name, value in headers}
        client = conn.client
        environ = {
            "REQUEST_METHOD": method,
            "RAW_URI": target,
            "SERVER_PROTOCOL": version,
            "PATH_INFO": target.partition("?")[0],
            "QUERY_STRING": target.partition("?")[2],
            "REMOTE_ADDR": client[0] if isinstance(client, tuple) else client,
            "HTTP_REFERER": names.get("REFERER", "-"),
            "HTTP_USER_AGENT": names.get("USER-AGENT", "-"),
        }
        sent = 0 if method == "HEAD" else len(answer.content(head)[1])
        response = _Response(answer.status_line, sent, [])
        self._logger.access(response, _Request(headers), environ, timedelta(seconds=seconds))


def were_moved() -> bool:
    """Whether a file that this process logs to is not there any more by its name."""
    return any(
        isinstance(handler, FileHandler) and not _is_there(handler)
        for logger in loggers()
        for handler in logger.handlers
    )


def _is_there(handler: FileHandler) -> bool:
    try:
        here = os.stat(handler.baseFilename)
        return handler.stream is not None and os.path.samestat(
            here, os.fstat(handler.stream.fileno())
        )
    except (OSError, ValueError):  # ValueError: it was closed
        return False


def _lines(text: bytes) -> tuple[str, str, str, list[tuple[str, str]]]:
    """Request line and headers of a head, `-` for what is not there."""
    lines = text.decode("latin-1").strip("\r\n").split("\r\n")
    first, *rest = (_CONTROL.sub(_escaped, line) for line in lines)
    words = [*first.split(" "), "-", "-", "-"] if first else ["-", "-", "-"]
    headers = [line.partition(":") for line in rest]
    return words[0], words[1], words[2], [(name, value.strip()) for name, _, value in headers]


def _escaped(character: re.Match[str]) -> str:
    return f"\\x{ord(character[0]):02x}"


def _open(logging: Mapping[str, Any]) -> Logger:
    """gunicorn's logger; without a logconfig that needs the app's own modules."""
    plain = {name: value for name, value in logging.items() if name not in _NOT_TEXT}
    try:
        return _logger(logging)
    except Exception as error:
        with suppress(Exception):
            logger = _logger(plain)
            logger.warning("The dispatcher logs without logconfig, which it cannot load: %s", error)
            return logger
        return _to_stderr(plain, error)


def _to_stderr(logging: Mapping[str, Any], error: Exception) -> Logger:
    """For logs that cannot be opened, or not any more, by a user who is not root: better than
    nothing, and than an end that each successor would share."""
    others = dict.fromkeys((*_NOT_TEXT, "accesslog", "capture_output", "syslog"))
    logger = _logger({**logging, **others, "errorlog": "-"})
    logger.error("The dispatcher logs to stderr, since it cannot open its log: %s", error)
    return logger


def _logger(logging: Mapping[str, Any]) -> Logger:
    config = Config()
    for name, value in logging.items():
        if name in config.settings:
            # JSON has made lists of tuples, which no socket takes for an address.
            config.settings[name].value = tuple(value) if isinstance(value, list) else value
    return config.logger_class(config)
