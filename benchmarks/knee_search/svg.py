"""Two drawings for the page, as SVG without scripts or fonts of its own: bars with intervals, curves with ceilings.

Colours are the classes of dinox_train/report/style.py, so that they follow the reader's light or dark. Every string is
escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dinox_train.report.chart import nice_ticks
from dinox_train.report.numerals import number

STYLE = """
.drawing { width: 100%; height: auto; display: block; }
.drawing text { font-size: 12px; fill: var(--ink); }
.drawing text.soft { fill: var(--soft); }
.drawing line, .drawing path { fill: none; stroke: var(--line); stroke-width: 1; }
.drawing rect.first { fill: var(--first); } .drawing rect.second { fill: var(--second); }
.drawing rect.other { fill: var(--line); }
.drawing .first { stroke: var(--first); } .drawing .second { stroke: var(--second); }
.drawing .third { stroke: var(--third); }
.drawing path.curve { stroke-width: 2; } .drawing path.ceiling { stroke-width: 1.5; stroke-dasharray: 6 4; }
.drawing line.interval { stroke: var(--ink); stroke-width: 1.5; }
.drawing circle { fill: none; stroke: var(--third); stroke-width: 2; }
.drawing circle.dot { fill: var(--first); stroke: none; }
"""
_WIDTH, _ROW, _LEFT, _RIGHT = 1000, 26, 400, 90


@dataclass(frozen=True)
class Bar:
    """One row: a measured rate with its interval, and what was predicted."""

    name: str
    value: float
    low: float
    high: float
    predicted: float | None
    kind: str
    """first: the knee; second: on the plateau; other."""
    note: str = ""


def bars(rows: Sequence[Bar], unit: str) -> str:
    """Horizontal bars from 0, the prediction a ring."""
    most = max([row.high for row in rows] + [row.predicted or 0.0 for row in rows]) * 1.02
    ticks = nice_ticks(0.0, most, 5)
    height = _ROW * len(rows) + 34

    def across(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / most

    parts = [f'<line x1="{across(tick):.1f}" y1="0" x2="{across(tick):.1f}" y2="{height - 30}"/>' for tick in ticks]
    parts += [
        f'<text class="soft" x="{across(tick):.1f}" y="{height - 14}" text-anchor="middle">{number(tick)}</text>'
        for tick in ticks
    ]
    for place, row in enumerate(rows):
        y = place * _ROW
        middle = y + _ROW / 2
        parts.append(f'<text x="{_LEFT - 8}" y="{middle + 4}" text-anchor="end">{escape(row.name)}</text>')
        parts.append(
            f'<rect class="{escape(row.kind)}" x="{_LEFT}" y="{y + 6}" width="{across(row.value) - _LEFT:.1f}" '
            f'height="{_ROW - 12}" rx="2"/>'
        )
        parts.append(
            f'<line class="interval" x1="{across(row.low):.1f}" y1="{middle}" '
            f'x2="{across(row.high):.1f}" y2="{middle}"/>'
        )
        if row.predicted is not None:
            parts.append(f'<circle cx="{across(row.predicted):.1f}" cy="{middle}" r="5"/>')
        parts.append(f'<text class="soft" x="{_WIDTH - _RIGHT + 8}" y="{middle + 4}">{escape(row.note)}</text>')
    parts.append(f'<text class="soft" x="{_LEFT}" y="{height}">{escape(unit)}</text>')
    return f'<svg class="drawing" viewBox="0 0 {_WIDTH} {height + 4}" role="img">{"".join(parts)}</svg>'


def curves(
    measured: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    ceilings: Sequence[tuple[str, str, float]],
    *,
    across: str,
    unit: str,
) -> str:
    """Curves (name, colour, points), and level lines (name, colour, height); both axes from 0, the lower one by place
    of its values, which double as a rule."""
    places = sorted({x for _, _, points in measured for x, _ in points})
    heights = [y for _, _, points in measured for _, y in points]
    # A ceiling far above is said, not drawn: the curves would lie on the ground.
    drawn = [one for one in ceilings if one[2] <= 3 * max(heights)]
    most = max(heights + [one[2] for one in drawn]) * 1.05
    left, width, top, bottom = 70, _WIDTH - 110, 12, 250

    def x_of(value: float) -> float:
        return left + width * (places.index(value) + 0.5) / len(places)

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * value / most

    parts = []
    for tick in nice_ticks(0.0, most, 4):
        parts.append(f'<line x1="{left}" y1="{y_of(tick):.1f}" x2="{left + width}" y2="{y_of(tick):.1f}"/>')
        parts.append(
            f'<text class="soft" x="{left - 8}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for value in places:
        parts.append(
            f'<text class="soft" x="{x_of(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>'
        )
    parts.append(
        f'<text class="soft" x="{left + width / 2}" y="{bottom + 38}" text-anchor="middle">{escape(across)}</text>'
    )
    parts.append(f'<text class="soft" x="{left}" y="{bottom + 38}">{escape(unit)}</text>')
    for _, colour, points in measured:
        path = "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in sorted(points))
        parts.append(f'<path class="curve {escape(colour)}" d="M{path}"/>')
        parts += [f'<circle class="dot" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="4"/>' for x, y in points]
    for _, colour, height in drawn:
        parts.append(f'<path class="ceiling {escape(colour)}" d="M{left} {y_of(height):.1f}H{left + width}"/>')
    svg = f'<svg class="drawing" viewBox="0 0 {_WIDTH} {bottom + 44}" role="img">{"".join(parts)}</svg>'
    named = [(name, colour) for name, colour, _ in measured]
    named += [(f"{name}: {number(height)}", colour) for name, colour, height in ceilings]
    items = "".join(f'<span><i class="{escape(colour)}"></i>{escape(name)}</span>' for name, colour in named)
    return f'<p class="legend">{items}</p>{svg}'
