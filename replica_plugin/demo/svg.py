"""The demo's picture as SVG, for a page: the worst round of each server, and how many went right.

It stands on a card of its own, because a page may be dark while the reader's system is light, and
has neither scripts nor fonts. Waiting is hatched and a wrong round hollow: colours alone do not
tell them from running and right.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from .bars import Bar, tick_step
from .trial import Plan, Trial

WIDTH = 800
MARGIN = 28
LEFT = 172  # where time begins
RIGHT = WIDTH - MARGIN - 12
LEGEND = 480
ROW, THICK = 22, 14  # a bar's place and the bar
TICK_DISTANCE = 90
MARKS = 150  # what the marks of all rounds may take together
SHARE = 112  # what a share takes beside them
STYLE = """
text { font: 13px -apple-system, BlinkMacSystemFont, 'Segoe UI', 'Noto Sans', Helvetica, Arial,
  sans-serif; fill: #1f2328 }
.title { font-size: 17px; font-weight: 600 } .server { font-size: 15px; font-weight: 600 }
.strong { font-weight: 600 }
.quiet { fill: #59636e } .card { fill: #ffffff; stroke: #d1d9e0 } .grid { stroke: #e4e8ec }
.running { fill: #218bff } .waiting { fill: #ffe2a8 } .hatch { stroke: #bf8700 }
.idle { fill: none; stroke: #8c959f; stroke-dasharray: 4 3 }
.right { fill: #1f883d; stroke: #1f883d } .wrong { fill: none; stroke: #cf222e }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .quiet { fill: #9198a1 }
  .card { fill: #0d1117; stroke: #3d444d } .grid { stroke: #262c36 }
  .running { fill: #388bfd } .waiting { fill: #5c4212 } .hatch { stroke: #e8b04a }
  .idle { stroke: #7d8590 }
  .right { fill: #3fb950; stroke: #3fb950 } .wrong { stroke: #f85149 }
}
"""


def picture(*trials: Trial) -> str:
    """Draw the worst round of each, below each other on one scale."""
    layouts = [trial.bars(trial.worst()) for trial in trials]
    seconds = max(bar.end for bars in layouts for bar in bars)
    root = Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
    SubElement(root, "title").text = _summary(trials)
    SubElement(root, "style").text = STYLE
    _hatch(root)
    card = _add(root, "rect", "card", x=0.5, y=0.5, rx=8, width=WIDTH - 1)
    y = _head(root, trials[0].plan)
    for trial, bars in zip(trials, layouts, strict=True):
        y = _shares(root, trial, y)
        y = _burst(root, bars, (RIGHT - LEFT) / seconds, y)
    size = {"width": f"{WIDTH}", "height": f"{y + 1}"}
    root.attrib |= {"viewBox": f"0 0 {WIDTH} {y + 1}", **size}
    card.set("height", f"{y}")
    indent(root)
    return tostring(root, encoding="unicode") + "\n"


def _summary(trials: Sequence[Trial]) -> str:
    """For those who do not see the picture."""
    return ". ".join(
        f"{trial.server}, {trial.plan.claim(size)}: {trial.share(size)}"
        for trial in trials
        for size in trial.rounds
    )


def _hatch(root: Element) -> None:
    shape = {"id": "hatch", "patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
    pattern = SubElement(root, "pattern", shape, width="5", height="5")
    _add(pattern, "rect", "waiting", width=5, height=5)
    _add(pattern, "path", "hatch", d="M0 0V5")


def _head(root: Element, plan: Plan) -> int:
    """Title and legend; return where they end."""
    title = f"Requests sent together to {plan.shape}"
    _text(root, "title", MARGIN, 38, title.replace(" x ", " × "))
    _text(root, "quiet", MARGIN, 66, f"Bars: the worst round of {plan.sizes[-1]} requests")
    x = LEGEND
    for style, name in (("waiting", "waiting"), ("running", "running"), ("idle", "idle")):
        _box(root, style, x, 54.5, 26)
        _text(root, "quiet", x + 34, 66, name)
        x += 106
    return 80


def _shares(root: Element, trial: Trial, y: int) -> int:
    """A server's name, and its rounds and their share; return where they end."""
    _text(root, "server", MARGIN, y + 24, trial.server)
    y += 34
    for size in trial.rounds:
        right = trial.right(size)
        pitch = min(14, MARKS / len(right))
        for number, good in enumerate(right):
            style = "right" if good else "wrong"
            x = MARGIN + number * pitch + 0.5
            _add(root, "rect", style, x=x, y=y + 2.5, width=0.7 * pitch, height=10, rx=1)
        x = MARGIN + len(right) * pitch + 8
        _text(root, "strong", x, y + 12, trial.share(size))
        _text(root, "", x + SHARE, y + 12, trial.plan.claim(size))
        y += 21
    return y + 6


def _burst(root: Element, bars: Sequence[Bar], scale: float, y: int) -> int:
    """The bars of a burst and their axis; `scale` is in units a second. Return where they end."""
    bottom = y + ROW * len(bars)
    step = tick_step(TICK_DISTANCE / scale * 1000)
    for number in range(int((RIGHT - LEFT) / scale * 1000 / step) + 1):
        x = LEFT + number * step / 1000 * scale
        _add(root, "path", "grid", d=f"M{_number(x)} {y}V{bottom + 4}")
        _text(root, "quiet", x, bottom + 19, f"{number * step} ms", anchor="middle")
    above = ""
    for bar in bars:
        if bar.lane != above:
            _text(root, "", MARGIN, y + 16, bar.lane)
        above = bar.lane
        _bar(root, bar, scale, y + (ROW - THICK) / 2)
        y += ROW
    return y + 34


def _bar(root: Element, bar: Bar, scale: float, y: float) -> None:
    if bar.idle:
        _box(root, "idle", LEFT, y, RIGHT - LEFT)
        return
    sent, begin, end = (LEFT + time * scale for time in (bar.sent, bar.begin, bar.end))
    _box(root, "waiting", sent, y, begin - sent)
    _box(root, "running", begin, y, end - begin)


def _box(root: Element, style: str, x: float, y: float, width: float) -> None:
    fill = {"fill": "url(#hatch)"} if style == "waiting" else {"class": style}
    box = _add(root, "rect", "", x=x, y=y, width=width, height=THICK, rx=2)
    box.attrib |= fill


def _text(root: Element, style: str, x: float, y: float, text: str, anchor: str = "") -> None:
    element = _add(root, "text", style, x=x, y=y)
    element.text = text
    if anchor:
        element.set("text-anchor", anchor)


def _add(root: Element, tag: str, style: str, **attributes: float | str) -> Element:
    told = {"class": style} if style else {}
    for name, value in attributes.items():
        told[name] = value if isinstance(value, str) else _number(value)
    return SubElement(root, tag, told)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
