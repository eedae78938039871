"""Cuts: whole batches in every mixture, shares as the weights say, the same at any position in no time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_io.cuts import Cuts, EvenCuts, shared_cuts

WEIGHTS = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=6)


@given(batch_size=st.integers(1, 100), weights=WEIGHTS, seed=st.integers(0, 2**64 - 1), first=st.integers(0, 10**12))
def test_batches_are_whole_and_parts_steady(batch_size: int, weights: list[float], seed: int, first: int) -> None:
    cuts = shared_cuts(batch_size, weights, seed)
    draws = np.array([np.diff(cut.starts(first, 50)) for cut in cuts])
    assert (draws.sum(axis=0) == batch_size).all()
    for cut, own in zip(cuts, draws, strict=True):
        assert (own >= cut.longest - 1).all()
        assert (own <= cut.longest).all()
        assert (own >= 0).all()


@given(batch_size=st.integers(1, 100), weights=WEIGHTS, seed=st.integers(0, 2**64 - 1), first=st.integers(0, 10**9))
def test_any_position_equals_the_sum_so_far(batch_size: int, weights: list[float], seed: int, first: int) -> None:
    for cut in shared_cuts(batch_size, weights, seed):
        starts = cut.starts(0, 200)
        assert starts[0] == 0
        for batch in (1, 7, 199):
            assert cut.starts(batch, 0)[0] == starts[batch]
        check_batch_at(cut, int(starts[100]))
        check_batch_at(cut, int(cut.starts(first, 0)[0]) + 1)


def check_batch_at(cut: Cuts, draw: int) -> None:
    batch = cut.batch_at(draw)
    assert cut.starts(batch, 0)[0] >= draw
    assert batch == 0 or cut.starts(batch - 1, 0)[0] < draw


@pytest.mark.parametrize("weights", [[1, 3], [0.9, 0.1], [5, 2, 0.01], [1e-3, 1]])
def test_shares_are_the_weights(weights: list[float]) -> None:
    batches, batch_size = 100_000, 8
    for cut, weight in zip(shared_cuts(batch_size, weights, 1), weights, strict=True):
        expected = batches * batch_size * weight / sum(weights)
        # A Kronecker sequence of the golden ratio strays by less than 2 + log2(n) counts.
        assert abs(cut.starts(batches, 0)[0] - expected) < 20


def test_even_cuts() -> None:
    cuts = EvenCuts(8)
    assert cuts.starts(3, 2).tolist() == [24, 32, 40]
    assert [cuts.batch_at(draw) for draw in (0, 1, 8, 9)] == [0, 1, 1, 2]


def test_seeds_differ() -> None:
    one, other = (np.diff(shared_cuts(8, [1, 2], seed)[0].starts(0, 100)) for seed in (0, 1))
    assert (one != other).any()
