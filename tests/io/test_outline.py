"""Which pixels an outline encloses: exactly, against a slow rule of its own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_io.outline import enclosed

SIZE = 9
corners = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)), min_size=1, max_size=12)


def _on_edge(y: int, x: int, a: tuple[int, int], b: tuple[int, int]) -> bool:
    cross = (b[0] - a[0]) * (x - a[1]) - (b[1] - a[1]) * (y - a[0])
    return cross == 0 and min(a[0], b[0]) <= y <= max(a[0], b[0]) and min(a[1], b[1]) <= x <= max(a[1], b[1])


def _slowly(y: int, x: int, points: list[tuple[int, int]]) -> bool:
    """Even-odd rule by a ray just below the row, to the right."""
    edges = list(zip(points, points[1:] + points[:1], strict=True))
    if any(_on_edge(y, x, a, b) for a, b in edges):
        return False
    crossings = 0
    for a, b in edges:
        low, high = min(a, b), max(a, b)
        if low[0] <= y < high[0]:
            # right of the pixel, where (high - low) x (pixel - low) is of one sign
            crossings += (high[0] - low[0]) * (x - low[1]) < (high[1] - low[1]) * (y - low[0])
    return crossings % 2 == 1


@given(corners)
def test_every_pixel_is_where_the_slow_rule_has_it(points: list[tuple[int, int]]):
    expected = [[_slowly(y, x, points) for x in range(SIZE)] for y in range(SIZE)]
    np.testing.assert_array_equal(enclosed(np.array(points), (SIZE, SIZE)), expected)


@given(corners, st.integers(0, 11), st.booleans())
def test_where_an_outline_begins_and_which_way_it_runs_changes_nothing(
    points: list[tuple[int, int]], start: int, backwards: bool
):
    turned = np.roll(np.array(points), start, axis=0)
    turned = turned[::-1] if backwards else np.concatenate([turned, turned[:1]])
    np.testing.assert_array_equal(enclosed(turned, (SIZE, SIZE)), enclosed(np.array(points), (SIZE, SIZE)))


def test_the_outline_itself_is_outside():
    inside = enclosed(np.array([(1, 1), (1, 5), (4, 5), (4, 1)]), (6, 8))
    expected = np.zeros((6, 8), bool)
    expected[2:4, 2:5] = True
    np.testing.assert_array_equal(inside, expected)


@pytest.mark.parametrize("points", [[(0, 0), (6, 0)], [(0, 8)], [(-1, 0)], np.zeros((0, 2)), np.zeros((3, 3))])
def test_what_is_no_outline_of_the_matrix_is_refused(points: object):
    with pytest.raises(ValueError, match="outline"):
        enclosed(np.array(points), (6, 8))
