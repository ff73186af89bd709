"""The two files that `replica-plugin init` writes."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable
from dataclasses import Field
from typing import Any

from .settings import show, supported

CONF = """\
# gunicorn -c replica_plugin.conf app:app
#
# gunicorn takes this file for its own configuration, which is Python, and warns about the ending
# .conf; the warning is harmless. Settings of gunicorn may follow the line below; those of the
# replica are in replica.yaml.
from replica_plugin.conf import *
"""

_YAML_HEAD = """\
# A replica runs processes_per_replica * threads_per_process requests at a time; all others wait
# in one queue. REPLICA_<KEY> in the environment overrides a key of this file, and
# `replica-plugin check` tells what is in effect.
#
# Durations: 500ms, 10s, 1m30s, or a number of seconds. Sizes: 512Ki, 1Mi, or a number of bytes.
"""
# The two numbers everyone has to choose; the other keys stand in the file as comments.
_CHOSEN = ("processes_per_replica", "threads_per_process")


def replica_yaml() -> str:
    """Every supported key with its default, its rule and its meaning."""
    return "\n".join([_YAML_HEAD, *map(_entry, supported())])


def write() -> list[str]:
    """Writes both files here, or neither where one exists; returns the names of those that do."""
    files = {"replica.yaml": replica_yaml(), "replica_plugin.conf": CONF}
    existing = _existing(files)
    if not existing:
        _write_new(files)
    return existing


def _existing(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if os.path.lexists(path)]


def _write_new(files: dict[str, str]) -> None:
    written: list[str] = []
    try:
        for path, text in files.items():
            # Mode x: a file that somebody made meanwhile is not overwritten.
            with open(path, "x", encoding="utf-8") as stream:
                written.append(path)
                stream.write(text)
    except OSError:
        for path in written:
            os.unlink(path)
        raise


def _entry(key: Field[Any]) -> str:
    default = show(key.name, key.default)
    about = f"{key.metadata['doc']} ({key.metadata['kind'].rule}; default {default})"
    value = key.metadata.get("example", default)
    comment = "" if key.name in _CHOSEN else "#"
    return f"{_wrapped(about)}\n{comment}{key.name}: {value}\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 96, initial_indent="# ", subsequent_indent="# ")
