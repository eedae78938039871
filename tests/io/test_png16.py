"""A picture is read exactly, whole, and only if it is 16-bit gray; a series becomes the volume that was stored."""

import io
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from dinox_io.png16 import ENCODINGS, other_encoding, read_png16, read_size, read_stored, stored_range
from dinox_io.record import RESERVED_KEYS
from dinox_io.rules import Refused
from dinox_io.series import SeriesRules
from dinox_io.task import SeriesTask, pack_series
from dinox_io.volume import Rejection, Volume

SERIES, PATIENT = "5" * 32, "a" * 32


def png_bytes(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def hand_made(rows: int, columns: int, raw: bytes, *extra: bytes, bits: int = 16, colour: int = 0) -> bytes:
    """A PNG of these scan lines, each with its filter byte, and extra chunks before the pixels."""
    header = struct.pack(">IIBBBBB", columns, rows, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def noise(index: int, rows: int = 12, columns: int = 17) -> np.ndarray:
    """HU of a slice with air around: int16, -1000 to 3000."""
    hu = np.random.default_rng(index).integers(-1000, 3000, (rows, columns), dtype=np.int16)
    hu[0] = -1000
    return hu


def stored_as(name: str, hu: np.ndarray) -> np.ndarray:
    """What the predecessor's encoder writes, from its description: clip, scale, offset, saturate."""
    steps = {"x1": 1, "x10": 10}[name]
    return np.clip(np.rint(np.clip(hu, -1000.0, 4000.0) * steps) + 32768, 0, 65535).astype(np.uint16)


def write_slices(folder: Path, slices: dict[int, np.ndarray], encoding: str = "x1") -> list[Path]:
    folder.mkdir(exist_ok=True)
    for index, hu in slices.items():
        (folder / f"slice_{index:04d}.png").write_bytes(png_bytes(stored_as(encoding, hu)))
    return sorted(folder.iterdir())


def read(paths: list[Path], **changes: Any) -> tuple[list[Volume], list[Rejection]]:
    told: dict[str, Any] = {
        "series": SERIES, "patient": PATIENT, "encoding": "x1", "indices": [int(path.stem[-4:]) for path in paths],
        "spacings_mm": [(2.5, 0.7, 0.8)], "spacing_from": "index", "unspaced": 0, "conflicts": 0,
    }  # fmt: skip
    rules = SeriesRules(**{name: changes.pop(name) for name in ("min_slices", "split_gaps") if name in changes})
    return read_png16(paths, rules=rules, **{**told, **changes})


def code_of(paths: list[Path], **changes: Any) -> str:
    volumes, rows = read(paths, **changes)
    assert not volumes
    assert [row.series for row in rows] == [SERIES]
    return rows[0].code


# ---------------------------------------------------------------------------------------------- one picture


@given(arrays.arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_a_picture_is_read_exactly(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("picture") / "a.png"
    path.write_bytes(png_bytes(pixels))
    assert read_size(path) == pixels.shape
    np.testing.assert_array_equal(read_stored(path), pixels)
    assert stored_range(str(path)) == (pixels.min(), pixels.max())


def test_what_is_not_pixels_changes_none(tmp_path: Path) -> None:
    lines = b"\0\x80\0\x12\x34\0\xff\xff\0\0"
    extra = (chunk(b"gAMA", struct.pack(">I", 100)), chunk(b"tRNS", b"\x80\0"), chunk(b"zTXt", b"a\0\0" + b"\0" * 99))
    (tmp_path / "a.png").write_bytes(hand_made(2, 2, lines, *extra))
    np.testing.assert_array_equal(read_stored(tmp_path / "a.png"), [[0x8000, 0x1234], [0xFFFF, 0]])


def test_damage_of_any_byte_is_found(tmp_path: Path) -> None:
    """Every byte of the file, one bit each; and every cut."""
    pixels = stored_as("x1", noise(1, 5, 6))
    whole, path = png_bytes(pixels), tmp_path / "a.png"
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        for data in (bytes(damaged), whole[:position]):
            path.write_bytes(data)
            with pytest.raises(Refused):
                read_stored(path)
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_stored(path), pixels)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "PNG_DAMAGED"),
        (b"no picture at all, but longer than a header of 33 bytes", "PNG_DAMAGED"),
        (png_bytes(np.zeros((4, 4), np.uint8)), "PNG_NOT_GRAY16"),
        (png_bytes(np.zeros((4, 4, 3), np.uint8)), "PNG_NOT_GRAY16"),
        (hand_made(2, 2, bytes(2 * 13), colour=2), "PNG_NOT_GRAY16"),
        (hand_made(1 << 20, 4, b"\0"), "SIZE_REFUSED"),
        (hand_made(0, 4, b"\0"), "SIZE_REFUSED"),
        (hand_made(4000, 4000, b"\0" * 100), "PNG_DAMAGED"),
        (hand_made(2, 2, b"\0" * 10, chunk(b"PLTE", b"\0\0\0")), "PNG_DAMAGED"),
        (hand_made(2, 2, b"\0" * 10, chunk(b"IHDR", bytes(13))), "PNG_DAMAGED"),
        (hand_made(2, 2, b"\0" * 10) + bytes(2 << 20), "PNG_DAMAGED"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}_bytes",
)  # fmt: skip
def test_what_is_no_slice_is_refused(tmp_path: Path, data: bytes, code: str) -> None:
    (tmp_path / "slice_0000.png").write_bytes(data)
    assert code_of([tmp_path / "slice_0000.png"], min_slices=1) == code


def test_a_bomb_costs_no_more_than_its_slice(tmp_path: Path) -> None:
    """8 MB of zeros behind the pixels are not kept."""
    path = tmp_path / "a.png"
    path.write_bytes(hand_made(2, 2, b"\0\x80\0\x12\x34\0\xff\xff\0\0" + bytes(8 << 20)))
    assert read_stored(path).nbytes == 8


def test_what_is_no_file_is_an_oserror(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "nowhere.png", tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError):
            read_stored(path)
        assert stored_range(str(path)) is None


# ---------------------------------------------------------------------------------------------- encodings


@given(st.integers(-1000, 4000))
def test_whole_hu_come_back(hu: int) -> None:
    for name, encoding in ENCODINGS.items():
        stored = stored_as(name, np.array([hu]))
        back, rounded = encoding.decode(stored)
        assert back == (hu if name == "x1" else min(hu, 3277))
        assert not rounded
        low, high = encoding.stored_range
        assert low <= stored <= high


def test_tenths_are_rounded_to_the_nearest_and_told() -> None:
    hu, rounded = ENCODINGS["x10"].decode(np.array([32768 + 4, 32768 + 5, 32768 + 15, 32768 - 26], np.uint16))
    np.testing.assert_array_equal(hu, [0, 0, 2, -3])
    assert rounded


def test_the_other_encoding_is_refuted_either_way() -> None:
    for name in ENCODINGS:
        stored = stored_as(name, noise(3))
        low, high = int(stored.min()), int(stored.max())
        assert not ENCODINGS[name].refuted_by(low, high)
        assert ENCODINGS[other_encoding(name)].refuted_by(low, high)


# ---------------------------------------------------------------------------------------------- a series


@pytest.mark.parametrize("encoding", ["x1", "x10"])
def test_a_series_is_the_volume_that_was_stored(tmp_path: Path, encoding: str) -> None:
    hu = np.stack([noise(z) for z in range(4)])
    (volume,), rows = read(write_slices(tmp_path / "s", dict(enumerate(hu)), encoding), encoding=encoding)
    assert not rows
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.spacing_mm == (2.5, 0.7, 0.8)
    assert volume.z_positions_mm == (0.0, 2.5, 5.0, 7.5)
    assert volume.facts["stored_as"] == encoding


def test_order_is_that_of_the_numbers(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "s", {z: noise(z) for z in range(5, 9)})
    (volume,), _ = read(paths, indices=[8, 7, 6, 5])
    np.testing.assert_array_equal(volume.hu, np.stack([noise(z) for z in (8, 7, 6, 5)]))
    assert volume.z_positions_mm == (12.5, 15.0, 17.5, 20.0)


@pytest.mark.parametrize("encoding", ["x1", "x10"])
def test_a_series_of_the_other_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    paths = write_slices(tmp_path / "s", {z: noise(z) for z in range(4)}, encoding)
    assert code_of(paths, encoding=other_encoding(encoding)) == "WRONG_ENCODING"


def test_a_gap_is_refused_or_split(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "s", {z: noise(z) for z in (0, 1, 2, 4, 5, 6, 7, 9)})
    _, (row,) = read(paths)
    assert row.code == "SLICE_GAP"
    assert "gaps: 2, the first after 5.000 mm: 5.000 where slices are 2.500 mm apart" in row.reason
    (low, high), (note,) = read(paths, split_gaps=True)
    assert (low.id, high.id) == (f"{SERIES}-1", f"{SERIES}-2")
    assert high.z_positions_mm == (10.0, 12.5, 15.0, 17.5)
    np.testing.assert_array_equal(high.hu, np.stack([noise(z) for z in (4, 5, 6, 7)]))
    assert (note.code, note.files) == ("SPLIT_AT_GAPS", 1)
    assert code_of(paths, split_gaps=True, min_slices=5) == "TOO_FEW_SLICES"
    assert code_of(paths[:2]) == "TOO_FEW_SLICES"


def test_copies_are_dropped_and_told_others_refused(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "s", {0: noise(0), 1: noise(1), 2: noise(2), 3: noise(1)})
    (volume,), (note,) = read(paths, indices=[0, 1, 2, 1])
    assert (note.code, note.files) == ("DUPLICATE_DROPPED", 1)
    assert volume.facts["dropped"] == {"duplicate": 1}
    assert volume.hu.shape[0] == 3
    assert code_of(paths, indices=[0, 1, 2, 2]) == "DUPLICATE_POSITION"


def test_what_the_table_says_wrong_is_refused(tmp_path: Path) -> None:
    paths = write_slices(tmp_path / "s", {z: noise(z) for z in range(3)})
    assert code_of(paths, spacings_mm=[], unspaced=3) == "NO_PIXEL_SPACING"
    assert code_of(paths, unspaced=1) == "NO_PIXEL_SPACING"
    assert code_of(paths, spacings_mm=[(2.5, 0.7, 0.7), (2.5, 0.7, 0.8)]) == "MIXED_SPACING"
    assert code_of(paths, conflicts=2) == "INDEX_CONFLICT"
    (tmp_path / "s" / "slice_0001.png").write_bytes(png_bytes(stored_as("x1", noise(1, 13, 17))))
    assert code_of(paths) == "MIXED_MATRIX"


def test_a_record_has_the_facts_of_the_table(tmp_path: Path, repository: Path) -> None:
    text = (repository / "docs" / "format.md").read_text(encoding="utf-8")
    table = text.split("### Facts of imported pictures\n")[1].split("\n#")[0]
    listed = {re.findall(r"`(\w+)`", line)[0] for line in table.splitlines() if line.startswith("| `")}
    paths = write_slices(tmp_path / "s", {z: noise(z) for z in (0, 1, 2, 4, 5, 6)})
    task = SeriesTask(
        paths=tuple(map(str, paths)), size=0, series=SERIES, patient=PATIENT, patient_from="series_dir", identities=1,
        rules=SeriesRules(split_gaps=True), format="png16", known={},
        given={
            "encoding": "x1", "indices": (0, 1, 2, 4, 5, 6), "spacings_mm": ((2.5, 0.7, 0.8),),
            "spacing_from": "index", "unspaced": 0, "conflicts": 0,
        },
    )  # fmt: skip
    first, second = (json.loads(volume.meta) for volume in pack_series(task).volumes)
    assert first.keys() == second.keys() == RESERVED_KEYS | listed
