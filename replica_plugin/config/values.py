"""The kinds of value a key can have: how each is read, what its rule is, how it is written.

A kind's `rule` completes "must be ..."; the messages and the reference table are made of it.
`parse` raises BadValueError with the whole message; `show` writes a value so that `parse` reads it
back. Durations and sizes are in quantities.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

from ..errors import ReplicaError
from .seen import Seen, from_text

# Cortex keeps its integers in 32 bits.
LARGEST_INT = 2**31 - 1
# Characters of a value that the master passes on; its page has room for all of them (pages.py).
LONGEST = 16_000

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)
_YES_AND_NO = {
    "yes": "true", "on": "true", "y": "true", "1": "true",
    "no": "false", "off": "false", "n": "false", "0": "false",
}  # fmt: skip


class BadValueError(ReplicaError):
    """A value breaks its rule; str() gives the rule, the value seen and the next step."""


class Kind:
    """One kind of value; `name` is its type in the reference table."""

    name: ClassVar[str]
    rule: str

    def parse(self, seen: Seen) -> Any:
        """The value, or a BadValueError."""
        raise NotImplementedError

    def show(self, value: Any) -> str:
        """The value as people write it."""
        return str(value)

    def from_environment(self, text: str) -> Seen:
        """What the text of a variable is; a list has its own way."""
        return from_text(text)

    def bad(self, seen: Seen, next_step: str = "") -> BadValueError:
        """The whole rule, for a value that is of another kind altogether."""
        return BadValueError(f"must be {self.rule} (got {seen}){next_step and '; '}{next_step}")


@dataclass(frozen=True)
class Ranged(Kind):
    """A kind with an order, and bounds that may be left open.

    Beyond a bound the message names that bound alone, in the words Cortex has for it.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    noun: ClassVar[str]
    example: ClassVar[str] = ""

    @property
    def rule(self) -> str:  # type: ignore[override]  # made of the bounds
        return f"{self.noun}{self._bounds()}{self.example}"

    def _bounds(self) -> str:
        if self.least is not None and self.most is not None:
            return f" from {self.show(self.least)} to {self.show(self.most)}"
        signs = {">=": self.least, "<=": self.most, ">": self.above, "<": self.below}
        told = [f"{sign} {self.show(it)}" for sign, it in signs.items() if it is not None]
        return " " + " and ".join(told) if told else ""

    def check(self, value: Any, seen: Seen) -> None:
        """Raises BadValueError where the value is beyond a bound."""
        if self.least is not None and value < self.least:
            raise self._beyond("greater than or equal to", self.least, seen)
        if self.most is not None and value > self.most:
            raise self._beyond("less than or equal to", self.most, seen)
        if self.above is not None and value <= self.above:
            raise self._beyond("greater than", self.above, seen)
        if self.below is not None and value >= self.below:
            raise self._beyond("less than", self.below, seen)

    def _beyond(self, side: str, bound: float, seen: Seen) -> BadValueError:
        return BadValueError(f"must be {side} {self.show(bound)} (got {seen})")


@dataclass(frozen=True)
class Integer(Ranged):
    name: ClassVar[str] = "int"
    noun: ClassVar[str] = "an integer"

    def parse(self, seen: Seen) -> int:
        if seen.tag != "int" or not _INTEGER.fullmatch(seen.text):
            raise self.bad(seen, self._next_step(seen))
        # The first twelve characters tell that a longer number is too large.
        value = int(seen.text[:12])
        self.check(value, seen)
        if value > LARGEST_INT:
            raise self._beyond("less than or equal to", LARGEST_INT, seen)
        return value

    def _next_step(self, seen: Seen) -> str:
        if seen.tag == "int":
            return "write it in plain decimal digits"
        return "remove the quotes" if _INTEGER.fullmatch(seen.text) else ""


@dataclass(frozen=True)
class Number(Ranged):
    name: ClassVar[str] = "float"
    noun: ClassVar[str] = "a number"

    def parse(self, seen: Seen) -> float:
        if seen.tag not in ("int", "float") or not _NUMBER.fullmatch(seen.text):
            raise self.bad(seen)
        value = float(seen.text)
        if value in (float("inf"), float("-inf")):
            raise self.bad(seen)
        self.check(value, seen)
        return value

    def show(self, value: float) -> str:
        return plain(value)


@dataclass(frozen=True)
class Boolean(Kind):
    name: ClassVar[str] = "bool"
    rule: str = "true or false"

    def parse(self, seen: Seen) -> bool:
        if seen.tag == "bool" and seen.text.lower() in ("true", "false"):
            return seen.text.lower() == "true"
        meant = _YES_AND_NO.get(seen.text.lower())
        raise self.bad(seen, f"write {meant}" if meant else "")

    def show(self, value: bool) -> str:
        return str(value).lower()


@dataclass(frozen=True)
class Choice(Kind):
    """One of several words or integers."""

    options: tuple[str | int, ...]
    name: ClassVar[str] = "choice"

    @property
    def rule(self) -> str:  # type: ignore[override]  # made of the options
        *first, last = map(str, self.options)
        return f"{', '.join(first)} or {last}" if first else last

    def parse(self, seen: Seen) -> str | int:
        for option in self.options:
            if str(option) == seen.text and type(option).__name__ == seen.tag:
                return option
        raise self.bad(seen)


@dataclass(frozen=True)
class Text(Kind):
    """Text that a pattern may restrict; `also` names tags that are taken as text, too."""

    pattern: str = r"(?s).+"
    rule: str = "text"
    name: str = "text"  # type: ignore[misc]  # a path, an address: each has its name
    also: tuple[str, ...] = ()

    def parse(self, seen: Seen) -> str:
        if seen.tag not in ("str", *self.also) or not re.fullmatch(self.pattern, seen.text):
            unquoted = seen.tag in ("bool", "int", "float")
            raise self.bad(seen, "put it in quotes" if unquoted else "")
        return seen.text


@dataclass(frozen=True)
class FilePath(Text):
    """The path of a file. One called none is more likely meant as no file."""

    pattern: str = r"[^\0]+"
    rule: str = "a path"
    name: str = "path"  # type: ignore[misc]  # as in Text

    def parse(self, seen: Seen) -> str:
        if seen.tag == "null" or seen.text.lower() == "none":
            raise self.bad(seen, "leave the key out for none")
        return _within_limit(super().parse(seen))


@dataclass(frozen=True)
class Prefix(Kind):
    """A path prefix, or true for the usual one, or false for none."""

    usual: str
    name: ClassVar[str] = "bool or prefix"
    rule: str = 'true, false, or a path that starts and ends with "/"'

    def parse(self, seen: Seen) -> str | None:
        if seen.tag == "bool":
            return self.usual if Boolean(self.rule).parse(seen) else None
        if seen.tag == "str" and re.fullmatch(r"/([!-~]*/)?", seen.text) and no_query(seen.text):
            return _within_limit(seen.text)
        raise self.bad(seen)

    def show(self, value: str | None) -> str:
        return value or "false"


@dataclass(frozen=True)
class Paths(Kind):
    """A list of URL paths; in an environment variable, with commas between."""

    name: ClassVar[str] = "list of paths"
    rule: str = 'a list of paths that start with "/" and have no "?" or "#"'

    def parse(self, seen: Seen) -> tuple[str, ...]:
        if seen.tag != "list":
            raise self.bad(seen)
        paths = tuple(map(self._path, seen.items))
        _within_limit("".join(paths))
        return paths

    def _path(self, seen: Seen) -> str:
        if seen.tag == "str" and re.fullmatch(r"/[!-~]*", seen.text) and no_query(seen.text):
            return seen.text
        raise self.bad(seen)

    def from_environment(self, text: str) -> Seen:
        return Seen(text, "list", tuple(map(from_text, text.split(","))))

    def show(self, value: tuple[str, ...]) -> str:
        return f"[{', '.join(value)}]"


@dataclass(frozen=True)
class Anything(Kind):
    """Left alone."""

    rule: str = "anything"

    def parse(self, seen: Seen) -> Seen:
        return seen


@dataclass(frozen=True)
class Nullable(Kind):
    """Another kind, or null."""

    kind: Kind

    @property
    def rule(self) -> str:  # type: ignore[override]  # that of the other kind
        return self.kind.rule

    def parse(self, seen: Seen) -> Any:
        return None if seen.tag == "null" else self.kind.parse(seen)


@dataclass(frozen=True)
class Later(Kind):
    """A kind whose rule is fixed already, though nothing acts on its values yet."""

    kind: Kind

    def parse(self, seen: Seen) -> Any:
        self.kind.parse(seen)
        raise BadValueError(f"is not supported yet (got {seen}); remove it")

    def from_environment(self, text: str) -> Seen:
        return self.kind.from_environment(text)


def _within_limit(text: str) -> str:
    if len(text) > LONGEST:
        raise BadValueError(f"must have at most {LONGEST} characters in all (got {len(text)})")
    return text


def no_query(path: str) -> bool:
    return "?" not in path and "#" not in path


def plain(number: float | Decimal) -> str:
    """The shortest decimal form without an exponent, which YAML 1.1 would read as text."""
    text = format(Decimal(str(number)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
