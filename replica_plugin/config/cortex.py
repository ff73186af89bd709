"""The Cortex layout: a list of APIs, or one.

Every API of the file is checked, as Cortex does; the RealtimeAPI that is served gives its numbers.
"""

from __future__ import annotations

import yaml

from ..errors import Place, Problem
from . import cortex_api, environment
from .cortex_api import Api
from .cortex_keys import APIS, KIND
from .layer import (
    SHAPE_KEYS,
    Layer,
    SectionReader,
    api_label,
    api_name,
    entries,
    joined,
    line,
)
from .seen import Seen, from_node, shortened
from .settings import KEYS
from .target import check_target

SERVED = "RealtimeAPI"


def read(root: yaml.Node, file: str, wanted: str) -> Layer:
    """What the API called `wanted` says, or without a name the file's only RealtimeAPI."""
    if problem := _mixed_layouts(root, file):
        return Layer(problems=[problem])
    apis = [_read_api(node, place, file) for node, place in _nodes(root, file)]
    served = _served(apis, file, wanted)
    result = Layer(problems=_repeated_names(apis))
    for api in apis:
        settings = api.settings()
        if api is served:
            result = settings.over(result)
        else:
            check_target(settings)
        result.problems += api.layer.problems + settings.problems
        result.notes += _notes(api)
    if isinstance(served, Problem):
        result.problems.append(served)
    return result


def _mixed_layouts(root: yaml.Node, file: str) -> Problem | None:
    keys = entries(root) if isinstance(root, yaml.MappingNode) else {}
    flat = next((key for key in keys if key in KEYS), None)
    if flat is None:
        return None
    cortex = next(key for key in SHAPE_KEYS if key in keys)
    place = Place(f"{file}:{line(keys[flat][0])}", flat)
    at = line(keys[cortex][0])
    text = f"is no key of a Cortex API file, which {cortex} on line {at} makes this"
    return Problem(place, f"{text}; keep one layout")


def _nodes(root: yaml.Node, file: str) -> list[tuple[yaml.Node, Place]]:
    if isinstance(root, yaml.MappingNode):
        return [(root, Place(f"{file}:{line(root)}"))]
    return [
        (node, Place(f"{file}:{line(node)}", api_label(index, node)))
        for index, node in enumerate(root.value)
    ]


def _read_api(node: yaml.Node, place: Place, file: str) -> Api:
    api = Api(place, api_name(node))
    if not isinstance(node, yaml.MappingNode):
        api.layer.add_problem(place, f"must be a mapping of keys (got {from_node(node)})")
        return api
    _read_kind(api, node, file)
    # Which keys an API may have depends on its kind: without one nothing more can be said.
    if api.kind:
        SectionReader(file, api.layer).read(APIS[api.kind], node, place)
        cortex_api.check(api)
    return api


def _read_kind(api: Api, node: yaml.MappingNode, file: str) -> None:
    seen, where = Seen("", "null"), api.place.where
    if pair := entries(node).get("kind"):
        seen, where = from_node(pair[1]), f"{file}:{line(pair[0])}"
    api.layer.take("kind", KIND, seen, Place(where, joined(api.place.key, "kind")))


def _repeated_names(apis: list[Api]) -> list[Problem]:
    names: set[str] = set()
    problems = []
    for api in apis:
        if api.name and api.name in names:
            text = f'name must be unique in the file (got "{shortened(api.name)}")'
            problems.append(Problem(api.place, text))
        names.add(api.name)
    return problems


def _served(apis: list[Api], file: str, wanted: str) -> Api | Problem | None:
    """The API to serve, or why there is none; None where a bad kind has been told already."""
    candidates = [api for api in apis if api.kind == SERVED]
    chosen = [api for api in candidates if api.name == wanted] if wanted else candidates
    names = ", ".join(shortened(api.name) for api in candidates)
    if not candidates:
        told = not all(api.kind for api in apis)
        text = f"must have a {SERVED} to serve (got {_kinds(apis)})"
        return None if told else Problem(Place(file), text)
    if not chosen:
        place, seen = Place(environment.WHERE, environment.API), Seen(wanted, "str")
        return Problem(place, f"must name a {SERVED} of {file}: {names} (got {seen})")
    if len(chosen) > 1 and not wanted:
        text = f"must have one {SERVED} (got {names}); name one in {environment.API}"
        return Problem(Place(file), text)
    return chosen[0]


def _kinds(apis: list[Api]) -> str:
    return ", ".join(f"{api.kind} {shortened(api.name)}" for api in apis)


def _notes(api: Api) -> list[str]:
    place = api.layer.places.get(cortex_api.BATCHING)
    if place is None:
        return []
    return [f"{place}: has no effect, requests are not batched"]
