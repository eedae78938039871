"""What single DICOM files hold: pixels of every format, damage, bombs, and what is DICOM at all (faults F05 to F10)."""

import random
import resource
import zlib
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import get_decoder
from pydicom.pixels.encoders import RLELosslessEncoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from dinox_io import dicom
from dinox_io.fileformat import NotDicom, file_meta
from dinox_io.pixels import PixelReader
from dinox_io.rules import Refused
from tests.io.dicom_factory import (
    COLUMNS,
    ROWS,
    expected_hu,
    set_pixels,
    slice_dataset,
    stored_slice,
    write,
    write_series,
)
from tests.io.series_reading import code_of, read, volume_of

# ---------------------------------------------------------------------------------------------- pixels


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:  # F05
    def change(index: int, dataset: Dataset) -> None:
        dataset.RescaleIntercept = str(-1024 - index)
        dataset.BitsStored, dataset.HighBit = 16, 15
        set_pixels(dataset, stored_slice(index) + np.uint16(index))

    write_series(tmp_path, change=change)
    volume = volume_of(tmp_path)
    assert np.array_equal(volume.hu, expected_hu(5))
    assert volume.facts["rescale"][4] == [1.0, -1028.0]


@pytest.mark.parametrize("bits", [8, 10, 12, 13, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shift", [0, 2])
def test_bits_are_masked_shifted_and_sign_extended(tmp_path: Path, bits: int, signed: bool, shift: int) -> None:  # F05
    if bits + shift > 16:
        pytest.skip("does not fit")
    rng = np.random.default_rng(bits)
    low = -(1 << (bits - 1)) if signed else 0
    values = rng.integers(low, low + (1 << bits), (3, ROWS, COLUMNS))
    values[0, 0, :2] = low, low + (1 << bits) - 1

    def change(index: int, dataset: Dataset) -> None:
        rubbish = rng.integers(0, 1 << 16, (ROWS, COLUMNS)) & ~(((1 << bits) - 1) << shift)
        words = ((values[index] & ((1 << bits) - 1)) << shift) | rubbish
        set_pixels(dataset, words.astype(np.uint16))
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1 + shift, int(signed)
        dataset.RescaleIntercept = "0"

    write_series(tmp_path, 3, change=change)
    volume = volume_of(tmp_path)
    assert np.array_equal(volume.hu, np.clip(values, -32768, 32767))
    assert volume.facts["saturated_voxels"] == int((values > 32767).sum())


def test_overflow_saturates_and_is_counted(tmp_path: Path) -> None:
    write_series(tmp_path, 3, change=lambda _, dataset: setattr(dataset, "RescaleSlope", "20"))
    exact = (expected_hu(3, 0).astype(int)) * 20 - 1024
    volume = volume_of(tmp_path)
    assert np.array_equal(volume.hu, np.minimum(exact, 32767))
    assert volume.facts["saturated_voxels"] == int((exact > 32767).sum()) > 0


def test_fractional_rescale_is_rounded_and_said(tmp_path: Path) -> None:
    write_series(tmp_path, 3, change=lambda _, dataset: setattr(dataset, "RescaleSlope", "0.3"))
    volume = volume_of(tmp_path)
    assert np.abs(volume.hu - (expected_hu(3, 0) * 0.3 - 1024)).max() <= 0.5
    assert volume.facts["rounded"] is True


def test_monochrome1_is_not_inverted(tmp_path: Path) -> None:
    write_series(tmp_path, change=lambda _, dataset: setattr(dataset, "PhotometricInterpretation", "MONOCHROME1"))
    volume = volume_of(tmp_path)
    assert np.array_equal(volume.hu, expected_hu(5))
    assert volume.facts["monochrome1"] is True


def test_padding_is_kept_as_hu_and_recorded_as_stored(tmp_path: Path) -> None:
    def change(_: int, dataset: Dataset) -> None:
        dataset.PixelRepresentation = 1
        dataset.BitsStored, dataset.HighBit = 16, 15
        dataset.add_new("PixelPaddingValue", "US", 63536)  # a signed -2000 written as unsigned

    write_series(tmp_path, change=change)
    volume = volume_of(tmp_path)
    assert np.array_equal(volume.hu, expected_hu(5))
    assert volume.facts["padding_stored"] == -2000


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless]
)
def test_syntaxes_that_need_no_extra(tmp_path: Path, syntax: str) -> None:
    def change(index: int, dataset: Dataset) -> None:
        if syntax == RLELossless:
            dataset.compress(RLELosslessEncoder.UID, stored_slice(index), generate_instance_uid=False)
        elif syntax == ExplicitVRBigEndian:
            dataset.PixelData = stored_slice(index).astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax

    write_series(tmp_path, change=change)
    volume = volume_of(tmp_path)
    assert np.array_equal(volume.hu, expected_hu(5))
    assert len(volume.facts["transfer_syntaxes"]) == 1
    assert volume.facts["lossy"] is False


@pytest.mark.parametrize("vr", ["OB", "OW"])
@pytest.mark.parametrize("frames", [1, 3])
def test_big_endian_bytes_are_single_or_words(tmp_path: Path, vr: str, frames: int) -> None:
    """8 bits a value, an odd number of them: OB as they are; OW, swapped in pairs, is refused (PS3.5 annex A.3)."""
    values = np.random.default_rng(3).integers(0, 256, (frames, 5, 7)).astype(np.uint8)
    dataset = slice_dataset(0)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    set_pixels(dataset, values)
    dataset.NumberOfFrames = frames
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.add_new("PixelData", vr, values.tobytes() + b"\0")
    pieces = dicom.read_slices(write(dataset, tmp_path / "one"))
    with PixelReader() as reader:
        if vr == "OB":
            assert np.array_equal([reader.stored(piece) for piece in pieces], values)
        else:
            with pytest.raises(Refused, match="PIXEL_FORMAT_UNSUPPORTED"):
                reader.stored(pieces[0])


def test_pixels_whose_vr_is_unknown(tmp_path: Path) -> None:
    def change(_: int, dataset: Dataset) -> None:
        data = dataset.PixelData
        del dataset.PixelData
        dataset.add_new("PixelData", "UN", data)

    write_series(tmp_path, change=change)
    assert np.array_equal(volume_of(tmp_path).hu, expected_hu(5))


@pytest.mark.parametrize(
    ("keyword", "text", "code"),
    [("PixelSpacing", "0.7\\0.9", "NO_PIXEL_SPACING"), ("RescaleSlope", "1.25", "NO_RESCALE"), ("KVP", "98.5", "")],
)
def test_numbers_with_a_comma_are_no_numbers(tmp_path: Path, keyword: str, text: str, code: str) -> None:
    for path in write_series(tmp_path, change=lambda _, one: setattr(one, keyword, text.split("\\"))):
        data, number = path.read_bytes(), text.encode()
        assert number in data
        path.write_bytes(data.replace(number, number.replace(b".", b",")))
    if code:
        assert code_of(tmp_path) == code
    else:
        assert volume_of(tmp_path).facts["kvp"] is None


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_a_missing_decoder_is_named(tmp_path: Path, syntax: str, monkeypatch: pytest.MonkeyPatch) -> None:  # F10
    from pydicom.encaps import encapsulate

    def change(_: int, dataset: Dataset) -> None:
        dataset.PixelData = encapsulate([b"\xff\x4f\xff\x51 no codestream at all"])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = syntax

    write_series(tmp_path, change=change)
    if get_decoder(syntax).is_available:
        assert code_of(tmp_path) == "PIXELS_DAMAGED"
        monkeypatch.setattr(get_decoder(syntax), "_available", {})
    volumes, rows = read(tmp_path)
    assert not volumes
    assert rows[0].code == "DECODER_MISSING"
    assert "JPEG" in rows[0].reason
    assert "dinox[dicom]" in rows[0].hint


def test_an_unknown_syntax_is_refused_without_repeating_it(tmp_path: Path) -> None:
    from pydicom.encaps import encapsulate

    dataset = slice_dataset(0)
    dataset.PixelData = encapsulate([b"1234"])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = "1.2.19420228"
    write(dataset, tmp_path / "one.dcm", implicit_vr=False, little_endian=True)
    volumes, rows = read(tmp_path, min_slices=1)
    assert (volumes, rows[0].code) == ([], "SYNTAX_UNSUPPORTED")
    assert "19420228" not in rows[0].reason


@pytest.mark.parametrize("cut", [1, 2, ROWS * COLUMNS, 2 * ROWS * COLUMNS - 1, 2 * ROWS * COLUMNS])
def test_truncated_pixels_are_refused(tmp_path: Path, cut: int) -> None:  # F06
    paths = write_series(tmp_path)
    data = paths[3].read_bytes()
    paths[3].write_bytes(data[:-cut])
    volumes, rows = read(tmp_path)
    assert not volumes
    assert rows[0].code == "PIXELS_TRUNCATED"
    assert "the slice at 3.000 mm" in rows[0].reason


def test_a_file_cut_anywhere_never_gives_a_shorter_volume(tmp_path: Path) -> None:  # F06
    paths = write_series(tmp_path)
    data = paths[4].read_bytes()
    for length in range(0, len(data), 29):
        paths[4].write_bytes(data[:length])
        try:
            identity = dicom.read_identity(paths[4])
        except NotDicom:
            continue  # counted as a foreign or damaged file
        if identity.series_uid:
            volumes, rows = read(tmp_path)
            assert not volumes, length
            assert rows[0].code in ("PIXELS_TRUNCATED", "FILES_DAMAGED")


def test_surplus_bytes_are_padding_only_if_few(tmp_path: Path) -> None:  # F07
    write_series(tmp_path, change=lambda _, d: setattr(d, "PixelData", d.PixelData + b"\0" * 64))
    volume = volume_of(tmp_path)
    assert np.array_equal(volume.hu, expected_hu(5))
    assert volume.facts["surplus_bytes"] == 5 * 64
    write_series(tmp_path, change=lambda _, d: setattr(d, "PixelData", d.PixelData * 3))
    assert code_of(tmp_path) == "PIXELS_TOO_LONG"


@pytest.mark.parametrize(
    ("rows", "columns", "frames"),
    [(65535, 65535, None), (0, COLUMNS, None), (ROWS, 0, None), (ROWS, COLUMNS, 2**31 - 1), (ROWS, COLUMNS, 0)],
)
def test_hostile_sizes_are_refused_from_the_header(  # F08
    tmp_path: Path, rows: int, columns: int, frames: int | None
) -> None:
    def change(_: int, dataset: Dataset) -> None:
        dataset.Rows, dataset.Columns = rows, columns
        if frames is not None:
            dataset.NumberOfFrames = frames

    write_series(tmp_path, 3, change=change)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert code_of(tmp_path) == "SIZE_REFUSED"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 50 * 1024


@pytest.mark.parametrize("where", ["header", "pixels"])
def test_a_deflate_bomb_is_not_inflated(tmp_path: Path, where: str) -> None:  # F09
    def change(_: int, dataset: Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    path = write_series(tmp_path, 1, change=change)[0]
    data = path.read_bytes()
    with path.open("rb") as file:
        start, _, _ = file_meta(file, file.read(132))
    inflated = zlib.decompress(data[start:], -15)
    if where == "header":  # a private element of 120 MB before the pixels
        at = inflated.index(b"\xe0\x7f\x10\x00")
        bomb = inflated[:at] + b"\x29\x00\x10\x10OB\0\0" + (120_000_000).to_bytes(4, "little")
    else:
        bomb = inflated
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    parts = [data[:start], packer.compress(bomb)]
    parts += [packer.compress(b"\0" * 10_000_000) for _ in range(12)]
    path.write_bytes(b"".join([*parts, packer.flush()]))
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if where == "header":
        with pytest.raises(NotDicom, match="DICOM_DAMAGED"):
            dicom.read_identity(path)
        assert code_of(tmp_path, min_slices=1) == "FILES_DAMAGED"
    else:  # what comes after the pixels is never looked at
        dicom.read_identity(path)
        assert np.array_equal(volume_of(tmp_path, min_slices=1).hu, expected_hu(1))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 * 1024


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_rle_gives_no_volume(tmp_path: Path, damage: str) -> None:  # F10
    def change(index: int, dataset: Dataset) -> None:
        dataset.compress(RLELosslessEncoder.UID, stored_slice(index), generate_instance_uid=False)

    paths = write_series(tmp_path, 3, change=change)
    data = bytearray(paths[1].read_bytes())
    if damage == "cut":
        paths[1].write_bytes(data[:-40])
        assert code_of(tmp_path) == "PIXELS_TRUNCATED"
    else:
        at = data.rindex(b"\xfe\xff\x00\xe0") + 8  # the RLE header of the frame: 9 segments instead of 2
        data[at] = 9
        paths[1].write_bytes(data)
        assert code_of(tmp_path) == "PIXELS_DAMAGED"


# ---------------------------------------------------------------------------------------------- what is DICOM at all


def headless(dataset: Dataset, path: Path, implicit: bool) -> None:
    dataset.file_meta = FileMetaDataset()
    dataset.save_as(path, implicit_vr=implicit, little_endian=True, enforce_file_format=False)


@pytest.mark.parametrize("implicit", [True, False])
def test_data_sets_without_preamble_and_meta_are_read(tmp_path: Path, implicit: bool) -> None:
    for index in range(3):
        headless(slice_dataset(index), tmp_path / f"{index}", implicit)
    assert dicom.read_identity(tmp_path / "0").series_uid == "1.2.3.4"
    assert np.array_equal(volume_of(tmp_path).hu, expected_hu(3))


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 4096, b"hello", b"\0" * 128 + b"DICM", random.Random(0).randbytes(5000), b"\x08\x00\x05\x00" * 300,
     b"<?xml version='1.0'?>" * 20, b"\x08\x00" + random.Random(1).randbytes(900)],
    ids=["empty", "zeros", "short", "only preamble", "random", "tags", "xml", "tag and random"],
)  # fmt: skip
def test_foreign_files_are_told_apart(tmp_path: Path, data: bytes) -> None:  # F08
    (tmp_path / "file.dcm").write_bytes(data)
    with pytest.raises(NotDicom) as answer:
        dicom.read_identity(tmp_path / "file.dcm")
    assert answer.value.code == "NOT_DICOM"


def test_a_damaged_meta_is_no_foreign_file(tmp_path: Path) -> None:
    path = write_series(tmp_path, 1)[0]
    data = bytearray(path.read_bytes())
    data[132 + 4 : 132 + 6] = b"\x00\x01"
    path.write_bytes(data)
    with pytest.raises(NotDicom) as answer:
        dicom.read_identity(path)
    assert answer.value.code == "DICOM_DAMAGED"


def test_random_bytes_in_the_header_never_escape_the_rules(tmp_path: Path) -> None:
    paths = write_series(tmp_path, 3)
    data = paths[1].read_bytes()
    end = data.index(b"\xe0\x7f\x10\x00")
    rng = random.Random(5)
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(3):
            changed[rng.randrange(132, end)] = rng.randrange(256)
        paths[1].write_bytes(changed)
        volumes, rows = read(tmp_path)  # must not raise
        assert volumes or rows
