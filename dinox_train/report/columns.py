"""The numbers of a file of lines, by field, in little memory however long the file: buckets of equally many lines.

Invariant: what is kept, and what is said of it, depends on the lines alone, not on how many were added at a time. Up to
BUCKETS lines each line is a bucket of its own and everything is exact; past that, neighbouring buckets merge, and a
bucket keeps its smallest and its largest value with their places, the sum, and how many there were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

BUCKETS = 2000
"""At most; from there on their number is between half of it and this."""
MEAN_OVER = 50
"""A mean is taken over a fiftieth of the lines."""
RECENT_LINES, RECENT_PART = 20, 20
"""`now` is the last twenty lines, or the last twentieth of more."""
_KINDS = (float, int, bool)


@dataclass
class Buckets:
    """One field: float64 (buckets,) each. Where a bucket has no value: low inf, high -inf, total and number 0."""

    low: np.ndarray
    high: np.ndarray
    low_at: np.ndarray
    """The place (update) of the smallest value, of several the first."""
    high_at: np.ndarray
    total: np.ndarray
    number: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, places: np.ndarray) -> Buckets:
        """values: (buckets, width), NaN where there is none; places: the same shape."""
        finite = np.isfinite(values)
        rows = np.arange(len(values))
        low, high = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
        lowest, highest = low.argmin(axis=1), high.argmax(axis=1)
        return cls(
            low[rows, lowest],
            high[rows, highest],
            places[rows, lowest],
            places[rows, highest],
            np.where(finite, values, 0.0).sum(axis=1),
            finite.sum(axis=1).astype(np.float64),
        )

    @classmethod
    def none(cls, places: np.ndarray) -> Buckets:
        """Without a value, at these places, (buckets,)."""
        return cls.of(np.full((len(places), 1), np.nan), places[:, None])

    def then(self, other: Buckets) -> Buckets:
        """These, and those after them."""
        return Buckets(*(np.concatenate([a, b]) for a, b in zip(self._all(), other._all(), strict=True)))

    def merged(self) -> Buckets:
        """Every two neighbours as one; their number is even."""
        low, high = self.low.reshape(-1, 2), self.high.reshape(-1, 2)
        rows, lowest, highest = np.arange(len(low)), low.argmin(axis=1), high.argmax(axis=1)
        return Buckets(
            low[rows, lowest],
            high[rows, highest],
            self.low_at.reshape(-1, 2)[rows, lowest],
            self.high_at.reshape(-1, 2)[rows, highest],
            self.total.reshape(-1, 2).sum(axis=1),
            self.number.reshape(-1, 2).sum(axis=1),
        )

    def _all(self) -> tuple[np.ndarray, ...]:
        return self.low, self.high, self.low_at, self.high_at, self.total, self.number


class Columns:
    """Numbers of lines by field; true and false are 1 and 0, and a field f of an object in a field o is `o.f`."""

    def __init__(self, place: str = "update") -> None:
        """place: the field that a curve runs over."""
        self._place = place
        self._width, self._count = 1, 0
        self._places = np.empty(0)  # of each bucket the first
        self._fields: dict[str, Buckets] = {}
        self._first: dict[str, float] = {}
        self._last: dict[str, tuple[float, float]] = {}  # the value and its place
        self._open: list[dict[str, float]] = []  # lines of a bucket that is not full

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]], place: str = "update") -> Columns:
        """Of these lines."""
        columns = cls(place)
        columns.add(lines)
        return columns

    @classmethod
    def restored(cls, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray], place: str = "update") -> Columns:
        """As they were when `facts` and `arrays` were taken of them."""
        columns = cls(place)
        columns._width, columns._count = facts["width"], facts["count"]
        columns._places = arrays["places"]
        columns._fields = {name: Buckets(*field) for name, field in zip(facts["names"], arrays["fields"], strict=True)}
        columns._first = dict(facts["first"])
        columns._last = {name: (value, at) for name, (value, at) in facts["last"].items()}
        columns._open = list(facts["open"])
        return columns

    def facts(self) -> dict[str, Any]:
        """With `arrays`, all there is to these, as JSON values."""
        plain = {"width": self._width, "count": self._count, "names": list(self._fields)}
        return plain | {"first": self._first, "last": self._last, "open": self._open}

    def arrays(self) -> dict[str, np.ndarray]:
        """`places`, float64 (buckets,), and `fields`, float64 (fields, 6, buckets)."""
        fields = [np.stack(field._all()) for field in self._fields.values()]
        return {"places": self._places, "fields": np.stack(fields) if fields else np.empty((0, 6, 0))}

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines; one that says nothing of its place is left out."""
        self._open += [numbers for line in lines if self._place in (numbers := _numbers(line))]
        while len(self._open) >= self._width:
            buckets = min(len(self._open) // self._width, BUCKETS - len(self._places))
            taken, self._open = self._open[: buckets * self._width], self._open[buckets * self._width :]
            self._count += len(taken)
            self._close(taken)
            if len(self._places) == BUCKETS:
                self._width *= 2
                self._places = self._places[::2]
                self._fields = {name: field.merged() for name, field in self._fields.items()}

    def __len__(self) -> int:
        """How many lines there were."""
        return self._count + len(self._open)

    @property
    def names(self) -> list[str]:
        """The fields that ever had a number, in alphabetical order."""
        return sorted({*self._fields, *(name for line in self._open for name in line)})

    def first(self, name: str) -> float | None:
        """The first value; None where there is none."""
        if name in self._first:
            return self._first[name]
        return next((line[name] for line in self._open if name in line), None)

    def last(self, name: str) -> float | None:
        """The last value; None where there is none."""
        found = self._last_with_place(name)
        return found and found[0]

    def last_place(self, name: str) -> float | None:
        """The place of the last value; None where there is none."""
        found = self._last_with_place(name)
        return found and found[1]

    def largest(self, name: str) -> float | None:
        """The largest value; None where there is none."""
        high = self._all(name).high
        return float(high.max()) if np.isfinite(high).any() else None

    def mean(self, name: str) -> float | None:
        """The mean of all values; None where there is none."""
        field = self._all(name)
        return float(field.total.sum() / field.number.sum()) if field.number.any() else None

    def now(self, name: str) -> float | None:
        """The mean of the last lines (of whole buckets, in a long file); None where they hold no number."""
        buckets = math.ceil(max(RECENT_LINES, len(self) // RECENT_PART) / self._width)
        field = self._all(name)
        total, number = field.total[-buckets:], field.number[-buckets:]
        return float(total.sum() / number.sum()) if number.any() else None

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Places and values, float64 (n,): the smallest and the largest of each bucket, NaN for one without any."""
        field = self._all(name)
        low_first = field.low_at <= field.high_at
        x = np.stack([np.where(low_first, field.low_at, field.high_at), np.maximum(field.low_at, field.high_at)], 1)
        y = np.stack([np.where(low_first, field.low, field.high), np.where(low_first, field.high, field.low)], 1)
        y[field.number == 0] = np.nan
        # One value, or equal ones, are one point; so is a bucket without any.
        keep = np.stack([np.ones(len(x), bool), (field.number > 0) & (field.low < field.high)], 1)
        return x[keep], y[keep]

    def mean_curve(self, name: str) -> tuple[np.ndarray, np.ndarray, int]:
        """Places and the mean of the lines up to there, float64 (n,), and of how many lines: a fiftieth of them."""
        field = self._all(name)
        buckets = max(1, len(self) // MEAN_OVER // self._width)
        return self._ends(), trailing_mean(field.total, field.number, buckets), buckets * self._width

    def _ends(self) -> np.ndarray:
        """Where each bucket ends: where the next one begins, and the last one with the last line."""
        starts = self._starts()
        if self._width == 1 or not len(starts):
            return starts
        last = self._last_with_place(self._place)
        assert last is not None
        return np.append(starts[1:], last[0])

    def _starts(self) -> np.ndarray:
        return np.append(self._places, self._open[0][self._place]) if self._open else self._places

    def _all(self, name: str) -> Buckets:
        """The field's buckets, the open one at the end."""
        field = self._fields.get(name) or Buckets.none(self._places)
        if not self._open:
            return field
        values, places = _values(self._open, name), _values(self._open, self._place)
        return field.then(Buckets.of(values[None], places[None]))

    def _close(self, lines: list[dict[str, float]]) -> None:
        """Lines of whole buckets."""
        before, shape = self._places, (-1, self._width)
        places = _values(lines, self._place).reshape(shape)
        self._places = np.concatenate([before, places[:, 0]])
        for name in dict.fromkeys([*self._fields, *(name for line in lines for name in line)]):
            values = _values(lines, name)
            field = self._fields.get(name) or Buckets.none(before)
            self._fields[name] = field.then(Buckets.of(values.reshape(shape), places))
            finite = np.flatnonzero(np.isfinite(values))
            if len(finite):
                self._first.setdefault(name, float(values[finite[0]]))
                self._last[name] = float(values[finite[-1]]), float(places.flat[finite[-1]])

    def _last_with_place(self, name: str) -> tuple[float, float] | None:
        for line in reversed(self._open):
            if name in line:
                return line[name], line[self._place]
        return self._last.get(name)


def trailing_mean(total: np.ndarray, number: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` buckets at each place, from their sums and counts (n,); NaN where none counts."""
    totals = np.concatenate([[0.0], np.cumsum(total)])
    numbers = np.concatenate([[0.0], np.cumsum(number)])
    ends = np.arange(1, len(total) + 1)
    starts = np.maximum(ends - window, 0)
    count = numbers[ends] - numbers[starts]
    return np.where(count > 0, (totals[ends] - totals[starts]) / np.maximum(count, 1), np.nan)


def _values(lines: list[dict[str, float]], name: str) -> np.ndarray:
    return np.array([line.get(name, math.nan) for line in lines], np.float64)


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line, and of the objects in it. This is where the time of a long file goes."""
    found = {name: float(value) for name, value in line.items() if type(value) in _KINDS and isfinite(value)}
    for name, value in line.items():
        if type(value) is dict:
            found |= {f"{name}.{inner}": number for inner, number in _numbers(value).items()}
    return found
