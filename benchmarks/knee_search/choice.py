"""How points are chosen: bisection, successive halving, and the knee. Pure functions.

The knee is the smallest settings (`Settings.size`) whose rate lies within a tolerance of the best that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from knee_search.settings import Settings

Value = TypeVar("Value")
Key = TypeVar("Key", bound=Hashable)


def largest_that_fits(values: Sequence[Value], fits: Callable[[Value], bool]) -> Value | None:
    """Of ascending values, the largest that fits, where whatever is smaller than one that fits, fits too.

    The largest is asked first, then the middle of what is left: 2 + log2(n) questions at most. None: none fits.
    """
    if not values:
        return None
    if fits(values[-1]):
        return values[-1]
    low, high = -1, len(values) - 1  # values[low] fits, values[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(values[middle]) else (low, middle)
    return values[low] if low >= 0 else None


def knee_of(rates: Mapping[Settings, float], tolerance: float) -> Settings:
    """The smallest settings whose rate is at least 1 - tolerance of the best. ValueError where nothing was measured."""
    return in_order(rates, tolerance)[0]


def in_order(rates: Mapping[Settings, float], tolerance: float) -> list[Settings]:
    """Those within the tolerance of the best first, from small to large; then the others, the fastest first."""
    if not rates:
        raise ValueError("nothing was measured")
    best = max(rates.values())
    plateau = [one for one in rates if rates[one] >= (1 - tolerance) * best]
    others = [one for one in rates if rates[one] < (1 - tolerance) * best]
    return [*sorted(plateau, key=lambda one: one.size), *sorted(others, key=lambda one: -rates[one])]


def halved(rates: Mapping[Settings, float], tolerance: float) -> list[Settings]:
    """The half that goes on, rounded up: the fastest, which says where the plateau is, and the first `in_order`.

    (Jamieson & Talwalkar 2016, successive halving; here ties within the tolerance go to the smaller settings.)
    """
    keep = max(1, (len(rates) + 1) // 2)
    fastest = max(rates, key=lambda one: rates[one])
    order = [fastest, *(one for one in in_order(rates, tolerance) if one != fastest)]
    return order[:keep]


def spread(
    candidates: Sequence[Settings], predicted: Mapping[Settings, float], tolerance: float, most: int
) -> list[Settings]:
    """At most so many candidates to measure first: the best predicted knee; then, for each value of each setting, the
    one with it that is predicted best, so that nothing is decided by the prediction alone; then the rest in order."""
    if not candidates:
        return []
    order = in_order({one: predicted[one] for one in candidates}, tolerance)
    chosen = [order[0]]
    for name in (
        "micro_batch",
        "threads",
        "compile",
        "checkpointing",
        "pin",
        "precision",
        "batch_size",
        "prefetch_mib",
    ):
        values = sorted({getattr(one, name) for one in candidates}, key=str)
        for value in values:
            chosen.append(next(one for one in order if getattr(one, name) == value))
    return list(dict.fromkeys([*chosen, *order]))[:most]
