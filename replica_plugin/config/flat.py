"""The flat layout: a mapping of the keys of settings.py."""

from __future__ import annotations

import yaml

from ..errors import Place
from .layer import Layer, Section, SectionReader
from .settings import kinds


def read(node: yaml.Node, file: str) -> Layer:
    layer = Layer()
    section = Section(kinds(), unknown="unknown key")
    SectionReader(file, layer).read(section, node, Place(file))
    return layer
