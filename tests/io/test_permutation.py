"""Permutations without a table: bijections, keyed, fair, and the same for ever."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dinox_io.permutation import permuted


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_value_once(size: int, key: int) -> None:
    assert sorted(permuted(np.arange(size), size, key).tolist()) == list(range(size))


@given(st.lists(st.tuples(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_elements_do_not_depend_on_their_company(rows: list[tuple[int, int, float]]) -> None:
    sizes = np.array([size for size, _, _ in rows])
    keys = np.array([key for _, key, _ in rows], np.uint64)
    index = np.array([min(int(place * size), size - 1) for size, _, place in rows])
    together = permuted(index, sizes, keys)
    assert ((together >= 0) & (together < sizes)).all()
    for row in range(len(rows)):
        assert permuted(index[row], int(sizes[row]), int(keys[row])) == together[row]


def test_all_places_are_alike() -> None:
    """Chi-squared over keys for each pair (index, place) of a small domain, at 6 sigma; neighbouring keys are used."""
    for size in (5, 17):
        counts = np.zeros((size, size))
        trials = 4000
        places = permuted(np.arange(size)[None], size, np.arange(trials, dtype=np.uint64)[:, None])
        for index in range(size):
            counts[index] = np.bincount(places[:, index], minlength=size)
        chi_squared = ((counts - trials / size) ** 2 / (trials / size)).sum()
        degrees = (size - 1) ** 2
        assert abs(chi_squared - degrees) < 6 * np.sqrt(2 * degrees)


def test_neighbours_part() -> None:
    """Of neighbours in a large domain, no more stay neighbours than chance gives (2/n each)."""
    size = 10_000
    places = permuted(np.arange(size), size, 3)
    assert (np.abs(np.diff(places)) == 1).sum() < 20


def test_it_is_what_it_was() -> None:
    """Runs resume on it."""
    assert permuted(np.arange(8), 8, 1).tolist() == [1, 4, 3, 6, 2, 7, 0, 5]
    assert permuted(np.array([0, 1, 2, 10**9]), 10**12, 12345).tolist() == [
        183675305496,
        109703547806,
        884703705875,
        143413783047,
    ]
