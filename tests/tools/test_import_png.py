"""A PNG set of DINO-X, from its table to shards: encodings, moved trees, patients, tables that say nonsense."""

import csv
import json
from pathlib import Path
from typing import Any

import import_png
import numpy as np
import pytest
from PIL import Image

from dinox_io import open_shards
from dinox_io.hounsfield import volume_digest
from dinox_io.output import PackError
from dinox_io.png_index import patients_of, read_index
from dinox_io.privacy import pseudonym
from tests.io.kept_pools import Pools, pools  # noqa: F401 (a fixture)

KEY = b"sixteen bytes or more"
COLUMNS = ["png_path", "series_dir", "slice_index", "encoding", "spacing_x", "spacing_y", "spacing_z"]
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def kept_workers(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Starting Python for each command would take most of the time."""
    monkeypatch.setattr("import_png.WorkerPool", pools.lend)
    monkeypatch.setattr("dinox_io.pack.WorkerPool", pools.lend)


def hu_of(seed: int, depth: int = 4, rows: int = 14, columns: int = 20) -> np.ndarray:
    """int16 (z, y, x): a body in air."""
    hu = np.random.default_rng(seed).integers(-200, 1500, (depth, rows, columns), dtype=np.int16)
    hu[:, :3] = -1000
    return hu


def series_dir(patient: int, raw: str = "data/raw/LIDC-IDRI") -> str:
    return f"{raw}/LIDC-IDRI-{patient:04d}/1.2.{patient}/1.2.{patient}.3"


def png_tree(
    top: Path, volumes: dict[str, np.ndarray], *, steps: int = 1, written_to: str | None = None
) -> Rows:  # fmt: skip
    """Write volumes as DINO-X does, and return the rows of its table; `written_to`: the folder that the rows name."""
    rows: Rows = []
    for name, hu in volumes.items():
        folder = f"lidc-idri/{name.replace('/', '_')}"
        (top / folder).mkdir(parents=True)
        for index, slice_hu in enumerate(hu):
            stored = np.clip(np.rint(np.clip(slice_hu, -1000, 4000) * float(steps)) + 32768, 0, 65535)
            file = f"{folder}/slice_{index:04d}.png"
            Image.fromarray(stored.astype(np.uint16)).save(top / file)
            rows.append({
                "png_path": f"{written_to or top}/{file}", "series_dir": name, "slice_index": index,
                "encoding": "hu16_i16_offset32768_clip-1000_4000", "spacing_x": "0.700000", "spacing_y": "0.700000",
                "spacing_z": "2.500000",
            })  # fmt: skip
    return rows


def write_table(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(KEY)
    return path


def run(table: Path, out: Path, key_file: Path, *more: object, encoding: str = "x1") -> int:
    options = ["--encoding", encoding, "--output", out, "--workers", 1, "--key-file", key_file, *more]
    return import_png.main([str(table), *map(str, options)])


def codes(out: Path) -> list[str]:
    return [json.loads(line)["code"] for line in (out / "rejected.jsonl").read_text().splitlines()]


def public_bytes(out: Path) -> bytes:
    return b"".join(
        path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and "private" not in path.parts
    )


@pytest.mark.parametrize(("encoding", "steps"), [("x1", 1), ("x10", 10)])
def test_both_encodings_give_the_digests_of_what_was_stored(
    tmp_path: Path, key_file: Path, encoding: str, steps: int
) -> None:
    volumes = {series_dir(patient): hu_of(patient) for patient in (1, 2, 3)}
    table = write_table(tmp_path / "png/lidc-idri/index.csv", png_tree(tmp_path / "png", volumes, steps=steps))
    out = tmp_path / "out"
    assert run(table, out, key_file, encoding=encoding) == 0
    with open_shards(out) as shards:
        assert {volume.digest for volume in shards.volumes} == {volume_digest(hu) for hu in volumes.values()}
        # As for a PatientID: the same patient in a set of the same key that was packed from DICOM.
        assert {volume.patient for volume in shards.volumes} == {
            pseudonym(KEY, "patient", f"LIDC-IDRI-{patient:04d}\0") for patient in (1, 2, 3)
        }
        assert {volume.spacing_mm for volume in shards.volumes} == {(2.5, 0.7, 0.7)}
        assert shards.facts(0)["stored_as"] == encoding
        assert shards.facts(0)["geometry"] == "assumed"
    assert b"LIDC-IDRI-" not in public_bytes(out)
    before = public_bytes(out)
    assert run(table, out, key_file, encoding=encoding) == 0
    assert public_bytes(out) == before


def test_the_bytes_do_not_depend_on_rows_or_workers(tmp_path: Path, key_file: Path) -> None:
    rows = png_tree(tmp_path / "png", {series_dir(patient): hu_of(patient) for patient in (1, 2, 3)})
    for name, order, workers in (("one", rows, 1), ("two", rows[::-1], 2)):
        table = write_table(tmp_path / f"{name}.csv", order)
        assert run(table, tmp_path / name, key_file, "--workers", workers) == 0
    assert public_bytes(tmp_path / "one") == public_bytes(tmp_path / "two")


@pytest.mark.parametrize(("chosen", "steps", "right"), [("x1", 10, "x10"), ("x10", 1, "x1")])
def test_the_wrong_encoding_is_refused_and_the_other_one_named(
    tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str], chosen: str, steps: int, right: str
) -> None:
    volumes = {series_dir(patient): hu_of(patient) for patient in (1, 2)}
    table = write_table(tmp_path / "index.csv", png_tree(tmp_path, volumes, steps=steps))
    assert run(table, tmp_path / "out", key_file, encoding=chosen) == 2
    said = capsys.readouterr().err
    assert f"not stored as {chosen}" in said
    assert f"--encoding {right} fits them" in said
    assert not (tmp_path / "out").exists()


def test_a_table_of_both_encodings_loses_the_series_of_the_other(tmp_path: Path, key_file: Path) -> None:
    rows = png_tree(tmp_path, {series_dir(1): hu_of(1)}, steps=1)
    rows += png_tree(tmp_path, {series_dir(2): hu_of(2)}, steps=10)
    table = write_table(tmp_path / "index.csv", rows)
    assert run(table, tmp_path / "out", key_file) == 3
    assert codes(tmp_path / "out") == ["WRONG_ENCODING"]
    with open_shards(tmp_path / "out") as shards:
        assert [volume.digest for volume in shards.volumes] == [volume_digest(hu_of(1))]


def test_encoding_must_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        import_png.main(["index.csv", "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "--encoding" in capsys.readouterr().err


@pytest.mark.parametrize("written_to", ["/gone/with/the/old/machine", "data/processed", "D:\\data\\processed"])
def test_a_tree_that_moved_is_found(tmp_path: Path, key_file: Path, written_to: str) -> None:
    rows = png_tree(tmp_path / "png", {series_dir(1): hu_of(1)}, written_to=written_to)
    if "\\" in written_to:
        for row in rows:
            row["png_path"] = row["png_path"].replace("/", "\\")
    beside = write_table(tmp_path / "png/_index/index.csv", rows)
    elsewhere = write_table(tmp_path / "tables/here/index.csv", rows)
    assert run(beside, tmp_path / "one", key_file) == 0
    assert run(elsewhere, tmp_path / "two", key_file, "--root", tmp_path / "png") == 0
    assert public_bytes(tmp_path / "one") == public_bytes(tmp_path / "two")


def test_pictures_that_are_nowhere_are_a_usage_error(
    tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = png_tree(tmp_path / "png", {series_dir(1): hu_of(1)}, written_to="/gone")
    table = write_table(tmp_path / "far/away/index.csv", rows)
    assert run(table, tmp_path / "out", key_file) == 2
    said = capsys.readouterr().err
    assert "none of the 4 pictures" in said
    assert "--root" in said
    assert "LIDC-IDRI-" not in said
    assert run(table, tmp_path / "out", key_file, "--root", tmp_path / "nope") == 2
    assert capsys.readouterr().err == f"error: --root {tmp_path / 'nope'} does not exist\n"
    assert run(table, tmp_path / "out", key_file, "--root", table) == 2
    assert "is no folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_picture_that_is_missing_refuses_its_series(
    tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = png_tree(tmp_path, {series_dir(patient): hu_of(patient) for patient in (1, 2)})
    Path(rows[2]["png_path"]).unlink()
    assert run(write_table(tmp_path / "index.csv", rows), tmp_path / "out", key_file) == 3
    assert codes(tmp_path / "out") == ["FILE_UNREADABLE"]
    assert "FILE_UNREADABLE: it may be missing" in capsys.readouterr().out


def test_rows_that_are_missing_repeated_or_in_conflict(
    tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = png_tree(tmp_path, {series_dir(patient): hu_of(patient) for patient in (1, 2, 3, 4)})
    gap, conflict, shared = rows[1], rows[5], {**rows[9], "series_dir": series_dir(4)}
    table = [row for row in rows if row is not gap] + [{**conflict, "slice_index": 7}, shared, rows[0], rows[0]]
    assert run(write_table(tmp_path / "index.csv", table), tmp_path / "out", key_file) == 1
    assert sorted(codes(tmp_path / "out")) == ["INDEX_CONFLICT"] * 3 + ["SLICE_GAP"]
    assert "2 rows of the table repeat another one" in capsys.readouterr().out


def test_spacing_that_the_table_lacks_must_be_given(tmp_path: Path, key_file: Path) -> None:
    rows = png_tree(tmp_path, {series_dir(patient): hu_of(patient) for patient in (1, 2, 3)})
    for row in rows:
        if row["series_dir"] == series_dir(1):
            row["spacing_x"] = row["spacing_y"] = row["spacing_z"] = "1.000000"  # DINO-X's placeholder
        elif row["series_dir"] == series_dir(2):
            row["spacing_z"] = ""
    table = write_table(tmp_path / "index.csv", rows)
    assert run(table, tmp_path / "one", key_file) == 3
    assert codes(tmp_path / "one") == ["NO_PIXEL_SPACING"] * 2
    assert run(table, tmp_path / "two", key_file, "--spacing", "5,0.9,0.8") == 0
    with open_shards(tmp_path / "two") as shards:
        told = {volume.spacing_mm: shards.facts(volume)["spacing_from"] for volume in shards.volumes}
    assert told == {(5.0, 0.9, 0.8): "given", (2.5, 0.7, 0.7): "index"}


def test_the_writers_x_is_a_row_spacing_but_not_from_nifti(tmp_path: Path) -> None:
    base = {"png_path": "a/slice_0.png", "slice_index": 0, "spacing_x": 0.5, "spacing_y": 0.9, "spacing_z": 3}
    rows = [{**base, "series_dir": "raw/p/1.2.3"}, {**base, "png_path": "b/slice_0.png", "series_dir": "msd-colon_001"}]
    from_dicom, from_nifti = read_index(write_table(tmp_path / "index.csv", rows)).series
    assert from_dicom.spacings_mm == {(3.0, 0.5, 0.9)}
    assert from_nifti.spacings_mm == {(3.0, 0.9, 0.5)}


def test_patients_are_known_or_must_be_told(tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["scans/anna/1", "scans/anna/2", "scans/bert/1"]
    table = write_table(tmp_path / "index.csv", png_tree(tmp_path, {name: hu_of(n) for n, name in enumerate(names)}))
    assert run(table, tmp_path / "out", key_file) == 2
    said = capsys.readouterr().err
    assert "3 of 3 series, the first on line 2" in said
    assert "--patient-from" in said
    assert "anna" not in said
    assert not (tmp_path / "out").exists()
    assert run(table, tmp_path / "out", key_file, "--patient-from", "scans/([^/]+)/") == 0
    with open_shards(tmp_path / "out") as shards:
        patients = [volume.patient for volume in shards.volumes]
        assert {shards.facts(volume)["patient_from"] for volume in shards.volumes} == {"series_dir"}
    assert sorted(map(patients.count, set(patients))) == [1, 2]
    assert run(table, tmp_path / "out", key_file, "--patient-from", "anna") == 2
    assert run(table, tmp_path / "out", key_file, "--patient-from", "(") == 2


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("/d/LIDC-IDRI/LIDC-IDRI-0012/1.2/1.3", "LIDC-IDRI-0012"),
        ("d_LIDC-IDRI-0012_1.2_1.3", "LIDC-IDRI-0012"),
        ("d/LIDC-IDRI-00123/1.3", None),
        ("d/LIDC-IDRI-0012/LIDC-IDRI-0013", None),
        ("d/XLIDC-IDRI-0012/1.3", None),
    ],
)
def test_lidc_patients_stand_in_the_path(tmp_path: Path, name: str, patient: str | None) -> None:
    table = read_index(write_table(tmp_path / "i.csv", [{"png_path": "a/b.png", "series_dir": name, "slice_index": 0}]))
    if patient:
        assert patients_of(table) == [patient]
    else:
        with pytest.raises(PackError, match="names no LIDC-IDRI patient"):
            patients_of(table)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no column png_path"),
        ("a,b\n1,2\n", "has no column png_path"),
        ("png_path,series_dir,slice_index\n", "lists no picture"),
        ("png_path,series_dir,slice_index\na/b.png,s,0\na/c.png,s\n", "line 3 lacks"),
        ("png_path,series_dir,slice_index\na/b.png,s,0,1,2\n", "line 2 lacks"),
        ("png_path,series_dir,slice_index\na/b.png,s,-1\n", "line 2: slice_index"),
        ("png_path,series_dir,slice_index\na/b.png,s,2.0\n", "line 2: slice_index"),
        ("png_path,series_dir,slice_index\na/b.png,s,9999999\n", "line 2: slice_index"),
        ("png_path,series_dir,slice_index\n../b.png,s,1\n", "line 2: png_path"),
        ("png_path,series_dir,slice_index\na/,s,1\n", "line 2: png_path"),
        ('png_path,series_dir,slice_index\n"a"b,s,1\n', "no CSV table"),
        (f"png_path,series_dir,slice_index\n{'a' * 200_000},s,1\n", "no CSV table"),
        (b"png_path,series_dir,slice_index\n\xff/b.png,s,1\n", "no UTF-8"),
        (None, "there is no table"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(
    tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str], text: str | bytes | None, said: str
) -> None:
    table = tmp_path / "index.csv"
    if text is not None:
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run(table, tmp_path / "out", key_file) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", ["1,2", "a,b,c", "0,1,1", "1,1,101", "nan,1,1"])
def test_a_spacing_that_is_none(tmp_path: Path, key_file: Path, bad: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "index.csv", tmp_path / "out", key_file, "--spacing", bad)
    assert ended.value.code == 2


def test_help_is_for_newcomers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        import_png.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for part in ("--encoding", "--patient-from", "--spacing", "--root", "--key-file", "examples:", "exit code:", "x10"):
        assert part in text
