"""Marks of one nodule get one target: by what they share, whatever the order."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_io.labels import Mark, mark_of_mask
from dinox_io.targets import group_targets, overlap


def cube(z: int, y: int, x: int, size: int = 3, *, series: str = "s", target: int = 0, label: str = "nodule") -> Mark:
    """A mark of size x size x size voxels, slices 1.5 mm apart."""
    return mark_of_mask(
        np.ones((size, size, size), bool), z_mm=[1.5 * (z + number) for number in range(size)], corner=(y, x),
        series=series, label=label, reader="r", target=target, ratings={},
    )  # fmt: skip


def targets(*marks: Mark) -> list[int]:
    return [mark.target for mark in group_targets(marks)]


def test_overlap_is_handed_on_and_the_smallest_target_stays():
    assert targets(cube(0, 0, 0, target=9), cube(2, 2, 2, target=4), cube(4, 4, 4, target=6)) == [4, 4, 4]
    assert targets(cube(0, 0, 0, target=9), cube(4, 4, 4, target=6)) == [9, 6]


@pytest.mark.parametrize("apart", [(3, 0, 0), (0, 3, 0), (0, 0, 3)])
def test_marks_that_only_touch_are_two_things(apart: tuple[int, int, int]):
    assert targets(cube(0, 0, 0, target=1), cube(*apart, target=2)) == [1, 2]


def test_other_series_and_other_labels_are_other_things():
    marks = [cube(0, 0, 0, target=1), cube(0, 0, 0, target=2, series="t"), cube(0, 0, 0, target=3, label="vessel")]
    assert targets(*marks) == [1, 2, 3]


def test_a_target_that_marks_have_in_common_holds_them_together():
    marks = [cube(0, 0, 0, target=5), cube(0, 0, 0, target=5, series="t"), cube(1, 1, 1, target=2, series="t")]
    assert targets(*marks) == [2, 2, 2]


def test_voxels_count_where_both_have_a_mask_and_boxes_where_not():
    corners = np.zeros((1, 3, 3), bool)
    corners[0, 0, 0] = corners[0, 2, 2] = True
    a = mark_of_mask(corners, z_mm=[0], corner=(0, 0), series="s", label="n", reader="r", target=1, ratings={})
    b = mark_of_mask(~corners, z_mm=[0], corner=(0, 0), series="s", label="n", reader="r", target=2, ratings={})
    assert not overlap(a, b)
    assert targets(a, dataclasses.replace(b, mask=None)) == [1, 1]
    skips = mark_of_mask(
        np.ones((2, 3, 3), bool), z_mm=[-2, 2], corner=(0, 0), series="s", label="n", reader="r", target=3, ratings={}
    )
    assert not overlap(a, skips)  # its box goes through z = 0, its slices do not


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 3, st.integers(1, 4)), max_size=7), st.randoms())
def test_groups_are_those_of_the_slow_rule_in_any_order(places: list, random):
    marks = [cube(*place, target=number) for number, place in enumerate(places)]
    groups = [{number} for number in range(len(marks))]
    for first, second in itertools.combinations(range(len(marks)), 2):
        if all(abs(a - b) < (pb if a > b else pa) for a, b, pa, pb in _axes(places[first], places[second])):
            joined = groups[first] | groups[second]
            for number in joined:
                groups[number] = joined
    assert targets(*marks) == [min(group) for group in groups]
    shuffled = random.sample(marks, len(marks))
    found = {id(mark): new.target for mark, new in zip(shuffled, group_targets(shuffled), strict=True)}
    assert [found[id(mark)] for mark in marks] == [min(group) for group in groups]


def _axes(a: tuple, b: tuple) -> list[tuple[int, int, int, int]]:
    return [(a[axis], b[axis], a[3], b[3]) for axis in range(3)]
