"""Medians and their intervals: known answers, and what the interval promises."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from intervals import median_interval


def test_known_answers() -> None:
    # Of 10 samples the interval of the 2nd to the 9th holds the median with 1 - 2 · 11 / 1024.
    found = median_interval([7, 1, 9, 3, 5, 10, 2, 8, 4, 6])
    assert (found.value, found.low, found.high) == (5.5, 2, 9)
    assert found.confidence == pytest.approx(1 - 22 / 1024)
    assert found.quartiles == (3.25, 7.75)
    few = median_interval([3, 1, 2])
    assert (few.value, few.low, few.high, few.confidence) == (2, 1, 3, 0.75)
    one = median_interval([4.0])
    assert (one.value, one.low, one.high, one.confidence) == (4, 4, 4, 0)


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        median_interval([])


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    chance, count, held = random.Random(1), 400, 0
    for _ in range(count):
        found = median_interval([chance.expovariate(1.0) for _ in range(15)])
        held += found.low <= math.log(2) <= found.high
    assert found.confidence >= 0.95
    assert held / count > 0.93


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60), st.floats(1e-3, 1e3))
def test_order_and_unit(samples: list[float], factor: float) -> None:
    found = median_interval(samples)
    assert min(samples) <= found.low <= found.value <= found.high <= max(samples)
    assert found.confidence >= 0.95 or len(samples) < 6
    assert median_interval(samples[::-1]) == found
    scaled = found.scaled(factor)
    assert scaled.low == found.low * factor
    assert scaled.confidence == found.confidence


def test_noise_is_the_farther_end() -> None:
    found = median_interval([0.8, 0.9, 1.0, 1.0, 1.1])
    assert found.noise == pytest.approx(0.25)
