"""What `replica-plugin check` says: the settings in effect, or all that is wrong with them."""

from __future__ import annotations

import json
from typing import Any

from ..errors import ConfigError
from .load import USUAL_FILES, Loaded
from .settings import Settings, show, supported


def report(loaded: Loaded) -> str:
    """The settings as a table, then the notes and what the settings mean."""
    notes = [f"note: {note}" for note in loaded.notes]
    if loaded.file is None:
        notes.append(f"note: no {' or '.join(USUAL_FILES)} here")
    return "\n".join([*_table(loaded), "", *notes, meaning(loaded.settings)])


def meaning(settings: Settings) -> str:
    """The two numbers that all others come down to."""
    at_once = min(settings.slots, settings.max_replica_concurrency)
    requests = "request" if at_once == 1 else "requests"
    waiting = f"up to {settings.waiting_room}" if settings.waiting_room else "none"
    return f"{at_once} {requests} at a time, {waiting} waiting"


def as_json(result: Loaded | ConfigError) -> str:
    """The same for programs; durations in seconds, sizes in bytes."""
    if isinstance(result, ConfigError):
        return _dump(ok=False, problems=list(map(str, result.problems)), settings={})
    settings = {key: {"value": value, "from": source} for key, value, source in _rows(result)}
    return _dump(
        ok=True, problems=[], settings=settings, file=result.file, notes=list(result.notes)
    )


def _dump(**content: Any) -> str:
    return json.dumps(content, indent=2)


def _rows(loaded: Loaded) -> list[tuple[str, Any, str]]:
    return [
        (key.name, getattr(loaded.settings, key.name), loaded.sources[key.name])
        for key in supported()
    ]


def _table(loaded: Loaded) -> list[str]:
    rows = [(key, _shown(loaded, key, value), source) for key, value, source in _rows(loaded)]
    keys, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{key:{keys}}  {value:{values}}  {source}" for key, value, source in rows]


def _shown(loaded: Loaded, key: str, value: Any) -> str:
    if key == "target_replica_concurrency":
        value = loaded.settings.effective_target
    return show(key, value)
