"""How a request that a gate let in gives its slot back: exactly once, on every exit.

1. As a rule when the response's body is closed, as PEP 3333 has every server do; or when it
   is garbage, for a caller that does not.
2. A file on disk that the app hands to `wsgi.file_wrapper` is the server's to send, without
   a line of the app's: the slot goes back when the app returns it. So the server gets the
   very object it looks for (it may use sendfile, or an I/O thread), and a slow download
   holds no slot.

Of 2: servers know their file by its class (gunicorn, waitress, mod_wsgi) or by its identity
(uWSGI), and would not know it inside a wrapper of ours. uWSGI would then send it line by line.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.util import FileWrapper

from .gate import Gate

FILE_WRAPPER = "wsgi.file_wrapper"


class Permitted:
    """A response body with a permit."""

    def __init__(self, body: Iterable[bytes], gate: Gate) -> None:
        self._body = body
        self._permit = threading.Lock()  # taken once, by whoever gives the permit back
        self._gate = gate

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        """Close the app's body, then give the permit back."""
        if not self._permit.acquire(blocking=False):
            return
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._gate.leave()

    def __del__(self) -> None:
        self.close()


class Files:
    """Stands in for the server's `wsgi.file_wrapper`, if it has one, while the app is called."""

    def __init__(self, environ: dict[str, Any]) -> None:
        self._environ = environ
        self._wrap: Callable[..., Iterable[bytes]] | None = environ.get(FILE_WRAPPER)
        self._servers: Iterable[bytes] | None = None

    def __enter__(self) -> Files:
        if self._wrap is not None:
            self._environ[FILE_WRAPPER] = self._wrap_file
        return self

    def __exit__(self, *_: object) -> None:
        if self._wrap is not None:
            self._environ[FILE_WRAPPER] = self._wrap

    def sends(self, body: Iterable[bytes]) -> bool:
        """Whether this body is a file that the server sends by itself."""
        return body is self._servers

    def _wrap_file(self, file: Any, *block_size: int) -> Iterable[bytes]:
        assert self._wrap is not None
        if not is_on_disk(file):
            return FileWrapper(file, *block_size)
        self._servers = self._wrap(file, *block_size)
        return self._servers


def is_on_disk(file: Any) -> bool:
    """Whether to send it needs no `read` of Python's, which may be the app's."""
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):  # in memory, say; or closed
        return False
