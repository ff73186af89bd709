"""Reading a YAML file into nodes that know their lines.

Nothing is ever constructed from the nodes. What YAML can do beyond mappings, lists and scalars is
refused before a tree is made of it: an alias can make a small file grow without end, a tag can
name any Python object, and a reader of the file should see the values where they apply.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from ..errors import ConfigError, Place, Problem
from .layer import api_label, is_cortex, joined, line
from .seen import from_node, printable, shortened

LARGEST_FILE = 2**18  # seconds to parse, during which a master does nothing else
# No file of ours or of Cortex's nests deeper than ten; the composer recurses.
DEEPEST = 50

_YAML = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """The root of a file, None when nothing is in it, and what is wrong with its keys."""

    root: yaml.Node | None
    problems: tuple[Problem, ...] = ()


class _Refused(yaml.MarkedYAMLError):
    """The file is YAML, with something in it that settings have no use for."""


class _Loader(yaml.SafeLoader):
    """Composes nodes; looks at each event before a node is made of it."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # so in the stubs
        if refusal := _refusal(event, self.depth):
            raise _Refused(problem=refusal, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read(path: str, file: str) -> Document:
    """Reads the file at `path`, which messages call `file`; raises ConfigError."""
    root = _compose(_text(_bytes(path, file), file), file)
    if root is None or (root.tag == _YAML + "null" and not root.value):
        return Document(None)
    return Document(root, tuple(_bad_keys(root, file)))


def _compose(text: str, file: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_problem(error, file)]) from None
    # PyYAML makes a character of an escape sequence without looking at its number.
    except (ValueError, OverflowError):
        raise _refused(f"{file}:{loader.line + 1}", "an escape sequence is no character") from None


def _bytes(path: str, file: str) -> bytes:
    try:
        # Looked at before it is opened: opening a pipe would wait for a writer.
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise _refused(file, "must be a regular file")
        if found.st_size <= LARGEST_FILE:
            with open(path, "rb") as stream:
                content = stream.read(LARGEST_FILE + 1)
            if len(content) <= LARGEST_FILE:
                return content
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _refused(file, f"cannot be read: {reason}") from None
    raise _refused(file, "must not be larger than 256 KiB; is it the right file?")


def _text(content: bytes, file: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = 1 + content.count(b"\n", 0, error.start)
        raise _refused(f"{file}:{at}", f"must be UTF-8 (byte {error.start} is not)") from None
    if control := yaml.reader.Reader.NON_PRINTABLE.search(text):
        at = 1 + text.count("\n", 0, control.start())
        code = f"U+{ord(control[0]):04X}"
        raise _refused(f"{file}:{at}", f"must not have control characters (got {code})")
    return text


def _refused(where: str, text: str) -> ConfigError:
    return ConfigError([Problem(Place(where), text)])


def _refusal(event: yaml.Event, depth: int) -> str:
    if depth > DEEPEST:
        return f"must not nest deeper than {DEEPEST} levels"
    if isinstance(event, yaml.AliasEvent):
        name = shortened(str(event.anchor))
        return f"aliases are not supported (got *{name}); write the value out"
    tag: str | None = getattr(event, "tag", None)
    if tag is None:
        return ""
    return f"tags are not supported (got {shortened(tag.replace(_YAML, '!!'))}); remove it"


def _problem(error: yaml.MarkedYAMLError, file: str) -> Problem:
    mark = error.problem_mark
    place = Place(f"{file}:{mark.line + 1}" if mark else file)
    reason = str(error.problem)
    if isinstance(error, _Refused):
        return Problem(place, reason)
    if reason == "but found another document":
        return Problem(place, "must be one document; remove this --- and what follows")
    if r"'\t'" in reason:
        return Problem(place, "a tab cannot indent or begin a value; use spaces")
    column = f" at column {mark.column + 1}" if mark else ""
    return Problem(place, f"not valid YAML{column}: {printable(reason)}")


def _bad_keys(node: yaml.Node, file: str, path: str = "") -> Iterator[Problem]:
    if isinstance(node, yaml.SequenceNode):
        is_api = not path and is_cortex(node)
        for index, item in enumerate(node.value):
            item_path = api_label(index, item) if is_api else f"{path}[{index}]"
            yield from _bad_keys(item, file, item_path)
    if isinstance(node, yaml.MappingNode):
        yield from _bad_keys_of_mapping(node, file, path)


def _bad_keys_of_mapping(node: yaml.MappingNode, file: str, path: str) -> Iterator[Problem]:
    first_lines: dict[str, int] = {}
    for key, value in node.value:
        where = f"{file}:{line(key)}"
        if refusal := _refused_key(key):
            yield Problem(Place(where, path), refusal)
            continue
        name = joined(path, key.value)
        if key.value in first_lines:
            text = f"appears twice, first on line {first_lines[key.value]}; keep one"
            yield Problem(Place(where, name), text)
        first_lines.setdefault(key.value, line(key))
        yield from _bad_keys(value, file, name)


def _refused_key(key: yaml.Node) -> str:
    if key.tag == _YAML + "merge":
        return "merge keys are not supported (got <<); write the keys out"
    if key.tag != _YAML + "str":
        return f"a key must be text (got {from_node(key)}); put it in quotes"
    return ""
