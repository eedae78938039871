"""Schedules: their ends, their shape, and what happens beyond them."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_train.schedule import cosine, linear_ramp, warmup_cosine


def learning_rates(total: int, warmup: int) -> list[float]:
    return [warmup_cosine(index, total, peak=2.0, final=0.5, warmup=warmup) for index in range(total)]


def test_warmup_cosine_rises_to_the_peak_and_falls_to_the_end() -> None:
    rates = learning_rates(total=100, warmup=10)
    assert rates[:10] == pytest.approx([0.2 * (index + 1) for index in range(10)])
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert all(after < before for before, after in itertools.pairwise(rates[10:]))
    assert rates[10 + 89] == 0.5
    assert warmup_cosine(10 + 44, 100, peak=2.0, final=0.5, warmup=10) == pytest.approx(1.25, abs=0.02)  # half-way
    assert warmup_cosine(5000, 100, peak=2.0, final=0.5, warmup=10) == 0.5


def test_without_warmup_the_first_update_is_at_the_peak() -> None:
    assert learning_rates(total=5, warmup=0)[0] == 2.0
    assert learning_rates(total=5, warmup=0)[-1] == 0.5


@pytest.mark.parametrize("warmup", [7, 8, 1000])
def test_a_warmup_longer_than_the_schedule_is_cut_to_it(warmup: int) -> None:
    assert learning_rates(total=7, warmup=warmup) == pytest.approx([2.0 * (index + 1) / 7 for index in range(7)])
    assert warmup_cosine(100, 7, peak=2.0, final=0.5, warmup=warmup) == 2.0


@given(total=st.integers(1, 500), warmup=st.integers(0, 600), index=st.integers(0, 1200))
def test_learning_rates_are_positive_and_never_above_the_peak(total: int, warmup: int, index: int) -> None:
    rate = warmup_cosine(index, total, peak=3e-4, final=1e-6, warmup=warmup)
    assert math.isfinite(rate)
    assert 0 < rate <= 3e-4


def test_cosine_between_its_ends() -> None:
    values = [cosine(index, 101, start=0.99, final=1.0) for index in range(101)]
    assert values[0] == pytest.approx(0.99, abs=1e-15)
    assert values[100] == 1.0
    assert values[50] == pytest.approx(0.995)
    assert values[25] == pytest.approx(1 - 0.01 * (1 + math.cos(math.pi / 4)) / 2)
    assert values == sorted(values)
    assert cosine(7000, 101, start=0.99, final=1.0) == 1.0
    assert cosine(0, 1, start=0.99, final=1.0) == 0.99


def test_linear_ramp() -> None:
    values = [linear_ramp(index, 4, start=0.04, final=0.08) for index in range(7)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.08, 0.08, 0.08])
    assert linear_ramp(0, 0, start=0.04, final=0.08) == 0.08


@pytest.mark.parametrize(("index", "total"), [(-1, 10), (0, 0)])
def test_indices_and_lengths_that_make_no_sense_are_refused(index: int, total: int) -> None:
    with pytest.raises(ValueError, match="counted from 0"):
        warmup_cosine(index, total, peak=1.0, final=0.0, warmup=0)
    with pytest.raises(ValueError, match="counted from 0"):
        cosine(index, total, start=1.0, final=0.0)
