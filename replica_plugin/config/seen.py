"""A value as the operator wrote it, before anything is made of it.

The tag alone does not tell what was written: YAML 1.1 reads `010` as 8, `1:30` as 90 and `on` as
true. So the raw text travels along, and the kinds in values.py judge by both. An environment
variable is read as the same text would be in YAML.
"""

from __future__ import annotations

from dataclasses import dataclass

import yaml

LONGEST = 60
_COLLECTIONS = {"list": "a list", "map": "a mapping"}
_TAGS = ("null", "bool", "int", "float")
_RESOLVER = yaml.resolver.Resolver()


@dataclass(frozen=True)
class Seen:
    """Raw text and a tag: null, bool, int, float, str (all else that is text), list or map."""

    text: str
    tag: str
    items: tuple[Seen, ...] = ()

    def __str__(self) -> str:
        if self.tag in _COLLECTIONS and not self.text:
            return _COLLECTIONS[self.tag]
        if self.tag in ("str", "list"):
            return f'"{shortened(self.text)}"'
        return shortened(self.text) or "nothing"


def from_text(text: str) -> Seen:
    """The value of an environment variable."""
    return Seen(text, _short_tag(_resolve(text)))


def from_node(node: yaml.Node) -> Seen:
    """The value at a node of a YAML file."""
    if isinstance(node, yaml.ScalarNode):
        return Seen(node.value, _short_tag(node.tag))
    if isinstance(node, yaml.SequenceNode):
        return Seen("", "list", tuple(map(from_node, node.value)))
    return Seen("", "map")


def shortened(text: str) -> str:
    """`text` on one line of at most 60 characters, safe to print anywhere."""
    return printable(text if len(text) <= LONGEST else text[: LONGEST - 3] + "...")


def printable(text: str) -> str:
    """`text` with what cannot be printed as escape sequences."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _resolve(text: str) -> str:
    tag: str = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]  # so in the stubs
    return tag


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _short_tag(tag: str) -> str:
    short = tag.rpartition(":")[2]
    return short if short in _TAGS else "str"
