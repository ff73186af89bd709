"""What gunicorn finds out anew for each request, though it is the same for many: once, here.

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
