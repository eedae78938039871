"""Labels: what is written is read again, in one spelling; what is no mark is refused with its line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dinox_io import labels, mask_runs
from dinox_io.labels import LabelError, Mark, MarkMask, mark_of_mask, read_labels, write_labels
from dinox_io.mask_runs import decode_mask, encode_mask

masks = npst.arrays(bool, npst.array_shapes(min_dims=3, max_dims=3, max_side=6))


def a_mark(mask: np.ndarray | None = None, **changes: Any) -> Mark:
    """A mark whose mask is a full box of 2 slices, 3 rows, 4 columns at row 5, column 6."""
    mask = np.ones((2, 3, 4), bool) if mask is None else mask
    members = {
        "z_mm": [-10.0 + 2.5 * number for number in range(len(mask))], "corner": (5, 6), "series": "1.2.840.1",
        "label": "nodule", "reader": "r1", "target": 7, "ratings": {"malignancy": 4, "score": 0.25},
    }  # fmt: skip
    return mark_of_mask(mask, **(members | changes))


@given(npst.arrays(bool, npst.array_shapes(min_dims=1, max_dims=3, max_side=6)))
def test_runs_rebuild_the_mask(mask: np.ndarray):
    encoded = encode_mask(mask)
    np.testing.assert_array_equal(decode_mask(encoded, mask.shape), mask)
    assert all(run > 0 for run in encoded[1:])


@pytest.mark.parametrize(
    ("encoded", "shape"),
    [
        ((3, 4), (2, 4)), ((8, 0), (2, 4)), ((-1, 9), (2, 4)), ((4.0, 4), (2, 4)), ((), (2, 4)), ((True, 7), (2, 4)),
        ((8,), (8, 0)), ((8,), (-2, -4)), ((8,), (2.0, 4)), ((1 << 40,), (1 << 20, 1 << 20)),
        ((1 << 200,), (1 << 100, 1 << 100)),
    ],
)  # fmt: skip
def test_runs_that_are_none_are_refused_before_anything_is_allocated(encoded: tuple, shape: tuple):
    with pytest.raises(ValueError, match=r"runs|shape"):
        decode_mask(encoded, shape)


@given(masks, st.integers(0, 500), st.integers(0, 500))
def test_a_mask_becomes_a_mark_that_holds_it(mask: np.ndarray, row: int, column: int):
    mark = a_mark(mask, corner=(row, column))
    z = [-10.0 + 2.5 * number for number in range(len(mask))]
    assert mark.box == (z[0], row, column, z[-1], row + mask.shape[1], column + mask.shape[2])
    assert mark.z_mm in z
    if not mask.any():
        assert mark.mask is None
        return
    assert mark.mask is not None
    np.testing.assert_array_equal(mark.mask.decode(), mask)
    center = np.argwhere(mask).mean(axis=0) * (2.5, 1, 1) + (-10.0, row, column)
    np.testing.assert_allclose(mark.center, center, atol=1e-3)
    assert abs(mark.z_mm - center[0]) <= min(abs(np.array(z) - center[0])) + 1e-5


@settings(max_examples=30)
@given(st.lists(masks, max_size=4), st.randoms())
def test_a_file_depends_on_its_marks_and_not_on_their_order(tmp_path_factory: Any, found: list, random: Any):
    folder = tmp_path_factory.mktemp("labels")
    marks = [a_mark(mask, target=number // 2, reader=f"r{number}") for number, mask in enumerate(found)]
    write_labels(folder / "sub" / "a.jsonl", marks)
    random.shuffle(marks)
    write_labels(folder / "b.jsonl", marks)
    assert (folder / "sub" / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()
    again = read_labels(folder / "b.jsonl")
    assert all(mark in marks for mark in again)
    assert len(again) == len(marks)


def test_a_line_is_the_object_of_the_format(tmp_path: Path):
    write_labels(tmp_path / "a.jsonl", [a_mark()])
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {
        "series": "1.2.840.1",
        "z_mm": -10.0,
        "center": [-8.75, 6.0, 7.5],
        "box": [-10.0, 5, 6, -7.5, 8, 10],
        "label": "nodule",
        "reader": "r1",
        "target": 7,
        "ratings": {"malignancy": 4, "score": 0.25},
        "mask": {"z_mm": [-10.0, -7.5], "shape": [2, 3, 4], "runs": [0, 24]},
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"series": "a patient's name"}, "series"),
        ({"reader": ""}, "reader"),
        ({"label": None}, "label"),
        ({"target": "7"}, "target"),
        ({"target": True}, "target"),
        ({"target": 1 << 60}, "target"),
        ({"z_mm": 3.0}, "z_mm"),
        ({"z_mm": None}, "z_mm"),
        ({"center": [-8.75, 6.0]}, "center"),
        ({"center": [-8.75, 60.0, 7.5]}, "center"),
        ({"center": {}}, "center"),
        ({"box": [-10.0, 5, 6, -7.5, 8]}, "box"),
        ({"box": [-10.0, 5.5, 6, -7.5, 8, 10]}, "box"),
        ({"box": [-10.0, 5, 6, -7.5, 5, 10]}, "box"),
        ({"box": [-10.0, -5, 6, -7.5, 8, 10]}, "box"),
        ({"box": [-10.0, 5, 6, -7.5, 8, 1 << 20]}, "box"),
        ({"ratings": []}, "ratings"),
        ({"ratings": {"malignancy": "4"}}, "ratings"),
        ({"ratings": {f"r{number}": 1 for number in range(65)}}, "ratings"),
        ({"mask": 1}, "mask"),
        ({"mask": {"shape": [2, 3, 4], "runs": [24]}}, "z_mm"),
        ({"mask": {"z_mm": [-10.0, -7.5], "shape": [2, 3, 4], "runs": [23]}}, "23 voxels"),
        ({"mask": {"z_mm": [-10.0, -7.5], "shape": [2, 4, 3], "runs": [24]}}, "shape"),
        ({"mask": {"z_mm": [-7.5, -10.0], "shape": [2, 3, 4], "runs": [24]}}, "ascend"),
        ({"mask": {"z_mm": [-10.0, -8.0], "shape": [2, 3, 4], "runs": [24]}}, "z of the box"),
        ({"mask": {"z_mm": ["a", "b"], "shape": [2, 3, 4], "runs": [24]}}, "positions"),
        ({"note": "new"}, "note"),
    ],
)
def test_a_line_that_is_no_mark_is_refused_by_its_number(change: dict, problem: str, tmp_path: Path):
    good = json.loads(json.dumps(a_mark().json()))
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(LabelError, match=rf"a\.jsonl: line 2: .*{problem}"):
        read_labels(tmp_path / "a.jsonl")


@pytest.mark.parametrize("line", [b"", b"[]", b"{", b'{"a": NaN}', b"\xff", b'{"z_mm": 1, "z_mm": 2}', b"[" * 99999])
def test_a_line_that_is_no_object_is_refused_by_its_number(line: bytes, tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(line + b"\n")
    with pytest.raises(LabelError, match="line 1"):
        read_labels(tmp_path / "a.jsonl")


def test_a_missing_member_is_named(tmp_path: Path):
    members = {name: value for name, value in a_mark().json().items() if name != "reader"}
    (tmp_path / "a.jsonl").write_text(json.dumps(members))
    with pytest.raises(LabelError, match="line 1: a mark misses reader"):
        read_labels(tmp_path / "a.jsonl")


def test_lines_and_marks_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_labels(tmp_path / "a.jsonl", [a_mark(), a_mark(target=8)])
    monkeypatch.setattr(labels, "MAX_MARKS", 1)
    with pytest.raises(LabelError, match="more than 1 marks"):
        read_labels(tmp_path / "a.jsonl")
    with pytest.raises(LabelError, match="more than 1"):
        write_labels(tmp_path / "b.jsonl", [a_mark(), a_mark()])
    monkeypatch.setattr(labels, "MAX_LINE_BYTES", 99)
    with pytest.raises(LabelError, match="longer than 99"):
        read_labels(tmp_path / "a.jsonl")
    with pytest.raises(LabelError, match="more than 99"):
        write_labels(tmp_path / "b.jsonl", [a_mark()])
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_mask_beyond_the_bound_is_refused_unread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mask_runs, "MAX_VOXELS", 23)
    with pytest.raises(LabelError, match="more than 23 voxels"):
        a_mark()


@pytest.mark.parametrize("name", ["../lidc", "a/b", "", ".hidden", "x" * 91])
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path):
    with pytest.raises(LabelError, match="cannot name labels"):
        labels.label_path(tmp_path, name)


def test_a_mask_may_skip_slices():
    mask = MarkMask(z_mm=(-10.0, 0.0), shape=(2, 3, 4), runs=(0, 24))
    mark = Mark(
        series="s", z_mm=-5.0, center=(-5.0, 6.0, 7.5), box=(-10.0, 5, 6, 0.0, 8, 10), label="nodule", reader="r",
        target=1, ratings={}, mask=mask,
    )  # fmt: skip
    assert mark.mask is not None
    assert mark.mask.decode().all()
