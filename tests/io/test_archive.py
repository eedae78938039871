"""Zip archives read in place: the same series as on disk; hostile names, sizes, bombs, damage, encryption."""

import io
import random
import resource
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels.encoders import RLELosslessEncoder
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless

from dinox_io import archive
from dinox_io.archive import ArchiveError, open_binary
from dinox_io.discover import FoundFile, FoundSeries, Grouper, scan, walk
from dinox_io.hounsfield import volume_digest
from dinox_io.pack import PackSettings, pack
from dinox_io.progress import ProgressReport
from dinox_io.series import SeriesRules, read_series
from dinox_io.volume import Rejection, Volume
from tests.io.dicom_factory import expected_hu, stored_slice, write_series
from tests.io.series_reading import PATIENT, SERIES

KEY = b"0123456789abcdef"
METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as target:
        for name, data in files.items():
            target.writestr(name, data)
    return path


def series_files(folder: Path, count: int = 5, **options: Any) -> dict[str, bytes]:
    return {f"CT/{path.name}": path.read_bytes() for path in write_series(folder, count, **options)}


def zipped_series(folder: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    return write_zip(folder / "in" / "download", series_files(folder / "files"), method)


def found(*inputs: Path) -> tuple[list[FoundSeries], dict[str, list[FoundFile]]]:
    """(series, foreign files by code), archives opened."""
    grouper = Grouper(KEY)
    pending = list(walk(inputs, without=Path("/nowhere")))
    while pending:
        scanned = scan([pending.pop()])[0]
        pending += scanned.members
        if not scanned.members:
            grouper.add(scanned)
    foreign: dict[str, list[FoundFile]] = {}
    for code, file in grouper.foreign:
        foreign.setdefault(code, []).append(file)
    return grouper.result(), foreign


def read(series: FoundSeries) -> tuple[list[Volume], list[Rejection]]:
    paths = [Path(file.path) for file in series.files]
    return read_series(paths, series=SERIES, patient=PATIENT, rules=SeriesRules())


# ---------------------------------------------------------------------------------------------- what is in


@pytest.mark.parametrize("method", METHODS)
def test_a_series_in_an_archive_is_that_series(tmp_path: Path, method: int) -> None:
    zipped_series(tmp_path, method)
    (series,), foreign = found(tmp_path / "in")
    (outside,), _ = found(tmp_path / "files")
    assert (series.series, series.patient, foreign) == (outside.series, outside.patient, {})
    volumes, rows = read(series)
    assert np.array_equal(volumes[0].hu, expected_hu(5))
    assert rows == []
    assert volumes[0].facts == read(outside)[0][0].facts


def test_packing_archives_and_folders_together(tmp_path: Path) -> None:
    files = series_files(tmp_path / "files", 6)
    names = list(files)
    write_zip(tmp_path / "in/one.zip", {name: files[name] for name in names[:4]} | {"LICENSE": b"text"})
    write_zip(tmp_path / "in/two.bin", {names[4]: files[names[4]]})
    (tmp_path / "in/last").write_bytes(files[names[5]])
    report = pack(PackSettings(inputs=(tmp_path / "in",), output=tmp_path / "out"), ProgressReport(io.StringIO()))
    assert report.manifest is not None
    assert [volume["digest"] for volume in report.manifest["volumes"]] == [volume_digest(expected_hu(6))]
    assert (report.exit_code, [row["code"] for row in report.rejected]) == (0, ["NOT_DICOM"])
    assert "one.zip/CT/000.dcm" in (tmp_path / "out/private/sources.jsonl").read_text()
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["last", "one.zip", "two.bin"]


def test_names_are_labels_and_nothing_else(tmp_path: Path) -> None:
    files = list(series_files(tmp_path / "files", 8).values())
    names = ["/etc/passwd", "../../up.dcm", "a//b/./c", "same", "same", "ä\nö", "x" * 5000, "..", "folder/"]
    path = tmp_path / "in/a.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two of one name
        for name, data in zip(names, [*files, b""], strict=True):
            target.writestr(name, data)
    (series,), foreign = found(path)
    assert foreign == {}
    labels = {file.path.removeprefix(f"{path}/") for file in series.files}
    assert {"etc/passwd", "up.dcm", "a/b/c", "same", "ä\nö", "member"} < labels
    assert len(labels) == 8
    assert all(str(Path(file.path)) == file.path for file in series.files)
    assert np.array_equal(read(series)[0][0].hu, expected_hu(8))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["files", "in"]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("before", "behind"), [(b"MZ" + bytes(7000), b"signature" * 900), (b"#!/bin/sh\n", b""), (b"any text", b"")]
)
@pytest.mark.parametrize("wide", [False, True])
def test_an_archive_behind_other_bytes_is_that_archive(
    tmp_path: Path, before: bytes, behind: bytes, counted: bool, wide: bool
) -> None:
    """`counted`: its offsets are of the whole file, as programs that make such files may mend them."""
    files = series_files(tmp_path / "files")
    path = tmp_path / "in/viewer.bin"
    path.parent.mkdir()
    path.write_bytes(before if counted else b"")
    with zipfile.ZipFile(path, "a") as target:
        for name, data in files.items():
            target.writestr(name, data)
    data = path.read_bytes() if counted else before + path.read_bytes()
    path.write_bytes((as_zip64(data, 0 if counted else len(before)) if wide else data) + behind)
    (series,), foreign = found(tmp_path / "in")
    assert (len(series.files), foreign) == (5, {})
    assert np.array_equal(read(series)[0][0].hu, expected_hu(5))


def as_zip64(data: bytes, before: int) -> bytes:
    """With the place of the directory in a zip64 record (4.3.14, 4.3.15); `before`: bytes that offsets do not count."""
    end = data.rindex(b"PK\x05\x06")
    entries, size, at = struct.unpack_from("<HLL", data, end + 10)
    record = struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, size, at)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end - before, 1)
    tail = struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:end] + record + locator + tail


def test_a_program_is_no_archive_because_it_names_one(tmp_path: Path) -> None:
    (tmp_path / "unzip.exe").write_bytes(b"MZ" + bytes(200) + b"PK\x01\x02 PK\x05\x06" + bytes(300))
    (tmp_path / "notes").write_bytes(b"PK\x05\x06 is the signature")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes(b"text" + b"PK\x05\x06" + b"\xff" * 18)
    series, foreign = found(tmp_path)
    assert series == []
    codes = {Path(file.path).name: code for code, files in foreign.items() for file in files}
    assert codes == {"unzip.exe": "NOT_DICOM", "empty": "NOT_DICOM", "cut": "NOT_DICOM", "notes": codes["notes"]}


def test_an_archive_of_no_scans_is_one_foreign_file(tmp_path: Path) -> None:
    document = write_zip(tmp_path / "in/letter.docx", {"[Content_Types].xml": b"<x/>", "word/document.xml": b"<w/>"})
    write_zip(tmp_path / "in/empty.zip", {})
    files = {"letter.docx": document.read_bytes(), "inner.zip": zipped_series(tmp_path / "other").read_bytes()}
    write_zip(tmp_path / "in/outer.zip", files)
    series, foreign = found(tmp_path / "in")
    assert series == []
    names = {code: sorted(Path(file.path).name for file in files) for code, files in foreign.items()}
    assert names == {"NOT_DICOM": ["empty.zip", "letter.docx", "letter.docx"], "ARCHIVE_UNSUPPORTED": ["inner.zip"]}


def test_archives_that_are_not_opened_are_said(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(write_series(tmp_path / "x", 1)[0])
    (tmp_path / "b").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(200))
    (tmp_path / "c").write_bytes(b"Rar!\x1a\x07\x01" + bytes(200))
    write_zip(tmp_path / "d.zip", {"one.dcm": b"x" * 100}, zipfile.ZIP_BZIP2)
    _, foreign = found(*(tmp_path / name for name in ("a.tar", "b", "c", "d.zip")))
    assert [code for code, files in foreign.items() for _ in files] == ["ARCHIVE_UNSUPPORTED"] * 4


def test_zip64_and_data_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

    files = series_files(tmp_path / "files")
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    wide = write_zip(tmp_path / "wide.zip", files)
    assert b"PK\x06\x06" in wide.read_bytes()
    monkeypatch.undo()
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in files.items():
            with target.open(name, "w") as member:
                member.write(data)
    (tmp_path / "pipe.zip").write_bytes(pipe.getvalue())
    for name in ("wide.zip", "pipe.zip"):
        (series,), foreign = found(tmp_path / name)
        assert foreign == {}
        assert np.array_equal(read(series)[0][0].hu, expected_hu(5))


def test_an_archive_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"x": b"old"})
    with open_binary(path / "x") as before:
        write_zip(tmp_path / "b.zip", {"x": b"other", "y": b""}).replace(path)
        with open_binary(path / "x") as after:
            assert (after.read(), before.read()) == (b"other", b"old")


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300), method=st.sampled_from(METHODS), seed=st.integers(0, 1 << 30))
def test_a_member_reads_like_a_file(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, method: int, seed: int
) -> None:
    data = data * random.Random(seed).choice([1, 100, 1000])
    path = write_zip(tmp_path_factory.mktemp("zip") / "a.zip", {"x": data}, method)
    rng = random.Random(seed)
    with open_binary(path / "x", whole=bool(seed % 2)) as member, io.BytesIO(data) as file:
        for _ in range(12):
            at, size = rng.randrange(len(data) + 9), rng.choice([0, 1, 5, 5000, 70000, -1])
            assert member.seek(at) == file.seek(at)
            assert member.read(size) == file.read(size)
            assert member.tell() == file.tell() or at > len(data)
        assert member.seek(-len(data), io.SEEK_END) == 0
        assert member.read() == data


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless])
def test_other_encodings_in_an_archive(tmp_path: Path, syntax: str) -> None:
    def change(index: int, dataset: Dataset) -> None:
        if syntax == RLELossless:
            dataset.compress(RLELosslessEncoder.UID, stored_slice(index), generate_instance_uid=False)
        elif syntax == ExplicitVRBigEndian:
            dataset.PixelData = stored_slice(index).astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax

    (series,), _ = found(write_zip(tmp_path / "a.zip", series_files(tmp_path / "files", change=change)))
    assert np.array_equal(read(series)[0][0].hu, expected_hu(5))


# ---------------------------------------------------------------------------------------------- hostile


def test_encrypted_members_are_said(tmp_path: Path) -> None:
    path = zipped_series(tmp_path)
    data = bytearray(path.read_bytes())
    for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.index(magic)
        data[place + at] |= 1
    path.write_bytes(data)
    (series,), foreign = found(path)
    assert len(series.files) == 4
    assert {code: len(files) for code, files in foreign.items()} == {"ARCHIVE_ENCRYPTED": 1}


@pytest.mark.parametrize("method", METHODS)
def test_a_flipped_bit_never_becomes_a_pixel(tmp_path: Path, method: int) -> None:
    path = zipped_series(tmp_path, method)
    data = path.read_bytes()
    rng = random.Random(method)
    damaged = 0
    for _ in range(120):
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        series, foreign = found(path)
        for one in series:
            volumes, rows = read(one)
            damaged += any(row.code == "ARCHIVE_DAMAGED" for row in rows)
            assert volumes or rows
            # A slice whose header or UID was hit is told of, or is of another series, as it would be on disk.
            if volumes and not foreign and len(series) == 1:
                assert np.array_equal(volumes[0].hu, expected_hu(5))
            for hu in volumes[0].hu if volumes else ():
                assert any(np.array_equal(hu, true) for true in expected_hu(5))
        assert series or foreign
    assert damaged


def test_a_cut_archive_is_damaged(tmp_path: Path) -> None:
    path = zipped_series(tmp_path)
    data = path.read_bytes()
    for length in [*range(4, len(data), 211), len(data) - 1]:
        path.write_bytes(data[:length])
        series, foreign = found(path)
        assert (series, {code: len(files) for code, files in foreign.items()}) == ([], {"ARCHIVE_DAMAGED": 1}), length


def patched(path: Path, at: int, value: int) -> None:
    """Change a 4-byte field of the only directory entry."""
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02") + at
    data[place : place + 4] = struct.pack("<L", value)
    path.write_bytes(data)


@pytest.mark.parametrize("declared", [10, 99_999, 100_001, 50_000_000, 0xFFFFFFFE])
def test_a_declared_size_that_is_wrong_is_damage(tmp_path: Path, declared: int) -> None:
    path = write_zip(tmp_path / "a.zip", {"x": random.Random(1).randbytes(1000) * 100})
    patched(path, 24, declared)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArchiveError, match="ARCHIVE_DAMAGED"):
        open_binary(path / "x", whole=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 30 * 1024


def test_a_member_beyond_the_limit_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped_series(tmp_path)
    monkeypatch.setattr(archive, "MEMBER_BYTES_MAX", 1000)
    with pytest.raises(ArchiveError, match="ARCHIVE_UNSUPPORTED"):
        open_binary(path / "CT/000.dcm", whole=True)
    with open_binary(path / "CT/000.dcm") as member, pytest.raises(ArchiveError, match="ARCHIVE_UNSUPPORTED"):
        member.read()


def test_a_bomb_is_inflated_as_far_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target, target.open("x", "w") as member:
        member.write(write_series(tmp_path / "x", 1)[0].read_bytes())
        for _ in range(100):
            member.write(bytes(1_000_000))
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (series,), _ = found(path)
    assert len(series.files) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 30 * 1024


def test_members_that_share_their_bytes_are_damage(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"x": random.Random(1).randbytes(1000)})
    data = path.read_bytes()
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry = data[start:end]
    tail = bytearray(data[end:])
    struct.pack_into("<HHL", tail, 8, 9, 9, 9 * len(entry))
    path.write_bytes(data[:start] + entry * 9 + tail)
    with pytest.raises(ArchiveError, match="ARCHIVE_DAMAGED"):
        archive.members(str(path))


def test_a_directory_of_too_many_members_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "a.zip", {str(number): b"" for number in range(6)})
    monkeypatch.setattr(archive, "MEMBERS_MAX", 5)
    with pytest.raises(ArchiveError, match="ARCHIVE_DAMAGED"):
        archive.members(str(path))


def test_a_path_below_no_archive_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no archive")
    with pytest.raises(ArchiveError):
        open_binary(tmp_path / "file/x")
    with pytest.raises(FileNotFoundError):
        open_binary(tmp_path / "none/x")


def test_a_decoder_that_wants_a_file_gets_one_in_memory(tmp_path: Path, shared_data: Path) -> None:
    pytest.importorskip("gdcm")
    folder = shared_data / "transfer_syntaxes/JPEGProcess2_4TransferSyntax"
    path = write_zip(tmp_path / "a.zip", {one.name: one.read_bytes() for one in folder.iterdir()})
    (series,), _ = found(path)
    (outside,), _ = found(folder)
    rules = SeriesRules(min_slices=1)
    inside, beside = (
        read_series([Path(file.path) for file in one.files], series=SERIES, patient=PATIENT, rules=rules)
        for one in (series, outside)
    )
    assert beside[0]
    assert volume_digest(inside[0][0].hu) == volume_digest(beside[0][0].hu)
