"""The flat layout: a mapping of the keys of settings.py."""

from __future__ import annotations

import yaml

from replica_plugin.errors import Place
from replica_plugin.layer import Layer, Section, SectionReader
from replica_plugin.settings import kinds


def read(node: yaml.Node, file: str) -> Layer:
    layer = Layer()
    section = Section(kinds(), unknown="unknown key")
    SectionReader(file, layer).read(section, node, Place(file))
    return layer
