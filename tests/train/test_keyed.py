"""Keyed randomness: the published answers of Philox4x32-10, and that a number depends on its own coordinates only."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_train.keyed import philox4x32, uniform

# Known answers published with Random123 (Salmon et al., SC'11): counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
COORDINATES = {"seed": 3, "stream": "box", "position": 7, "rows": np.arange(5), "views": 4, "count": 3}


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def slow_uniform(words_of_block: np.ndarray) -> list[float]:
    """53-bit doubles of the four words of a block, in plain integers."""
    whole = [int(word) for word in words_of_block]
    return [((whole[i] >> 5) * 2**26 + (whole[i + 1] >> 6)) / 2**53 for i in (0, 2)]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, output: str) -> None:
    first, second = words(key)
    got = philox4x32(np.array(words(counter), np.uint32), (first, second))
    assert got.dtype == np.uint32
    assert got.tolist() == words(output)


def test_many_counters_are_answered_like_each_alone() -> None:
    counters = np.array([words(counter) for counter, _, _ in KNOWN_ANSWERS], np.uint32)
    together = philox4x32(counters, (1, 2))
    assert np.array_equal(together, [philox4x32(counter, (1, 2)) for counter in counters])


def test_uniform_is_philox_of_the_documented_counter() -> None:
    import hashlib

    digest = hashlib.sha256(b"3:box").digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    position = 5 + (9 << 32)
    got = uniform(3, "box", position, np.array([8]), views=3, count=3)
    for view in range(3):
        blocks = [philox4x32(np.array([view << 16 | block, 8, 5, 9], np.uint32), key) for block in range(2)]
        expected = slow_uniform(blocks[0]) + slow_uniform(blocks[1])[:1]
        assert got[0, view].tolist() == expected


@settings(max_examples=50)
@given(
    rows=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12, unique=True),
    cut=st.integers(0, 12),
    position=st.integers(0, 2**64 - 1),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_cutting_and_reordering_rows_changes_nothing(
    rows: list[int], cut: int, position: int, seed: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    whole = uniform(seed, "box", position, np.array(rows, np.int64), 3, 5)
    parts = [np.array(part, np.int64) for part in (rows[:cut], rows[cut:])]
    assert np.array_equal(whole, np.concatenate([uniform(seed, "box", position, part, 3, 5) for part in parts]))
    shuffled = np.array(rows, np.int64)[order]
    assert np.array_equal(whole[order], uniform(seed, "box", position, shuffled, 3, 5))


def test_more_views_or_a_larger_count_leave_the_first_ones() -> None:
    small = uniform(**COORDINATES)
    large = uniform(**COORDINATES | {"views": 9, "count": 8})
    assert np.array_equal(small, large[:, :4, :3])


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"stream": "flip"}, {"position": 8}, {"position": 7 + 2**32}, {"rows": np.arange(5, 10)}]
)
def test_every_coordinate_counts(change: dict) -> None:
    assert not np.any(uniform(**COORDINATES) == uniform(**COORDINATES | change))


def test_no_number_stands_twice() -> None:
    drawn = np.concatenate([uniform(**COORDINATES | {"position": position}).ravel() for position in range(200)])
    assert len(np.unique(drawn)) == len(drawn)


def test_equal_coordinates_give_equal_numbers() -> None:
    assert np.array_equal(uniform(**COORDINATES), uniform(**COORDINATES))


def test_numbers_are_uniform_and_uncorrelated() -> None:
    drawn = uniform(0, "test", 0, np.arange(2000), 10, 5)
    assert drawn.shape == (2000, 10, 5)
    assert drawn.dtype == np.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    chi_square = ((counts - drawn.size / 100) ** 2 / (drawn.size / 100)).sum()
    assert chi_square < 160  # 99 degrees of freedom: above in 1 of 10 000 random draws
    correlations = np.corrcoef(drawn.reshape(2000, 50), rowvar=False)
    assert np.abs(correlations - np.eye(50)).max() < 0.12


@pytest.mark.parametrize(
    "change",
    [
        {"position": -1},
        {"position": 2**64},
        {"rows": np.array([-1])},
        {"rows": np.array([2**32])},
        {"rows": np.array([0.5])},
        {"rows": np.zeros((2, 2), int)},
        {"views": 2**16},
        {"count": 2**17},
    ],
)
def test_coordinates_that_would_repeat_others_are_refused(change: dict) -> None:
    with pytest.raises(ValueError):
        uniform(**COORDINATES | change)
