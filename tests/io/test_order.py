"""The order: exact epochs, no window twice in a batch, series spread, and nothing but seed and position in it."""

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dinox_io.cuts import Cuts, shared_cuts
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


def check_stream(
    sizes: list[int], batch_size: int, seed: int, passes: int, cuts: Cuts | None = None, run_length: int = 1
) -> None:
    series_sizes = np.array(sizes)
    n, series = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    order = Order(series_sizes, batch_size, seed, cuts, run_length)
    most = bounds(series_sizes, batch_size)
    stream, epochs = [], []
    starts = order.cuts.starts(0, order.cuts.batch_at(passes * n))
    for position, length in enumerate(np.diff(starts)):
        windows, epoch = order.batch(position)[:2]
        assert windows.shape == epoch.shape == (length,)
        assert len(np.unique(windows)) == length, f"a window stands twice in batch {position}"
        assert (np.bincount(series[windows], minlength=len(sizes)) <= most).all(), f"batch {position} is not spread"
        stream.append(windows)
        epochs.append(epoch)
    drawn, epochs = np.concatenate(stream), np.concatenate(epochs)
    for number in range(passes):
        assert sorted(drawn[number * n : (number + 1) * n]) == list(range(n))
    np.testing.assert_array_equal(epochs, np.arange(len(epochs)) // n)


@settings(max_examples=150)
@given(sizes=SIZES, batch_size=st.integers(1, 32), seed=st.integers(0, 2**64 - 1), run_length=st.sampled_from([1, 4]))
@example(sizes=[3], batch_size=3, seed=0, run_length=1)
@example(sizes=[1, 1, 1, 1], batch_size=3, seed=0, run_length=1)  # n = B + 1
@example(sizes=[5, 10], batch_size=8, seed=3, run_length=1)  # n = 2B - 1
@example(sizes=[8, 8], batch_size=8, seed=3, run_length=3)  # n = 2B
@example(sizes=[17], batch_size=8, seed=3, run_length=1)
@example(sizes=[300] + [1] * 80, batch_size=32, seed=1, run_length=8)
@example(sizes=[3] * 40, batch_size=17, seed=1, run_length=1)  # 6B < n < 8B: all three windows of a series may meet
@example(sizes=[1] * 7, batch_size=1, seed=9, run_length=6)
@example(sizes=[40] * 20, batch_size=2, seed=9, run_length=6)
def test_stream(sizes: list[int], batch_size: int, seed: int, run_length: int) -> None:
    if sum(sizes) < batch_size:
        with pytest.raises(ValueError, match=f"{sum(sizes)} windows, fewer than the {batch_size}"):
            Order(np.array(sizes), batch_size, seed)
        return
    check_stream(sizes, batch_size, seed, passes=4 if sum(sizes) < 150 else 3, run_length=run_length)


@settings(max_examples=40)
@given(sizes=SIZES, batch_size=st.integers(1, 32), share=st.floats(0.2, 0.8), seed=st.integers(0, 2**64 - 1))
@example(sizes=[3] * 40, batch_size=2, share=0.51, seed=1)  # batches of 1 and, rarely, 2
@example(sizes=[2] * 60, batch_size=32, share=0.97, seed=0)
@example(sizes=[1] * 9, batch_size=4, share=0.02, seed=0)  # most batches have none
def test_a_part_of_a_mixture(sizes: list[int], batch_size: int, share: float, seed: int) -> None:
    for cuts in shared_cuts(batch_size, [share, 1 - share], seed):
        if sum(sizes) >= cuts.longest:
            check_stream(sizes, batch_size, seed, passes=3, cuts=cuts, run_length=1 + 4 * (seed % 2))


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
        check_stream(sizes, batch_size, seed, passes=6, run_length=1 + 5 * (seed % 2))


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=12), batch_size=st.integers(1, 24),
    run_length=st.integers(2, 9), seed=st.integers(0, 2**64 - 1), shared=st.booleans(),
)  # fmt: skip
def test_runs(sizes: list[int], batch_size: int, run_length: int, seed: int, shared: bool) -> None:
    """A run is windows of one stretch of the list, for different batches, all drawn by the batch that it names."""
    cuts = shared_cuts(batch_size, [2, 1], seed)[0] if shared else None
    if sum(sizes) < batch_size:
        return
    order = Order(np.array(sizes), batch_size, seed, cuts, run_length)
    drawn: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (pass, run) -> (window, batch)
    for position in range(order.cuts.batch_at(3 * sum(sizes))):
        draw = order.batch(position)
        own = draw.run >= 0
        for window, number, run, last_batch in zip(*(column[own].tolist() for column in draw), strict=True):
            assert position <= last_batch
            drawn.setdefault((number, run), []).append((window, position))
    for (number, run), pairs in drawn.items():
        windows, batches = zip(*pairs, strict=True)
        listed = order.windows_of_runs(number, np.array([run]))[0]
        assert set(windows) <= set(listed.tolist())
        assert len(set(batches)) == len(batches)


def test_runs_cost_little_more_than_a_slice_a_window() -> None:
    """Frames that are decoded for a window, were each run decoded once: (K + 2)/K at best."""
    order, first, last = Order(np.full(200, 133), 64, 3, run_length=8), 100, 300
    frames, windows, alone = 0, 0, 0
    seen: set[int] = set()
    for position in range(first, last):
        draw = order.batch(position)
        windows += len(draw.window)
        alone += np.count_nonzero(draw.run < 0)
        new = np.array(sorted(set(draw.run[draw.run >= 0].tolist()) - seen), np.int64)
        seen.update(new.tolist())
        for run in order.windows_of_runs(0, new):
            run = run[run >= 0]
            frames += len(run) + 2 * (1 + np.count_nonzero(np.diff(run) != 1))
    assert alone == 0
    # Of the runs that are alive at either end, about half of the windows are not seen: 2 · 2 · 64 runs too many.
    assert 1.25 < (frames - 2 * 64 * 10) / windows < 1.35


@pytest.mark.parametrize("run_length", [1, 5])
@pytest.mark.parametrize("sizes", [[5] * 30, [7, 4], [40, 1, 1, 2, 30]])
def test_any_position_alone_equals_the_stream(sizes: list[int], run_length: int) -> None:
    batch_size, count = 8, 60
    whole = Order(np.array(sizes), batch_size, 5, run_length=run_length)
    stream = [whole.batch(position) for position in range(count)]
    for position in np.random.default_rng(0).permutation(count):
        alone = Order(np.array(sizes), batch_size, 5, run_length=run_length).batch(int(position))
        assert all(np.array_equal(one, other) for one, other in zip(alone, stream[position], strict=True))
    for position in reversed(range(count)):
        np.testing.assert_array_equal(whole.batch(position).window, stream[position].window)


def test_the_stream_is_what_it_was() -> None:
    """Runs resume on it: any change of these numbers must be meant, and said in the changelog."""
    assert Order(np.array([5, 9, 2, 4]), 6, 7).batch(3).window.tolist() == [1, 9, 0, 18, 19, 15]
    assert Order(np.array([5, 2]), 6, 7).batch(3).window.tolist() == [0, 5, 6, 3, 1, 2]


def test_seeds_and_epochs_differ() -> None:
    sizes = np.array([20] * 10)
    first = np.concatenate([Order(sizes, 10, 0).batch(position).window for position in range(20)])
    next_epoch = np.concatenate([Order(sizes, 10, 0).batch(position).window for position in range(20, 40)])
    other_seed = np.concatenate([Order(sizes, 10, 1).batch(position).window for position in range(20)])
    assert not (first == next_epoch).all()
    assert not (first == other_seed).all()


def test_every_window_is_as_likely_anywhere() -> None:
    """Over many seeds, each window stands in the first batch equally often (chi-squared, 6 sigma)."""
    sizes, batch_size, trials = np.array([1, 2, 3, 14, 20]), 8, 400
    counts = np.zeros(40)
    for seed in range(trials):
        counts[Order(sizes, batch_size, seed).batch(0).window] += 1
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


def test_a_hundred_million_windows_are_planned_at_once() -> None:
    """A plan touches the batches that are asked for: a hundred million windows cost what a million do."""
    order = Order(np.full(3000, 33400), 64, 0)
    begin_s = time.process_time()
    order.batch(1_000_000)
    assert time.process_time() - begin_s < 1.0


def test_a_run_stands_in_one_row() -> None:
    """But for windows that were exchanged with a head, which are of no run."""
    order, rows = Order(np.full(40, 50), 16, 3, run_length=8), {}
    for position in range(120):
        draw = order.batch(position)
        for row, (number, run) in enumerate(zip(draw.number.tolist(), draw.run.tolist(), strict=True)):
            if run >= 0:
                rows.setdefault((number, run), set()).add(row)
    assert len(rows) > 200
    assert {len(found) for found in rows.values()} == {1}
    firsts = [tuple(min(found) for found in list(rows.values())[start : start + 16]) for start in (0, 150)]
    assert firsts[0] != firsts[1]
