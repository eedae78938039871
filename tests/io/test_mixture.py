"""Mixtures: exact epochs of each set, shares by weight, and batches that depend on position alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_io.mixture import Draws, Mixture, temperature_weights

SETS = st.lists(
    st.tuples(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.floats(0.2, 5)), min_size=1, max_size=4
)


@settings(max_examples=25)
@given(sets=SETS, batch_size=st.integers(1, 24), inflation=st.integers(1, 3), seed=st.integers(0, 2**64 - 1))
def test_each_set_keeps_exact_epochs(
    sets: list[tuple[list[int], float]], batch_size: int, inflation: int, seed: int
) -> None:
    sizes, weights = [np.array(own) for own, _ in sets], [weight for _, weight in sets]
    try:
        mixture = Mixture(sizes, weights, batch_size=batch_size, seed=seed, inflation=inflation)
    except ValueError:
        assert any(own.sum() < batch_size for own in sizes)
        return
    batches = [mixture.batch(position) for position in range(60)]
    for batch in batches:
        assert len(batch.set) == len(batch.window) == len(batch.epoch) == batch_size
        assert len({(int(a), int(b)) for a, b in zip(batch.set, batch.window, strict=True)}) == batch_size
    for number, own in enumerate(sizes):
        windows = np.concatenate([batch.window[batch.set == number] for batch in batches])
        epochs = np.concatenate([batch.epoch[batch.set == number] for batch in batches])
        for epoch in range(int(epochs.max(initial=0))):  # all but the last are whole
            assert sorted(windows[epochs == epoch]) == sorted(list(range(own.sum())) * inflation)


def equal(one: Draws, other: Draws) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_any_position_alone_equals_the_stream() -> None:
    def new() -> Mixture:
        return Mixture([np.array([9, 30, 4]), np.array([50] * 5)], [1, 2], batch_size=12, seed=3, inflation=2)

    whole = new()
    stream = [whole.batch(position) for position in range(40)]
    for position in (39, 0, 17, 23):
        assert equal(new().batch(position), stream[position])
        assert equal(whole.batch(position), stream[position])


def test_a_set_alone_is_ordered_as_in_a_mixture() -> None:
    """Adding a set changes how much of the first one a batch takes, not which window comes after which pass."""
    sizes = np.array([10] * 8)
    mixture = Mixture([sizes, sizes], [1, 1], batch_size=16, seed=3)
    drawn = [mixture.batch(position) for position in range(20)]
    first = np.concatenate([batch.window[batch.set == 0] for batch in drawn])
    assert sorted(first[:80]) == sorted(first[80:160]) == list(range(80))


def test_rows_of_sets_are_mixed() -> None:
    mixture = Mixture([np.array([500]), np.array([500])], [1, 1], batch_size=64, seed=0)
    halves = np.array([(mixture.batch(position).set[:32] == 0).sum() for position in range(100)])
    assert 12 < halves.mean() < 20
    assert halves.std() > 1


def test_a_billion_virtual_windows_cost_nothing() -> None:
    mixture = Mixture([np.array([50, 50])], [1], batch_size=16, seed=0, inflation=10_000_000)
    draws = mixture.batch(60_000_000)
    assert draws.epoch.max() == 0
    assert len(set(draws.window.tolist())) == 16
    assert mixture.batch(62_500_001).epoch.min() == 1


def test_temperature() -> None:
    assert temperature_weights([100, 10_000], 1) == [100, 10_000]
    assert temperature_weights([100, 10_000], 2) == pytest.approx([10, 100])
    for windows, temperature in (([5], 0.5), ([0, 4], 2), ([5], float("nan"))):
        with pytest.raises(ValueError, match="temperature"):
            temperature_weights(windows, temperature)


def test_refusals() -> None:
    sizes = [np.array([30]), np.array([30])]
    for weights in ([1], [1, 0], [1, float("nan")], [1, -1], []):
        with pytest.raises(ValueError, match="weight"):
            Mixture(sizes, weights, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="inflation"):
        Mixture(sizes, [1, 1], batch_size=4, seed=0, inflation=0)
    with pytest.raises(ValueError, match="fewer than the 4"):
        Mixture([np.array([3]), np.array([30])], [9, 1], batch_size=4, seed=0)
