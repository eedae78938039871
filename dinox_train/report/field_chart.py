"""A chart of fields of a run's lines: values and their mean, or several fields in a colour each.

A chart whose fields a run never had is left out, but for those of every run, where the page says that it is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dinox_train.report.chart import Axis, Curve, Marks, draw_chart
from dinox_train.report.columns import Columns
from dinox_train.report.history import History

COLOURS = ("first", "second", "third")


def curve_of(columns: Columns, name: str, title: str, colour: str) -> Curve:
    """One field as a curve: its smallest and largest values."""
    x, y = columns.curve(name)
    return Curve(name=title, x=x, y=y, colour=colour)


def with_mean(columns: Columns, field: str, title: str, colour: str = "first") -> tuple[Curve, Curve]:
    """The values of each update, faint, and their trailing mean over a fiftieth of the run."""
    x, y = columns.curve(field)
    places, mean, over = columns.mean_curve(field)
    # With a mean of one update both are the same, and one curve is enough.
    noisy = y if over > 1 else np.full_like(y, np.nan)
    return (
        Curve(name=title, x=x, y=noisy, colour=colour, faint=True),
        Curve(name=f"mean of {over:,} updates" if over > 1 else title, x=places, y=mean, colour=colour),
    )


@dataclass(frozen=True)
class FieldChart:
    """A chart of fields of lines; with one field it has a mean, with several each its colour."""

    title: str
    fields: dict[str, str]
    """By name in the lines: its name in the chart."""
    axis: Axis
    sentence: str
    always: bool = False
    """Whether the page says so where the lines do not have it."""
    colour: str = "third"
    noisy: bool = True
    """Whether it is a figure of each update that a mean makes readable."""

    def has_values(self, columns: Columns) -> bool:
        """Whether any of its fields ever had a number."""
        return any(columns.first(name) is not None for name in self.fields)

    def draw(
        self, columns: Columns, *, over: tuple[float, float], marks: Marks | None = None, empty: str = "No values."
    ) -> str:
        """Its <figure>; over: the updates that the axis spans."""
        ((name, title), *others) = self.fields.items()
        if others:
            colours = zip(self.fields.items(), COLOURS, strict=False)
            curves = [curve_of(columns, name, title, colour) for (name, title), colour in colours]
        elif self.noisy:
            curves = with_mean(columns, name, title, self.colour)
        else:
            curves = [curve_of(columns, name, title, self.colour)]
        return draw_chart(self.title, curves, self.axis, sentence=self.sentence, empty=empty, marks=marks, over=over)


def draw_for(history: History, chart: FieldChart, marks: Marks) -> str:
    """The chart of the run's own lines."""
    return chart.draw(history.lines, over=history.span, marks=marks, empty="Not in the lines of this run.")


def field_charts(history: History, marks: Marks, *charts: FieldChart) -> Iterator[str]:
    """Those of the charts that have values, or that every run has."""
    wanted = [chart for chart in charts if chart.always or chart.has_values(history.lines)]
    if wanted:
        yield '<div class="charts">'
        for chart in wanted:
            yield draw_for(history, chart, marks)
        yield "</div>"
