"""ready_file: a file that is there while readyz says 200.

It holds the master's pid, so that during an upgrade (USR2), when two masters have the same
settings, neither takes the other's away. The dispatcher shows and removes it; the master
removes what a replica left behind that was killed as a whole. A power cut may leave it empty.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress

LOOK = 1.0  # seconds after which the file is looked at again, though nothing has changed


class ReadyFile:
    """The file, as one dispatcher keeps it."""

    def __init__(self, master: int, complain: Callable[[str], None]) -> None:
        self._master = master
        self._complain = complain
        self._shown: tuple[str | None, bool] | None = None
        self._looked_at = 0.0
        self._told = ""

    def show(self, path: str | None, ready: bool, now: float) -> None:
        """Have the file there if the replica is ready, and only then."""
        wanted = (path, ready)
        if wanted == self._shown and now - self._looked_at < LOOK:
            return
        before = self._shown[0] if self._shown else path
        problem = ""
        try:
            if before is not None and (before != path or not ready):
                remove(before, self._master)
            if path is not None and ready:
                _keep(path, self._master)
        except OSError as error:
            problem = f"{path} cannot be kept: {error.strerror}"
        except ValueError:
            problem = f"{path!a} cannot be kept: no file can have such a name"
        if problem and problem != self._told:
            self._complain(f"ready_file {problem}")
        if problem or ready:  # to be without it needs nothing, and ends no problem
            self._told = problem
        self._shown, self._looked_at = wanted, now


def remove(path: str, master: int | None = None) -> None:
    """Remove the file, if it is one of ours; of this master, if one is given."""
    with suppress(FileNotFoundError):
        text = _read(path)
        if not text or (_is_ours(text) and master in (None, int(text))):
            os.unlink(path)


def forget(path: str | None) -> None:
    """At the start: remove what an earlier replica left; if that fails the dispatcher says so."""
    if path:
        with suppress(OSError, ValueError):
            remove(path)


def _keep(path: str, master: int) -> None:
    text = b""
    with suppress(FileNotFoundError):
        text = _read(path)
    if not text:
        _write(path, master)
    elif not _is_ours(text):
        told = "it is there, with text that is none of ours; remove it, or name another"
        raise OSError(errno.EEXIST, told)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return os.read(fd, 32)
    finally:
        os.close(fd)


def _is_ours(text: bytes) -> bool:
    return re.fullmatch(rb"[0-9]+\n", text) is not None


def _write(path: str, master: int) -> None:
    """It is there with its text or not at all: another master would remove an empty one."""
    beside = f"{path}.{master}"
    with suppress(FileNotFoundError):
        os.unlink(beside)  # of a dispatcher that was killed right here
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        with open(fd, "w") as file:
            file.write(f"{master}\n")
        os.rename(beside, path)
    except OSError:
        os.unlink(beside)
        raise
