"""The order: exact epochs, no window twice in a batch, series spread, and nothing but seed and position in it."""

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dinox_io.order import Order

SIZES = st.one_of(
    st.lists(st.integers(1, 4), min_size=1, max_size=60),
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.builds(lambda giant, tiny: [giant] + [1] * tiny, st.integers(1, 300), st.integers(0, 80)),
    st.builds(lambda giant, tiny: [2] * tiny + [giant], st.integers(1, 200), st.integers(0, 80)),
)


def bounds(sizes: np.ndarray, batch_size: int) -> np.ndarray:
    """How often each series may stand in a batch, as the law says."""
    n = int(sizes.sum())
    ceiling = [1 + -(-2 * batch_size * int(w) // n) for w in sizes]
    return np.array([1 if 4 * batch_size * int(w) <= n else most for w, most in zip(sizes, ceiling, strict=True)])


def check_stream(sizes: list[int], batch_size: int, seed: int, passes: int) -> None:
    series_sizes = np.array(sizes)
    n, series = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    order = Order(series_sizes, batch_size, seed)
    most = bounds(series_sizes, batch_size)
    stream, epochs = [], []
    for position in range(-(-passes * n // batch_size)):
        windows, epoch = order.batch(position)
        assert windows.shape == epoch.shape == (batch_size,)
        assert len(np.unique(windows)) == batch_size, f"a window stands twice in batch {position}"
        assert (np.bincount(series[windows], minlength=len(sizes)) <= most).all(), f"batch {position} is not spread"
        stream.append(windows)
        epochs.append(epoch)
    drawn, epochs = np.concatenate(stream), np.concatenate(epochs)
    for number in range(passes):
        assert sorted(drawn[number * n : (number + 1) * n]) == list(range(n))
    np.testing.assert_array_equal(epochs, np.arange(len(epochs)) // n)


@settings(max_examples=150)
@given(sizes=SIZES, batch_size=st.integers(1, 32), seed=st.integers(0, 2**64 - 1))
@example(sizes=[3], batch_size=3, seed=0)
@example(sizes=[1, 1, 1, 1], batch_size=3, seed=0)  # n = B + 1
@example(sizes=[5, 10], batch_size=8, seed=3)  # n = 2B - 1
@example(sizes=[8, 8], batch_size=8, seed=3)  # n = 2B
@example(sizes=[17], batch_size=8, seed=3)
@example(sizes=[300] + [1] * 80, batch_size=32, seed=1)
@example(sizes=[3] * 40, batch_size=17, seed=1)  # n between 6B and 8B: all three windows of a series may meet
@example(sizes=[1] * 7, batch_size=1, seed=9)
def test_stream(sizes: list[int], batch_size: int, seed: int) -> None:
    if sum(sizes) < batch_size:
        with pytest.raises(ValueError, match=f"{sum(sizes)} windows, fewer than the {batch_size}"):
            Order(np.array(sizes), batch_size, seed)
        return
    check_stream(sizes, batch_size, seed, passes=4 if sum(sizes) < 150 else 3)


@pytest.mark.fault
def test_a_thousand_streams() -> None:
    """Sizes around the edges of the proof (n from B to 9B), where heads have few windows to exchange."""
    random = np.random.default_rng(0)
    for seed in range(1000):
        batch_size = int(random.integers(1, 40))
        left, sizes = int(batch_size * random.uniform(1, 9)), []
        while left > 0:
            sizes.append(int(min(left, random.integers(1, max(2, left // random.integers(1, 6) + 1)))))
            left -= sizes[-1]
        check_stream(sizes, batch_size, seed, passes=6)


@pytest.mark.parametrize("sizes", [[5] * 30, [7, 4], [40, 1, 1, 2, 30]])
def test_any_position_alone_equals_the_stream(sizes: list[int]) -> None:
    batch_size, count = 8, 60
    whole = Order(np.array(sizes), batch_size, 5)
    stream = [whole.batch(position) for position in range(count)]
    for position in np.random.default_rng(0).permutation(count):
        windows, epoch = Order(np.array(sizes), batch_size, 5).batch(int(position))
        np.testing.assert_array_equal(windows, stream[position][0])
        np.testing.assert_array_equal(epoch, stream[position][1])
    for position in reversed(range(count)):
        np.testing.assert_array_equal(whole.batch(position)[0], stream[position][0])


def test_the_stream_is_what_it_was() -> None:
    """Runs resume on it: any change of these numbers must be meant, and said in the changelog."""
    assert Order(np.array([5, 9, 2, 4]), 6, 7).batch(3)[0].tolist() == [10, 4, 13, 16, 3, 12]
    assert Order(np.array([5, 2]), 6, 7).batch(3)[0].tolist() == [6, 5, 3, 4, 1, 2]


def test_seeds_and_epochs_differ() -> None:
    sizes = np.array([20] * 10)
    first = np.concatenate([Order(sizes, 10, 0).batch(position)[0] for position in range(20)])
    next_epoch = np.concatenate([Order(sizes, 10, 0).batch(position)[0] for position in range(20, 40)])
    other_seed = np.concatenate([Order(sizes, 10, 1).batch(position)[0] for position in range(20)])
    assert not (first == next_epoch).all()
    assert not (first == other_seed).all()


def test_every_window_is_as_likely_anywhere() -> None:
    """Over many seeds, each window stands in the first batch equally often (chi-squared, 6 sigma)."""
    sizes, batch_size, trials = np.array([1, 2, 3, 14, 20]), 8, 1500
    counts = np.zeros(40)
    for seed in range(trials):
        counts[Order(sizes, batch_size, seed).batch(0)[0]] += 1
    expected = trials * batch_size / 40
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 39 + 6 * np.sqrt(2 * 39)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Order(np.array([5]), 0, 0)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            Order(np.array([5]), 2, seed)
    with pytest.raises(ValueError, match="position"):
        Order(np.array([5]), 2, 0).batch(-1)


def test_a_million_windows_are_planned_in_seconds() -> None:
    order = Order(np.full(3000, 334), 64, 0)
    begin_s = time.process_time()
    order.batch(0)
    assert time.process_time() - begin_s < 2.0
