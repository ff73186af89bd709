"""What gunicorn finds out anew for each request, though it is the same for many: once, here.

    does the parser wait with a head     once, by the master
      that is malformed already?
    a setting                            a plain attribute, instead of three calls
    the client's address is trusted      once for each address
    Date                                 once a second
    what is constant in environ          once; the error log is looked for when the app writes

Parser, environ and response are gunicorn's own, and what they make is the same.
"""

from __future__ import annotations

import time
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from gunicorn import http, util
from gunicorn.config import Config
from gunicorn.http import wsgi
from gunicorn.http.errors import NoMoreData

MALFORMED = (
    *(b"\n", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nHost: x\nA"),  # bare line feeds
    *(b"GET /\r\n", b"GET  / HTTP/1.1\r\n", b"GET /\x80 HTTP/1.1\r\n"),  # not a request line
    b"G" * (1 << 14),  # too long a line, unless there is no limit
)
"""Beginnings of heads that no end could mend (head.py)."""

get_parser = getattr(http, "get_parser", None) or http.RequestParser  # get_parser since 25
_make_date = util.http_date
_make_environ = wsgi.base_environ


class Settled(Config):  # type: ignore[misc]  # gunicorn ships no types
    """A configuration that changes no more, with every setting as a plain attribute.

    Parser, environ and response look some thirty of them up for each request.
    """

    def __init__(self, cfg: Config) -> None:
        values = {name: setting.get() for name, setting in cfg.settings.items()}
        self.__dict__.update(values, **vars(cfg))


class Request(http.Request):  # type: ignore[misc]
    """gunicorn's, which asks once for each address whether it is trusted."""

    def _peer_is_trusted_proxy(self) -> Any:
        if isinstance(self.peer_addr, tuple):
            return _is_trusted(self.peer_addr[0], self.cfg)
        return super()._peer_is_trusted_proxy()


@lru_cache(maxsize=1024)
def _is_trusted(host: str, cfg: Config) -> Any:
    return http.Request._peer_is_trusted_proxy(SimpleNamespace(peer_addr=(host, 0), cfg=cfg))


class Errors(wsgi.WSGIErrorsWrapper):  # type: ignore[misc]
    """wsgi.errors, which most apps never write to."""

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg

    def write(self, data: str) -> None:
        wsgi.WSGIErrorsWrapper(self._cfg).write(data)


def refuses_at_once(cfg: Config) -> bool:
    """Whether gunicorn's parser waits for nothing more of a head that is malformed already.

    Not so that of gunicorn 23, nor the one in C (gunicorn_h1c): there each would hold a slot.
    """
    return all(_refuses(cfg, data) for data in MALFORMED[: None if cfg.limit_request_line else -1])


def _refuses(cfg: Config, data: bytes) -> bool:
    parser = get_parser(cfg, iter([data]), ("127.0.0.1", 0))
    parser.req_count = 1  # from the second on no PROXY line is looked for
    try:
        next(parser)
    except (NoMoreData, StopIteration):
        return False
    except Exception:
        return True
    return False


def settle() -> None:
    """Have gunicorn's response and environ, in this process, use what is here."""
    util.http_date = _date
    wsgi.base_environ = _environ


def _date(timestamp: float | None = None) -> str:
    return _date_of(int(time.time() if timestamp is None else timestamp))


@lru_cache(maxsize=1)
def _date_of(second: int) -> str:
    date: str = _make_date(second)
    return date


def _environ(cfg: Config) -> dict[str, Any]:
    return {**_constant(cfg), "wsgi.errors": Errors(cfg)}


@lru_cache(maxsize=1)
def _constant(cfg: Config) -> dict[str, Any]:
    constant: dict[str, Any] = _make_environ(cfg)
    return constant
