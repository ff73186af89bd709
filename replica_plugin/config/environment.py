"""The environment: REPLICA_<KEY> for every key."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from ..errors import Place
from .layer import Layer
from .seen import shortened
from .settings import kinds

PREFIX = "REPLICA_"
FILE = "REPLICA_CONFIG"
API = "REPLICA_API"
WHERE = "environment"

# Shorter names resemble each other too easily: REPLICA_MODEL may well be somebody else's.
SHORTEST_TYPO = 6


def read(environ: Mapping[str, str]) -> Layer:
    """What the environment sets; an empty value sets nothing."""
    layer = Layer()
    known = {PREFIX + key.upper(): (key, kind) for key, kind in kinds().items()}
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in (FILE, API) or not environ[name]:
            continue
        if name in known:
            key, kind = known[name]
            layer.take(key, kind, kind.from_environment(environ[name]), Place(WHERE, name))
        else:
            _tell_unknown(layer, name, [*known, FILE])
    return layer


def _tell_unknown(layer: Layer, name: str, known: list[str]) -> None:
    """A likely typo is a problem; any other name may be somebody else's, and is noted."""
    place = Place(WHERE, shortened(name))
    names = [it.removeprefix(PREFIX) for it in known if len(it) >= len(PREFIX) + SHORTEST_TYPO]
    match = get_close_matches(name.removeprefix(PREFIX).upper()[:60], names, n=1, cutoff=0.8)
    if match:
        layer.add_problem(place, f"unknown variable; did you mean {PREFIX}{match[0]}?")
    else:
        layer.notes.append(f"{place}: no key of replica-plugin, ignored")
