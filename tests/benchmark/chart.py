"""Grouped bars as SVG, in the style of the demo's picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from xml.sax.saxutils import escape

from replica_plugin.demo.svg import STYLE

from .numbers import short

WIDTH, LEFT, RIGHT = 800, 150, 690
ROW, GAP, TOP = 18, 30, 56

Groups = Mapping[str, Mapping[str, float]]


def bars(title: str, groups: Groups, start: float = 0, logarithmic: bool = False) -> str:
    """One group of bars below the other; ours are filled in another colour than the peers'."""
    most = max(value for each in groups.values() for value in each.values())
    parts, y = [f'<text class="title" x="28" y="38">{escape(title)}</text>'], TOP
    for group, values in groups.items():
        y += GAP
        parts.append(f'<text class="server" x="28" y="{y - 8}">{escape(group)}</text>')
        for name, value in values.items():
            length = max(1.0, (RIGHT - LEFT) * _share(value, start, most, logarithmic))
            style = "running" if name.startswith("ours") else "hatch"
            at = f'y="{y + 11}"'
            parts += [
                f'<text class="quiet" x="{LEFT - 8}" {at} text-anchor="end">{escape(name)}</text>',
                f'<rect class="{style}" x="{LEFT}" y="{y}" width="{length:.1f}" height="13"/>',
                f'<text x="{LEFT + length + 6:.1f}" {at}>{short(value)}</text>',
            ]
            y += ROW
    height = y + 24
    size = f'width="{WIDTH}" height="{height}"'
    head = f'xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {height}"'
    card = f'x="0.5" y="0.5" rx="8" width="{WIDTH - 1}" height="{height - 1}"'
    style = f"{STYLE}.hatch {{ fill: #bf8700; stroke: none }}"
    around = [
        f"<svg {head} {size}>",
        f"<title>{escape(title)}</title>",
        f"<style>{style}</style>",
        f'<rect class="card" {card}/>',
    ]
    return "\n".join([*around, *parts, "</svg>\n"])


def _share(value: float, start: float, most: float, logarithmic: bool) -> float:
    if logarithmic:
        value, start, most = (math.log(max(each, 0.01)) for each in (value, start, most))
    return max(0.0, value - start) / ((most - start) or 1)
