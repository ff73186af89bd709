"""From the file and the environment to the settings, or to all that is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError, Place, Problem
from . import cortex, environment, flat, yaml_file
from .layer import Layer, is_cortex
from .seen import Seen, printable
from .settings import KEYS, Settings
from .target import check_target

# The first that is there, in the working directory.
USUAL_FILES = ("replica.yaml", "cortex.yaml")


@dataclass(frozen=True)
class Loaded:
    """The settings, and for each key where it is from: a file's line, a variable, or "default"."""

    settings: Settings
    sources: Mapping[str, str]
    file: str | None
    notes: tuple[str, ...]
    empty: bool  # there is no file, or nothing in it


def load(path: str | None = None, environ: Mapping[str, str] | None = None) -> Loaded:
    """Reads the settings; raises ConfigError with all problems of file and environment.

    The file is `path`, or the one REPLICA_CONFIG names, or replica.yaml or else cortex.yaml in the
    working directory, or none. An empty variable counts as unset.
    """
    environ = os.environ if environ is None else environ
    path = path or environ.get(environment.FILE) or _usual_file()
    file = printable(path) if path else None
    layer = environment.read(environ).over(_read_file(path, environ))
    check_target(layer)
    if layer.problems:
        raise ConfigError(layer.problems)
    settings = Settings(**layer.values)
    return Loaded(settings, _sources(layer), file, tuple(layer.notes), layer.empty)


def check_kept(loaded: Loaded, before: Loaded) -> None:
    """Raises ConfigError if the file of before is lost, as for a moment while it is replaced.

    Another file that is named is none that is lost, nor is cortex.yaml that gets a replica.yaml.
    """
    if before.empty:
        return
    if loaded.empty:
        seen = f"nothing in {loaded.file}" if loaded.file else "no file"
    elif (before.file, loaded.file) == USUAL_FILES:
        seen = USUAL_FILES[1]
    else:
        return
    text = (
        "must be there in a reload, and not empty, since the settings are from it "
        f"(got {seen}); put it back and HUP, or restart to run without it"
    )
    raise ConfigError([Problem(Place(str(before.file)), text)])


def _usual_file() -> str | None:
    return next((file for file in USUAL_FILES if os.path.lexists(file)), None)


def _read_file(path: str | None, environ: Mapping[str, str]) -> Layer:
    if path is None:
        return Layer(notes=_unused_api(environ))
    if path == environ.get(environment.FILE) and not os.path.lexists(path):
        text = f"must name a file that is there (got {Seen(path, 'str')})"
        return Layer(problems=[Problem(Place(environment.WHERE, environment.FILE), text)])
    file = printable(path)
    try:
        document = yaml_file.read(path, file)
    except ConfigError as error:
        return Layer(problems=list(error.problems))
    root = document.root
    if root is not None and is_cortex(root):
        layer = cortex.read(root, file, environ.get(environment.API, ""))
    else:
        layer = flat.read(root, file) if root is not None else Layer()
        layer.notes += _unused_api(environ)
    layer.problems[:0] = document.problems
    layer.empty = root is None
    if path == USUAL_FILES[0] and os.path.lexists(USUAL_FILES[1]):
        layer.notes.append(f"{USUAL_FILES[1]}: not read, {USUAL_FILES[0]} comes first")
    return layer


def _unused_api(environ: Mapping[str, str]) -> list[str]:
    place = Place(environment.WHERE, environment.API)
    unused = environ.get(environment.API)
    return [f"{place}: has no effect without a Cortex API file"] if unused else []


def _sources(layer: Layer) -> dict[str, str]:
    return {key: _source(layer.places[key]) if key in layer.places else "default" for key in KEYS}


def _source(place: Place) -> str:
    return place.key if place.where == environment.WHERE else place.where
