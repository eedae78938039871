"""One chart of a report: curves over updates as HTML with an inline SVG, without scripts, fonts or addresses.

The SVG holds lines only and stretches to its box; all text is HTML beside it, so that it keeps its size on a phone.
Hovering (or tapping) a column shows the values there. Every string that comes in is escaped, and the size of a chart is
bounded, whatever the number of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

BUCKETS = 500  # a curve has at most two points a bucket: its smallest and its largest value
HOVER_COLUMNS = 100
FEW_POINTS = 60  # up to so many points are also drawn as dots
WIDTH, HEIGHT = 1000, 240  # units of the SVG, not pixels


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values `y` (float64, NaN where there is none) over `x` (float64 updates, ascending)."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str = "first"  # first | second | third: classes of the page's style
    faint: bool = False  # the noisy one behind its mean: its outliers may leave the chart

    @property
    def is_empty(self) -> bool:
        """Whether it has no value anywhere."""
        return not np.isfinite(self.y).any()

    def present(self) -> Curve:
        """The same without missing and non-finite values."""
        keep = np.isfinite(self.y)
        return Curve(name=self.name, x=self.x[keep], y=self.y[keep], colour=self.colour, faint=self.faint)


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What happened to the run, at updates: drawn into a chart, where it lies within."""

    resumed: Sequence[float] = ()
    rolled_back: Sequence[float] = ()
    skipped: Sequence[float] = ()
    """Updates that were not applied."""
    alarms: Sequence[tuple[float, float]] = ()
    """From update to update."""
    alarms_are: str = "alarm"
    """What the legend calls them."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """How values are shown: how they are written, the range that must be visible, and a logarithmic scale.

    unit: of the values, that in which ticks are round: 2**30 for bytes.
    """

    write: Callable[[float], str]
    include: Sequence[float] = ()
    logarithmic: bool = False
    unit: float = 1.0


def draw_chart(
    title: str,
    curves: Sequence[Curve],
    axis: Axis,
    *,
    sentence: str = "",
    empty: str = "No values.",
    marks: Marks | None = None,
    over: tuple[float, float] | None = None,
) -> str:
    """The chart as one <figure>. `sentence` stands under the title; `empty` is said where no curve has a value.

    over: the updates that its axis spans, and those of curves beyond; None: from the first to the last of the curves.
    """
    head = f"<h3>{escape(title)}</h3>" + (f"<p>{escape(sentence)}</p>" if sentence else "")
    drawn = [curve for curve in (curve.present() for curve in curves) if len(curve.x)]
    if not drawn:
        return f'<figure class="chart"><figcaption>{head}</figcaption><p class="empty">{escape(empty)}</p></figure>'
    # Places without a value count: charts of one run then share their axis.
    ends = [float(end) for curve in curves if len(curve.x) for end in (curve.x.min(), curve.x.max())]
    ends += over or ()
    x_range = min(ends), max(ends)
    marks = marks or Marks()
    logarithmic = axis.logarithmic and all((curve.y > 0).all() for curve in drawn)
    y_range = _value_range(drawn, axis.include, logarithmic)
    lines = [_stretch(begin, end, x_range) for begin, end in joined(marks.alarms, x_range)]
    lines += [_upright(x, x_range, "resumed") for x in _thinned(marks.resumed, x_range)]
    lines += [_upright(x, x_range, "back") for x in _thinned(marks.rolled_back, x_range)]
    lines += [_tick(x, x_range) for x in _thinned(marks.skipped, x_range)]
    y_ticks = [tick * axis.unit for tick in _value_ticks((y_range[0] / axis.unit, y_range[1] / axis.unit), logarithmic)]
    lines += [_level(value, y_range, logarithmic) for value in y_ticks]
    lines += [_curve(curve, x_range, y_range, logarithmic) for curve in drawn]
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{"".join(lines)}</svg>'
    labels = [_y_label(value, y_range, logarithmic, axis.write) for value in y_ticks]
    labels += _x_labels(x_range)
    inside = f"{svg}{''.join(labels)}{_hover(drawn, x_range, axis.write)}"
    plot = f'<div class="plot" role="img" aria-label="{escape(title)}">{inside}</div>'
    return (
        f'<figure class="chart"><figcaption>{head}{_legend(title, drawn, marks, x_range)}</figcaption>{plot}</figure>'
    )


def thin(x: np.ndarray, y: np.ndarray, buckets: int = BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 * buckets of the points, the smallest and the largest of each of `buckets` runs of equal length.

    x, y: (n,), without NaN. Every spike survives. Returned in the order they came.
    """
    if len(x) <= 2 * buckets:
        return x, y
    edges = np.linspace(0, len(x), buckets + 1).astype(int)
    runs = list(pairwise(edges))
    lowest = [first + int(y[first:last].argmin()) for first, last in runs]
    highest = [first + int(y[first:last].argmax()) for first, last in runs]
    keep = np.unique(lowest + highest)
    return x[keep], y[keep]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _value_range(curves: Sequence[Curve], include: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    """From the smallest to the largest value, a few outliers of faint curves left out, with a little room."""
    ends = [float(value) for value in include]
    for curve in curves:
        few = not curve.faint or len(curve.y) < FEW_POINTS
        ends += [float(value) for value in (np.percentile(curve.y, [0, 100] if few else [0.5, 99.5]))]
    low, high = min(ends), max(ends)
    if logarithmic:
        return (low / 1.2, high * 1.2) if low < high else (low / 2, high * 2)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    # A border that was asked for, such as 0 of a share, is the border.
    return low - (0 if low in include else room), high + (0 if high in include else room)


def _value_ticks(y_range: tuple[float, float], logarithmic: bool) -> list[float]:
    low, high = y_range
    if not logarithmic:
        return nice_ticks(low, high, count=4)
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 2 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, max(1, round(decades / 5)))
    return [10.0**power * factor for power in powers for factor in factors if low <= 10.0**power * factor <= high]


def _across(x: float | np.ndarray, x_range: tuple[float, float]) -> float | np.ndarray:
    """Share of the width, 0 left to 1 right; a single update stands in the middle."""
    low, high = x_range
    return (x - low) / (high - low) if high > low else x * 0 + 0.5


def _down(y: float | np.ndarray, y_range: tuple[float, float], logarithmic: bool) -> float | np.ndarray:
    """Share of the height, 0 top to 1 bottom; what lies outside stands on the border."""
    low, high = y_range
    share = np.log(y / low) / np.log(high / low) if logarithmic else (y - low) / (high - low)
    return np.clip(1 - share, 0, 1)


def _curve(curve: Curve, x_range: tuple[float, float], y_range: tuple[float, float], logarithmic: bool) -> str:
    x, y = thin(curve.x, curve.y)
    across, down = WIDTH * _across(x, x_range), HEIGHT * _down(y, y_range, logarithmic)
    points = [f"{a:.1f} {d:.1f}" for a, d in zip(np.atleast_1d(across), np.atleast_1d(down), strict=True)]
    # Where updates were done again, after a kill or a rollback, a line begins anew.
    line = "".join(("M" if again else "L") + point for again, point in zip(_again(x), points, strict=True))
    kind = escape(curve.colour) + (" faint" if curve.faint else "")
    path = f'<path class="{kind}" d="{line}"/>'
    if len(points) <= FEW_POINTS:
        # A line of no length with round ends is a dot that the stretching of the SVG leaves round.
        path += f'<path class="{kind} dots" d="{"".join(f"M{point}h0" for point in points)}"/>'
    return path


def _again(x: np.ndarray) -> np.ndarray:
    """bool (n,): the first point, and those that lie before the one before them."""
    return np.append(True, np.diff(x) < 0)


def _level(value: float, y_range: tuple[float, float], logarithmic: bool) -> str:
    down = HEIGHT * float(_down(value, y_range, logarithmic))
    return f'<path class="level" d="M0 {down:.1f}H{WIDTH}"/>'


def _upright(x: float, x_range: tuple[float, float], kind: str) -> str:
    return f'<path class="{kind}" d="M{WIDTH * float(_across(x, x_range)):.1f} 0V{HEIGHT}"/>'


def _tick(x: float, x_range: tuple[float, float]) -> str:
    return f'<path class="skipped" d="M{WIDTH * float(_across(x, x_range)):.1f} {HEIGHT}v-14"/>'


def _stretch(begin: float, end: float, x_range: tuple[float, float]) -> str:
    left, right = (WIDTH * float(_across(x, x_range)) for x in (begin, end))
    return f'<path class="alarm" d="M{left:.1f} 0H{max(right, left + 3):.1f}V{HEIGHT}H{left:.1f}z"/>'


def joined(spans: Sequence[tuple[float, float]], x_range: tuple[float, float]) -> list[tuple[float, float]]:
    """The parts of spans that lie in the range; those that touch, or that no eye could part, as one."""
    low, high = x_range
    found: list[tuple[float, float]] = []
    for begin, end in sorted(span for span in spans if span[0] <= high and span[1] >= low):
        begin, end = max(begin, low), min(end, high)
        if found and begin - found[-1][1] <= (high - low) / BUCKETS:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def _thinned(places: Sequence[float], x_range: tuple[float, float]) -> list[float]:
    """Of places too close to tell apart, the first."""
    inside = [x for x in places if x_range[0] <= x <= x_range[1]]
    return list({round(BUCKETS * float(_across(x, x_range))): x for x in reversed(inside)}.values())


def _y_label(value: float, y_range: tuple[float, float], logarithmic: bool, write: Callable[[float], str]) -> str:
    down = 100 * float(_down(value, y_range, logarithmic))
    return f'<span class="y" style="top:{down:.2f}%">{escape(write(value))}</span>'


def _x_labels(x_range: tuple[float, float]) -> list[str]:
    labels = ['<span class="x start" style="left:0">update</span>']
    for value in nice_ticks(*x_range, count=5):
        share = float(_across(value, x_range))
        if share > 0.15 and value == round(value):
            side = " end" if share > 0.96 else ""
            labels.append(f'<span class="x{side}" style="left:{100 * share:.2f}%">{value:,.0f}</span>')
    return labels


def _legend(title: str, curves: Sequence[Curve], marks: Marks, x_range: tuple[float, float]) -> str:
    """What the lines are; nothing where that is the title's one curve."""
    items = [
        f'<span><i class="{escape(curve.colour)}{" faint" * curve.faint}"></i>{escape(curve.name)}</span>'
        for curve in curves
    ]
    found = {
        "resumed": ("resumed", _thinned(marks.resumed, x_range)),
        "back": ("went back", _thinned(marks.rolled_back, x_range)),
        "skipped": ("not applied", _thinned(marks.skipped, x_range)),
        "alarm": (escape(marks.alarms_are), joined(marks.alarms, x_range)),
    }
    items += [f'<span><i class="{kind}"></i>{name}</span>' for kind, (name, places) in found.items() if places]
    return f'<p class="legend">{"".join(items)}</p>' if len(items) > 1 or curves[0].name != title.lower() else ""


def _hover(curves: Sequence[Curve], x_range: tuple[float, float], write: Callable[[float], str]) -> str:
    """Columns over the plot, each with a readout of the values nearest to its middle."""
    columns = min(HOVER_COLUMNS, max(len(curve.x) for curve in curves))
    span = (x_range[1] - x_range[0]) / columns
    cells = []
    for column in range(columns):
        middle = x_range[0] + (column + 0.5) * span
        values, update = [], None
        for curve in curves:
            nearest = int(np.abs(curve.x - middle).argmin())
            # A curve with few points is silent between them.
            if abs(curve.x[nearest] - middle) <= span * 0.5 + 0.5 or len(curve.x) >= columns:
                update = curve.x[nearest] if update is None else update
                values.append(f"{curve.name} {write(float(curve.y[nearest]))}")
        text = f"update {update:,.0f} · {' · '.join(values)}" if update is not None else ""
        cells.append(f"<i><b>{escape(text)}</b></i>" if text else "<i></i>")
    return f'<div class="hover" aria-hidden="true">{"".join(cells)}</div>'
