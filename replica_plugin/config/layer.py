"""What one place says: the file, one API of it, or the environment.

A layer gathers the good values, where each stands, and every problem, so that all of them are told
at once. Sections say which keys a mapping may have; reading a mapping by its section fills a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import yaml

from ..errors import Place, Problem
from .seen import Seen, from_node, shortened
from .values import BadValueError, Kind

# Of an API in a Cortex file, by which it is known.
SHAPE_KEYS = ("name", "kind", "predictor")


@dataclass(frozen=True)
class Section:
    """The keys of a mapping, each with its kind or, in turn, its section."""

    keys: Mapping[str, Kind | Section]
    required: tuple[str, ...] = ()
    nullable: bool = False
    unknown: str = 'key "{}" is not supported'


@dataclass
class Layer:
    """Values by key, for a nested key `predictor.type`; `bad` holds keys whose value is not."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    empty: bool = True  # there is no file, or nothing in it

    def take(self, key: str, kind: Kind, seen: Seen, place: Place) -> None:
        """Adds the value, or the problem it has."""
        self.places[key] = place
        try:
            self.values[key] = kind.parse(seen)
        except BadValueError as error:
            self.bad.add(key)
            self.add_problem(place, str(error))

    def add_problem(self, place: Place, text: str) -> None:
        self.problems.append(Problem(place, text))

    def over(self, lower: Layer) -> Layer:
        """Both layers as one, in which this one's values win."""
        return Layer(
            {**lower.values, **self.values},
            {**lower.places, **self.places},
            lower.bad | self.bad,
            lower.problems + self.problems,
            lower.notes + self.notes,
            lower.empty and self.empty,
        )


@dataclass
class SectionReader:
    """Reads mappings of one file into a layer."""

    file: str
    layer: Layer

    def read(self, section: Section, node: yaml.Node, at: Place, key: str = "") -> None:
        """Reads the mapping `node`, which stands at `at` and whose keys begin with `key`."""
        if not isinstance(node, yaml.MappingNode):
            self._refuse_shape(section, node, at)
            return
        for name, (key_node, value) in entries(node).items():
            place = Place(f"{self.file}:{line(key_node)}", joined(at.key, name))
            self._read_entry(section, name, value, place, joined(key, name))
        for name in section.required:
            if name not in entries(node):
                place = Place(at.where, joined(at.key, name))
                self.layer.add_problem(place, "must be defined")

    def _read_entry(
        self, section: Section, name: str, value: yaml.Node, place: Place, key: str
    ) -> None:
        rule = section.keys.get(name)
        if rule is None:
            text = section.unknown.format(shortened(name)) + nearest(name, section.keys)
            self.layer.add_problem(place, text)
        elif isinstance(rule, Section):
            self.layer.places[key] = place
            self.read(rule, value, place, key)
        else:
            self.layer.take(key, rule, from_node(value), place)

    def _refuse_shape(self, section: Section, node: yaml.Node, at: Place) -> None:
        seen = from_node(node)
        if not (section.nullable and seen.tag == "null"):
            self.layer.add_problem(at, f"must be a mapping of keys (got {seen})")


def entries(node: yaml.MappingNode) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """The pairs of a mapping by name; yaml_file.py has told about the keys that are no names."""
    return {
        key.value: (key, value)
        for key, value in node.value
        if isinstance(key, yaml.ScalarNode) and key.tag == "tag:yaml.org,2002:str"
    }


def is_cortex(root: yaml.Node) -> bool:
    """Tells the layout by its shape: an API, or a list with one."""
    if isinstance(root, yaml.MappingNode):
        return any(key in entries(root) for key in SHAPE_KEYS)
    return isinstance(root, yaml.SequenceNode) and any(
        isinstance(item, yaml.MappingNode) and is_cortex(item) for item in root.value
    )


def api_label(index: int, node: yaml.Node) -> str:
    """The key path of the API at `node` in a list of them: `apis[1] (iris)`."""
    name = shortened(api_name(node))
    return f"apis[{index}] ({name})" if name else f"apis[{index}]"


def api_name(node: yaml.Node) -> str:
    """The text of the key `name`, if there is one."""
    if isinstance(node, yaml.MappingNode) and "name" in (pairs := entries(node)):
        return from_node(pairs["name"][1]).text
    return ""


def line(part: yaml.Node | yaml.Event) -> int:
    """The line a part of a file begins on, counted from 1."""
    mark = part.start_mark
    return mark.line + 1 if mark else 1


def nearest(name: str, known: Collection[str]) -> str:
    """The next step for an unknown key."""
    # Clear, though another may be closer: threads for threads_per_process, which is like preload.
    match = [it for it in known if len(name) > 3 and it.startswith(name)]
    if not match and len(name) < 100:  # the comparison takes quadratic time
        match = get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]}?" if match else "; remove it"


def joined(path: str, name: str) -> str:
    """The path of the key `name` below `path`."""
    name = shortened(name)
    return f"{path}.{name}" if path else name
