"""NIfTI: what dcm2niix made of a series has its digest; other axes, types, damage, bombs; whose it is."""

import gzip
import hashlib
import io
import json
import math
import random
import re
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from dinox_io.discover import FoundFile, FoundSeries, Grouper, scan, walk
from dinox_io.hounsfield import volume_digest
from dinox_io.nifti import read_nifti
from dinox_io.pack import PackSettings, pack
from dinox_io.privacy import pseudonym
from dinox_io.progress import ProgressReport
from dinox_io.series import SeriesRules, read_series
from dinox_io.volume import Rejection, Volume
from tests.io.dicom_factory import ROWS, expected_hu, set_pixels, write_series
from tests.io.nifti_factory import AXIAL, as_dcm2niix, dcm2niix_affine, write_nifti
from tests.io.series_reading import PATIENT, SERIES, volume_of

pytest.importorskip("nibabel", reason="needs the extra dinox[nifti]")
KEY = b"0123456789abcdef"
ORIGIN_MM, SPACING_MM = (-10.0, -20.0, 0.0), (1.0, 0.7, 0.9)


def affine_of(hu: np.ndarray, directions: Any = AXIAL) -> np.ndarray:
    return dcm2niix_affine(hu.shape, SPACING_MM, ORIGIN_MM, directions)  # type: ignore[arg-type]


def simple(path: Path, hu: np.ndarray | None = None, **options: Any) -> Path:
    hu = expected_hu(5) if hu is None else hu
    return write_nifti(path, as_dcm2niix(hu), affine_of(hu), **options)


def read(*paths: Path, **rules: Any) -> tuple[list[Volume], list[Rejection]]:
    return read_nifti(paths, series=SERIES, patient=PATIENT, rules=SeriesRules(**rules))


def only(*paths: Path, **rules: Any) -> Volume:
    volumes, rows = read(*paths, **rules)
    assert len(volumes) == 1, rows
    return volumes[0]


def code(path: Path, **rules: Any) -> str:
    volumes, rows = read(path, **rules)
    assert not volumes
    return rows[0].code


# ---------------------------------------------------------------------------------------------- as the DICOM series


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_converted_series_is_that_series(tmp_path: Path, name: str, version: int, order: str) -> None:
    write_series(tmp_path / "dicom", 5)
    series = volume_of(tmp_path / "dicom")
    stored = as_dcm2niix(series.hu + 1024)
    affine = affine_of(series.hu)
    path = write_nifti(tmp_path / name, stored, affine, slope=1, intercept=-1024, version=version, order=order)
    volume = only(path)
    assert volume_digest(volume.hu) == volume_digest(series.hu)
    assert volume.spacing_mm == series.spacing_mm
    assert volume.z_positions_mm == series.z_positions_mm
    assert volume.orientation == series.orientation
    assert volume.facts["rescale"] == [1.0, -1024.0]
    assert (volume.facts["source"], volume.facts["affine_from"]) == ("nifti", "sform")


@pytest.mark.parametrize(
    ("slope", "intercept"), [("0.1", "-150"), ("0.3", "-3100.25"), ("0.7", "-1000"), ("2.5", "-1009.5")]
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_fractional_rescale_gives_the_digest_of_the_dicom_series(
    tmp_path: Path, slope: str, intercept: str, version: int
) -> None:
    stored = np.stack([np.arange(4000, 4000 + 140).reshape(10, 14) - 1000 * z for z in range(5)]).astype(np.uint16)

    def change(index: int, dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        set_pixels(dataset, stored[index] & 0xFFF)

    write_series(tmp_path / "dicom", 5, change=change)
    series = volume_of(tmp_path / "dicom")
    narrow: Any = {"slope": float(np.float32(slope)), "intercept": float(np.float32(intercept))}  # NIfTI-2 has 64 bits
    path = write_nifti(
        tmp_path / "a.nii",
        as_dcm2niix(stored.astype(np.int16) & 0xFFF),
        affine_of(series.hu),
        version=version,
        **narrow,
    )
    volume = only(path)
    assert volume_digest(volume.hu) == volume_digest(series.hu)
    assert volume.facts["rescale"] == [float(slope), float(intercept)]
    assert volume.facts["rounded"] == series.facts["rounded"]


def test_its_facts_are_those_that_are_documented(tmp_path: Path, repository: Path) -> None:
    section = (repository / "docs" / "format.md").read_text(encoding="utf-8").split("### Facts of NIfTI files\n")[1]
    cells = [line.split("|")[1] for line in section.split("\n### ")[0].splitlines() if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert only(simple(tmp_path / "a.nii")).facts.keys() == listed - {"patient_from"}


@pytest.mark.parametrize("flips", [(x, y, z) for x in (1, -1) for y in (1, -1) for z in (1, -1)])
def test_whatever_way_the_axes_run(tmp_path: Path, flips: tuple[int, int, int]) -> None:
    hu = expected_hu(5)
    stored = as_dcm2niix(hu)[:: flips[0], :: flips[1], :: flips[2]]
    affine = affine_of(hu)
    for axis, flip in enumerate(flips):
        if flip < 0:
            affine[:, 3] += affine[:, axis] * (stored.shape[axis] - 1)
            affine[:, axis] *= -1
    volume = only(write_nifti(tmp_path / "a.nii", stored, affine))
    assert np.array_equal(volume.hu, hu)
    assert volume.orientation == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert volume.z_positions_mm == (0.0, 1.0, 2.0, 3.0, 4.0)


def test_oblique_axes_are_kept_and_recorded(tmp_path: Path) -> None:
    hu, lean = expected_hu(5), math.radians(12)
    axes = ((1, 0, 0), (0, math.cos(lean), math.sin(lean)), (0, -math.sin(lean), math.cos(lean)))
    volume = only(write_nifti(tmp_path / "a.nii", as_dcm2niix(hu), affine_of(hu, axes)))
    assert np.array_equal(volume.hu, hu)
    assert volume.orientation == pytest.approx([*axes[0], *axes[1], *axes[2]], abs=1e-6)
    assert volume.facts["tilt_degrees"] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    ("directions", "expected"),
    [
        (((0, 1, 0), (0, 0, -1), (-1, 0, 0)), "NOT_AXIAL"),
        (((1, 0, 0), (0, 0, -1), (0, 1, 0)), "NOT_AXIAL"),
        (((1, 0, 0), (0, 1, 0), (0, 0.2, 0.98)), "GANTRY_TILT"),
        (((1, 0, 0), (0.2, 0.98, 0), (0, 0, 1)), "BAD_ORIENTATION"),
        (((1, 0, 0), (0, 1, 0), (0, 1, 0)), "BAD_ORIENTATION"),
    ],
)
def test_axes_that_are_refused(tmp_path: Path, directions: Any, expected: str) -> None:
    hu = expected_hu(5)
    path = write_nifti(tmp_path / "a.nii", as_dcm2niix(hu), affine_of(hu, directions), qform_code=0)
    assert code(path) == expected
    if expected == "GANTRY_TILT":
        assert only(path, allow_tilt=True).facts["tilt_degrees"] == pytest.approx(
            math.degrees(math.atan2(0.2, 0.98)), 1e-3
        )


def test_the_sform_comes_before_the_qform(tmp_path: Path) -> None:
    hu = expected_hu(5)
    moved = affine_of(hu)
    moved[2, 3] += 100
    path = write_nifti(tmp_path / "a.nii", as_dcm2niix(hu), moved)
    data = bytearray(path.read_bytes())
    both, other = only(path), write_nifti(tmp_path / "b.nii", as_dcm2niix(hu), affine_of(hu)).read_bytes()
    data[256:280] = other[256:280]  # the quaternion and offsets of the qform
    path.write_bytes(data)
    assert only(path).z_positions_mm == both.z_positions_mm == (100.0, 101.0, 102.0, 103.0, 104.0)
    data[254:256] = b"\0\0"  # sform_code
    path.write_bytes(data)
    volume = only(path)
    assert (volume.z_positions_mm[0], volume.facts["affine_from"]) == (0.0, "qform")
    assert volume_digest(volume.hu) == volume_digest(hu)
    data[252:254] = b"\0\0"
    path.write_bytes(data)
    assert code(path) == "NO_POSITION"


def test_real_series_as_dcm2niix_converts_them(shared_data: Path, tmp_path: Path) -> None:
    cases = json.loads((shared_data / "expected.json").read_text())["cases"]
    wanted = [case for case in cases if "LIDC" in case["path"] and len(case["expected_volumes"]) == 1]
    assert wanted
    for case in wanted:
        paths = sorted(path for path in (shared_data / case["path"]).rglob("*") if path.is_file())
        (series,), _ = read_series(paths, series=SERIES, patient=PATIENT, rules=SeriesRules(min_slices=1))
        x, y = series.orientation[:3], series.orientation[3:6]
        affine = dcm2niix_affine(
            series.hu.shape,  # type: ignore[arg-type]
            series.spacing_mm,
            (-170.3, -160.1, series.z_positions_mm[0]),
            (x, y, series.orientation[6:]),
        )
        path = write_nifti(tmp_path / "a.nii.gz", as_dcm2niix(series.hu), affine)
        volume = only(path, min_slices=1)
        assert volume_digest(volume.hu) == case["expected_volumes"][0]["sha256_hu_i16le"], case["id"]
        assert volume.orientation == series.orientation
        assert volume.spacing_mm == series.spacing_mm
        assert np.abs(np.subtract(volume.z_positions_mm, series.z_positions_mm)).max() < 0.002


# ---------------------------------------------------------------------------------------------- values


def test_no_slope_means_none(tmp_path: Path) -> None:
    for slope in (0.0, math.nan):
        volume = only(simple(tmp_path / "a.nii", slope=slope, intercept=7.0))
        assert np.array_equal(volume.hu, expected_hu(5))
        assert volume.facts["rescale"] == [1.0, 0.0]
    assert code(simple(tmp_path / "a.nii", slope=math.inf)) == "NO_RESCALE"
    assert code(simple(tmp_path / "a.nii", slope=1, intercept=math.nan)) == "NO_RESCALE"


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_real_numbers_are_rounded_and_that_is_said(tmp_path: Path, kind: Any) -> None:
    hu = expected_hu(5)
    volume = only(simple(tmp_path / "a.nii", hu.astype(kind)))
    assert np.array_equal(volume.hu, hu)
    assert volume.facts["rounded"] is False
    volume = only(simple(tmp_path / "a.nii", hu.astype(kind) + kind(0.25)))
    assert np.array_equal(volume.hu, hu)
    assert volume.facts["rounded"] is True
    volume = only(simple(tmp_path / "a.nii", np.where(hu == hu.max(), 1e6, hu).astype(kind)))
    assert volume.facts["saturated_voxels"] == int((hu == hu.max()).sum())
    holes = hu.astype(kind)
    holes[2, 3, 4:6] = math.nan, math.inf
    _, rows = read(simple(tmp_path / "a.nii", holes))
    assert (rows[0].code, rows[0].reason[-2:]) == ("VALUES_NOT_FINITE", " 2")


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint16, np.int32, np.uint32])
def test_integers_of_every_width(tmp_path: Path, kind: Any) -> None:
    info = np.iinfo(kind)
    values = np.random.default_rng(1).integers(max(info.min, -100), min(info.max, 3000), (4, 6, 5)).astype(kind)
    volume = only(simple(tmp_path / "a.nii", values, slope=2.0, intercept=-1000.0))
    assert np.array_equal(volume.hu, values.astype(int) * 2 - 1000)


@pytest.mark.parametrize("kind", [np.complex64, np.int64, np.uint64])
def test_types_that_are_no_ct(tmp_path: Path, kind: Any) -> None:
    assert code(simple(tmp_path / "a.nii", expected_hu(5).astype(kind))) == "NIFTI_TYPE"


@pytest.mark.parametrize("values", [np.arange(5 * 9 * 7) % 4, np.arange(5 * 9 * 7) * 12, np.linspace(-1, 1, 5 * 9 * 7)])
def test_masks_and_other_modalities_are_not_packed_as_ct(tmp_path: Path, values: np.ndarray) -> None:
    values = values.reshape(5, 9, 7)
    kind = np.float32 if values.dtype.kind == "f" else np.int16
    assert code(simple(tmp_path / "a.nii", values.astype(kind))) == "NOT_HU"


# ---------------------------------------------------------------------------------------------- sizes and damage


def test_one_volume_is_wanted(tmp_path: Path) -> None:
    hu = expected_hu(5)
    one, two = as_dcm2niix(hu)[..., None], np.stack([as_dcm2niix(hu)] * 2, axis=-1)
    assert np.array_equal(only(write_nifti(tmp_path / "a.nii", one, affine_of(hu))).hu, hu)
    assert code(write_nifti(tmp_path / "a.nii", two, affine_of(hu))) == "NIFTI_VOLUMES"


def test_few_slices_and_other_units_are_refused(tmp_path: Path) -> None:
    path = simple(tmp_path / "a.nii", expected_hu(2))
    assert code(path) == "TOO_FEW_SLICES"
    assert only(path, min_slices=2).hu.shape[0] == 2
    assert code(simple(tmp_path / "a.nii", xyzt_units=3)) == "NIFTI_UNITS"
    assert np.array_equal(only(simple(tmp_path / "a.nii", xyzt_units=0)).hu, expected_hu(5))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    path = simple(tmp_path / name)
    data = path.read_bytes()
    for length in [*range(0, len(data) - 1, 97), len(data) - 1]:
        path.write_bytes(data[:length])
        assert code(path) in ("PIXELS_TRUNCATED", "PIXELS_DAMAGED", "NIFTI_DAMAGED")


def test_a_flipped_bit_inside_gzip_is_found(tmp_path: Path) -> None:
    path = simple(tmp_path / "a.nii.gz")
    data = path.read_bytes()
    for at in range(20, len(data), 53):
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        volumes, rows = read(path)  # a bit that deflate does not use changes nothing
        assert rows or np.array_equal(volumes[0].hu, expected_hu(5))


def test_surplus_bytes_are_padding_only_if_few(tmp_path: Path) -> None:
    assert only(simple(tmp_path / "a.nii", surplus=bytes(64))).facts["surplus_bytes"] == 64
    assert code(simple(tmp_path / "a.nii", surplus=bytes(5000))) == "PIXELS_TOO_LONG"


@pytest.mark.parametrize(
    "dimensions", [(3, 30000, 30000, 30000), (3, 0, 5, 5), (3, -4, 5, 5), (9, 5, 5, 5), (3, 4000, 4000, 900)]
)
def test_hostile_sizes_are_refused_from_the_header(tmp_path: Path, dimensions: tuple[int, ...]) -> None:
    path = simple(tmp_path / "a.nii.gz", dim=[*dimensions, *[1] * (8 - len(dimensions))])
    assert code(path) in ("SIZE_REFUSED", "NIFTI_DAMAGED", "PIXELS_TRUNCATED")
    scanned = scan(list(walk([tmp_path], without=tmp_path / "none")))
    assert scanned[0].identity is not None  # a series, refused when it is read


def test_random_bytes_in_the_header_never_escape_the_rules(tmp_path: Path) -> None:
    path = simple(tmp_path / "a.nii")
    data, rng = path.read_bytes(), random.Random(7)
    for _ in range(250):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            changed[rng.choice([rng.randrange(348), rng.randrange(40, 124), rng.randrange(252, 328)])] = rng.randrange(
                256
            )
        path.write_bytes(changed)
        scan([FoundFile(str(path), len(data), str(tmp_path))])
        volumes, rows = read(path)  # must not raise
        assert volumes or rows


def test_in_a_zip_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as target:
        target.write(simple(tmp_path / "x.nii.gz"), "s7/ct.nii.gz")
    (archive,) = scan(list(walk([tmp_path / "a.zip"], without=tmp_path / "none")))
    (member,) = scan(archive.members)
    assert member.identity is not None
    assert (member.identity.patient_id, member.identity.patient_from) == ("s7", "folder")
    assert np.array_equal(only(Path(member.file.path)).hu, expected_hu(5))


def test_a_bomb_is_not_inflated_beyond_its_declared_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = simple(tmp_path / "a.nii.gz")
    inflated = gzip.decompress(path.read_bytes()) + bytes(30_000_000)
    path.write_bytes(gzip.compress(inflated, 1))
    most = 0
    real = gzip.GzipFile.read

    def counted(stream: gzip.GzipFile, size: int | None = -1) -> bytes:
        nonlocal most
        data = real(stream, size)
        most = max(most, stream.tell())
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    assert code(path) == "PIXELS_TOO_LONG"
    scan(list(walk([tmp_path], without=tmp_path / "none")))
    assert 0 < most < 100_000


def test_a_missing_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = simple(tmp_path / "a.nii")
    monkeypatch.setitem(__import__("sys").modules, "nibabel.nifti1", None)
    _, rows = read(path)
    assert rows[0].code == "NIFTI_READER_MISSING"
    assert "dinox[nifti]" in rows[0].hint


# ---------------------------------------------------------------------------------------------- finding


def group(*inputs: Path) -> tuple[list[FoundSeries], list[str]]:
    grouper = Grouper(KEY)
    for scanned in scan(list(walk(inputs, without=Path("/nowhere")))):
        grouper.add(scanned)
    return grouper.result(), sorted(code for code, _ in grouper.foreign)


def test_a_series_is_named_by_its_content(tmp_path: Path) -> None:
    simple(tmp_path / "in/a/1.nii")
    simple(tmp_path / "moved/a/b/2.nii.gz")
    simple(tmp_path / "moved/a/3.nii")
    (series,), _ = group(tmp_path / "in")
    (same,), _ = group(tmp_path / "moved")
    assert (series.series, len(same.files)) == (same.series, 2)
    name = f"content {hashlib.sha256((tmp_path / 'in/a/1.nii').read_bytes()).hexdigest()} of a"
    assert series.series == pseudonym(KEY, "series", name)
    assert series.identity.series_uid == name  # by which sources.jsonl and labels know it
    volumes, rows = read(*(Path(file.path) for file in same.files))
    assert volumes[0].facts["dropped"] == {"duplicate": 1}
    assert [(row.code, row.files) for row in rows] == [("DUPLICATE_DROPPED", 1)]


def test_pairs_and_other_gzip_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.hdr").write_bytes(b"\x5c\x01\0\0" + bytes(340) + b"ni1\0")
    (tmp_path / "notes.gz").write_bytes(gzip.compress(b"notes"))
    (tmp_path / "slice.dcm.gz").write_bytes(gzip.compress(write_series(tmp_path / "x", 1)[0].read_bytes()))
    shutil.rmtree(tmp_path / "x")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.dcm"), io.BytesIO())
    (tmp_path / "set.tgz").write_bytes(stream.getvalue())
    (tmp_path / "cut.gz").write_bytes(b"\x1f\x8b\x08")
    assert group(tmp_path) == (
        [],
        ["ARCHIVE_UNSUPPORTED", "ARCHIVE_UNSUPPORTED", "NIFTI_PAIR", "NOT_DICOM", "NOT_DICOM"],
    )


def test_a_folder_of_both_is_packed(tmp_path: Path) -> None:
    write_series(tmp_path / "in/P2", 5, patient="P2")
    simple(tmp_path / "in/P1/ct.nii.gz")
    simple(tmp_path / "in/P1/mask.nii.gz", (expected_hu(5) > 0).astype(np.uint8))
    settings = PackSettings(inputs=(tmp_path / "in",), output=tmp_path / "out")
    report = pack(settings, ProgressReport(io.StringIO()))
    assert report.manifest is not None
    assert report.exit_code == 0
    assert {volume["digest"] for volume in report.manifest["volumes"]} == {volume_digest(expected_hu(5))}
    assert [row["code"] for row in report.rejected] == ["NOT_HU"]
    assert len(report.manifest["volumes"]) == 2
    assert report.manifest["volumes"][0]["shape"] == [5, ROWS, expected_hu(5).shape[2]]
