"""Kinds of value with a unit: durations as Go writes them, sizes, Kubernetes quantities."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

from .seen import LONGEST, Seen
from .values import BadValueError, Ranged, plain

# What Go's time.Duration holds, and what Python's timed waits take, ends after 292 years.
LONGEST_DURATION = 2562047 * 3600

_SECONDS = {
    "ns": Decimal("1e-9"), "us": Decimal("1e-6"), "µs": Decimal("1e-6"), "μs": Decimal("1e-6"),
    "ms": Decimal("1e-3"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600),
}  # fmt: skip
_AMOUNT = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_PART = re.compile(rf"({_AMOUNT})(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(rf"[-+]?(?:0|(?:{_PART.pattern})+)")
_SIZE = re.compile(r"([0-9]{1,15})(Ki|Mi|Gi|Ti)?")
_BYTES = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_QUANTITY = re.compile(rf"([-+]?{_AMOUNT})(?:([KMGTPE]i|[numkMGTPE])|[eE]([-+]?[0-9]{{1,3}}))?")
_FACTORS = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "k": Decimal(1000),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("MGTPE", start=2)},
    **{unit + "i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}  # fmt: skip


@dataclass(frozen=True)
class Duration(Ranged):
    """Seconds, written with units or as a number; as_in_cortex: only with units."""

    as_in_cortex: bool = False
    multiple_of: float = 0

    name: ClassVar[str] = "duration"
    noun: ClassVar[str] = "a duration"
    example: ClassVar[str] = ", such as 10s or 1m30s"

    def parse(self, seen: Seen) -> float:
        value = self._seconds(seen)
        self.check(value, seen)
        if value > LONGEST_DURATION:
            raise self._beyond("less than or equal to", LONGEST_DURATION, seen)
        if self.multiple_of and value % self.multiple_of:
            raise BadValueError(f"must be a multiple of {self.show(self.multiple_of)} (got {seen})")
        return value

    def _seconds(self, seen: Seen) -> float:
        # The length is looked at first: the pattern takes quadratic time on a long row of digits.
        if len(seen.text) <= LONGEST:
            if seen.tag == "str" and _DURATION.fullmatch(seen.text):
                return _sum(seen.text)
            if seen.tag in ("int", "float") and not self.as_in_cortex and _is_plain(seen.text):
                return float(seen.text)
        raise self.bad(seen)

    def show(self, value: float) -> str:
        if 0 < value < 1 and (value * 1000).is_integer():
            return f"{int(value * 1000)}ms"
        return f"{plain(value)}s"


@dataclass(frozen=True)
class Size(Ranged):
    """Bytes."""

    name: ClassVar[str] = "size"
    noun: ClassVar[str] = "a size"
    example: ClassVar[str] = ": a number of bytes, or such as 512Ki, 1Mi or 1Gi"

    def parse(self, seen: Seen) -> int:
        match = _SIZE.fullmatch(seen.text)
        octal = len(seen.text) > 1 and seen.text.startswith("0")
        if match is None or octal or seen.tag != ("str" if match[2] else "int"):
            raise self.bad(seen)
        value = int(match[1]) * _BYTES[match[2] or ""]
        self.check(value, seen)
        return value

    def show(self, value: float) -> str:
        fitting = (unit for unit in ("Ti", "Gi", "Mi", "Ki") if value % _BYTES[unit] == 0)
        unit = next(fitting, "") if value else ""
        return f"{int(value) // _BYTES[unit]}{unit}"


@dataclass(frozen=True)
class Quantity(Ranged):
    """A Kubernetes quantity; cpu may be a number, memory is text."""

    number_allowed: bool = False

    name: ClassVar[str] = "quantity"
    noun: ClassVar[str] = "a quantity"
    example: ClassVar[str] = ", such as 200m, 2 or 512Mi"

    def parse(self, seen: Seen) -> float:
        tags = ("str", "int", "float") if self.number_allowed else ("str",)
        match = _QUANTITY.fullmatch(seen.text) if len(seen.text) <= LONGEST else None
        if match is None or seen.tag not in tags:
            raise self.bad(seen)
        number, unit, exponent = match.groups()
        factor = _FACTORS[unit] if unit else Decimal(10) ** int(exponent or 0)
        value = float(Decimal(number) * factor)
        self.check(value, seen)
        return value

    def show(self, value: float) -> str:
        return plain(value)


def _is_plain(text: str) -> bool:
    return re.fullmatch(r"-?(0|[1-9][0-9]*)?(\.[0-9]*)?", text) is not None and text[-1:] != "-"


def _sum(text: str) -> float:
    total = sum((Decimal(n) * _SECONDS[unit] for n, unit in _PART.findall(text)), Decimal(0))
    return float(-total if text.startswith("-") else total)
