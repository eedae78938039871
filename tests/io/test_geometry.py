"""Directions, order, gaps and tilt of slices, against plain definitions."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_io import geometry

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
angles = st.floats(-math.pi, math.pi)


def rotated(a: float, b: float, c: float) -> tuple[float, ...]:
    """Row and column direction of an axial image turned by three angles (about z, y, x)."""
    ca, sa, cb, sb, cc, sc = math.cos(a), math.sin(a), math.cos(b), math.sin(b), math.cos(c), math.sin(c)
    row = (ca * cb, sa * cb, -sb)
    column = (ca * sb * sc - sa * cc, sa * sb * sc + ca * cc, cb * sc)
    return (*row, *column)


@given(angles, angles, angles)
def test_directions_are_orthonormal_and_the_normal_points_to_the_head(a: float, b: float, c: float) -> None:
    directions = geometry.plane(rotated(a, b, c))
    for vector in (directions.row, directions.column, directions.normal):
        assert math.isclose(geometry.dot(vector, vector), 1, abs_tol=1e-6)
    assert abs(geometry.dot(directions.normal, directions.row)) < 1e-6
    assert abs(geometry.dot(directions.normal, directions.column)) < 1e-6
    assert directions.normal[2] >= 0
    assert 0 <= geometry.obliquity_degrees(directions) <= 90.0001
    assert directions.cosines == (*directions.row, *directions.column, *directions.normal)


def test_rows_bottom_to_top_still_ascend_to_the_head() -> None:
    flipped = geometry.plane((1, 0, 0, 0, -1, 0))
    assert flipped.normal == (0.0, 0.0, 1.0)
    assert flipped.cosines == (1, 0, 0, 0, -1, 0, 0, 0, 1)


@pytest.mark.parametrize("bad", [(1, 0, 0, 1, 0, 0), (2, 0, 0, 0, 1, 0), (0, 0, 0, 0, 0, 0), (1, 0, 0, 0.2, 1, 0)])
def test_directions_that_are_none_are_refused(bad: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="orthogonal"):
        geometry.plane(bad)


def test_tilt_is_the_angle_between_normal_and_stack() -> None:
    angle = math.radians(12)
    directions = geometry.plane((1, 0, 0, 0, math.cos(angle), math.sin(angle)))
    assert geometry.tilt_degrees([(0, 0, 0), (0, 0, 40)], directions) == pytest.approx(12)
    along = tuple(40 * value for value in directions.normal)
    assert geometry.tilt_degrees([(0, 0, 0), along], directions) == pytest.approx(0, abs=1e-6)


def test_shift_is_the_distance_from_the_straight_stack() -> None:
    directions = geometry.plane(AXIAL)
    sheared = [(0.0, 2.0 * z, 1.0 * z) for z in range(5)]
    assert geometry.shift_mm(sheared, directions) == pytest.approx(0)
    sheared[2] = (3.0, 8.0, 2.0)
    assert geometry.shift_mm(sheared, directions) == pytest.approx(5)


def test_one_position_holds_what_is_closer_than_a_hundredth() -> None:
    assert geometry.position_groups([0.0, 0.0, 1.0, 1.004, 2.0]) == [[0, 1], [2, 3], [4]]


def test_steps_may_differ_by_a_percent_or_a_fiftieth_millimetre() -> None:
    assert geometry.is_regular([0, 5, 10.05, 15.05])
    assert not geometry.is_regular([0, 5, 10.2, 15.2])
    assert geometry.is_regular([0, 0.5, 1.02, 1.52])
    assert not geometry.is_regular([0, 1, 2, 4, 5])
    assert geometry.is_regular([7.0])


@pytest.mark.parametrize("step", [0.012, 0.02, 0.03, 0.04])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_a_gap_is_one_however_fine_the_steps_are(step: float, count: int) -> None:
    heights = [step * index for index in range(count + 1)]
    assert geometry.is_regular(heights)
    assert not geometry.is_regular([*heights, heights[-1] + 2 * step])
    assert not geometry.is_regular([-2 * step, *heights])


@given(st.lists(st.sampled_from([0.5, 1.0, 1.004, 2.0, 2.5, 30.0]), max_size=14))
def test_runs_cover_every_slice_once_and_each_is_regular(steps: list[float]) -> None:
    heights = [0.0]
    for step in steps:
        heights.append(heights[-1] + step)
    runs = geometry.contiguous_runs(heights)
    assert [index for run in runs for index in run] == list(range(len(heights)))
    assert all(geometry.is_regular([heights[index] for index in run]) for run in runs)


@pytest.mark.parametrize(
    ("heights", "runs"),
    [
        ([0, 1, 2, 3, 5, 6, 7, 8], [(0, 4), (4, 8)]),
        ([0, 10, 11, 12, 13], [(0, 1), (1, 5)]),
        ([0, 1, 2, 3, 4, 6.5, 9, 11.5, 14], [(0, 5), (5, 9)]),
        ([0, 1, 2, 5, 8, 9, 10], [(0, 3), (3, 4), (4, 7)]),
    ],
)
def test_the_slice_at_a_border_belongs_to_the_longer_run(heights: list[float], runs: list[tuple[int, int]]) -> None:
    assert [(run.start, run.stop) for run in geometry.contiguous_runs(heights)] == runs


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.floats(0.3, 10))
def test_no_run_straddles_a_missing_slice(counts: list[int], step: float) -> None:
    """Slabs of slices one step apart, with one slice missing between slabs."""
    heights, height = [], 0.0
    for count in counts:
        for _ in range(count):
            heights.append(height)
            height += step
        height += step
    for run in geometry.contiguous_runs(heights):
        inside = [heights[index] for index in run]
        # A run over gaps may only be made of lone slices, two steps apart throughout.
        gaps = {round((b - a) / step) for a, b in pairwise(inside)}
        assert gaps in (set(), {1}, {2})
