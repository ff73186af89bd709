"""The flat layout: a mapping of the keys of settings.py."""

from __future__ import annotations

import yaml

from ..errors import Place
from .layer import SHAPE_KEYS, Layer, Section, SectionReader
from .settings import kinds


def read(node: yaml.Node, file: str) -> Layer:
    layer = Layer()
    if isinstance(node, yaml.SequenceNode):
        api = f"{', '.join(SHAPE_KEYS[:-1])} and {SHAPE_KEYS[-1]}"
        text = f"must be a mapping of keys (got a list, but not of Cortex APIs, which have {api})"
        layer.add_problem(Place(file), text)
        return layer
    section = Section(kinds(), unknown="unknown key")
    SectionReader(file, layer).read(section, node, Place(file))
    return layer
