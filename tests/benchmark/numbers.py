"""Percentiles, and how figures are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: the least value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(round(len(ordered) * percent / 100, 9)) - 1)]


def short(value: float) -> str:
    """Three digits that count."""
    if value and abs(value) < 100:
        text = (
            f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"
            if abs(value) < 10
            else f"{value:.1f}"
        )
        return text.rstrip("0").rstrip(".") if float(text) == int(float(text)) else text
    return f"{value:,.0f}"


def with_spread(values: Sequence[float]) -> str:
    """The median, and the lowest and the highest of the rounds where they differ."""
    middle, low, high = (short(each) for each in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def spread(values: Sequence[float]) -> float:
    """Half of the distance between the lowest and the highest of the rounds."""
    return (max(values) - min(values)) / 2
