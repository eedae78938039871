"""A span: from the least to the most that a figure may be. Uncertainty that is carried along instead of dropped."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """Least and most of a figure, in its unit; low <= high."""

    low: float
    high: float

    def plus(self, other: Span) -> Span:
        """The sum of two figures."""
        return Span(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Span:
        """The figure so many times, factor >= 0."""
        return Span(self.low * factor, self.high * factor)

    def under(self, amount: float) -> Span:
        """amount / figure: a rate of a time, a time of a rate. For figures above 0."""
        return Span(amount / self.high, amount / self.low)

    def words(self, unit: str = "") -> str:
        """`3.1 to 6.2 days`; one number where they read alike."""
        low, high = (short(value) for value in self)
        return (low if low == high else f"{low} to {high}") + (f" {unit}" if unit else "")


def short(value: float) -> str:
    """Two or three digits that count, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def lasting(seconds: Span) -> str:
    """A time in the unit that people would use."""
    for unit, length in (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds.high >= 2 * length or (unit == "years" and seconds.low >= length):
            return Span(seconds.low / length, seconds.high / length).words(unit)
    return seconds.words("s")
