"""Filters against slow references written from their definition, frames against damage, and bounds before memory."""

import struct

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dinox_io.codec import FILTERS, Scratch, SliceDecoder, SliceEncoder, apply_filter, remove_filter
from dinox_io.errors import ShardError

EXTREMES = st.sampled_from([-32768, -32767, -8193, -8192, -1024, -1, 0, 1, 127, 128, 255, 256, 8191, 8192, 32767])
SLICES = st.one_of(
    hnp.arrays(np.int16, st.tuples(st.integers(1, 13), st.integers(1, 13)), elements=st.integers(-32768, 32767)),
    hnp.arrays(np.int16, st.tuples(st.integers(1, 9), st.sampled_from([4, 8, 16])), elements=EXTREMES),
    hnp.arrays(np.int16, st.tuples(st.integers(1, 9), st.sampled_from([4, 8, 64])), elements=st.integers(-1100, 1100)),
)


def int16(value: int) -> int:
    """Modulo 2^16, into the range of int16."""
    return (value + 32768) % 65536 - 32768


def reference_hilp(rows: list[list[int]]) -> bytes:
    """docs/format.md, word by word: one value at a time."""
    height, width = len(rows), len(rows[0])

    def predicted(y: int, distance: int) -> list[int]:
        up = rows[y - distance]
        down = rows[y + distance] if y + distance < height else up
        return [int16(a + b) >> 1 for a, b in zip(up, down, strict=True)]

    residual = [rows[y] for y in range(0, height, 4)]
    for first, stride, distance in ((2, 4, 2), (1, 2, 1)):
        for y in range(first, height, stride):
            residual.append([int16(a - b) for a, b in zip(rows[y], predicted(y, distance), strict=True)])
    low, high = bytearray(), bytearray()
    for row in residual:
        for x in range(width):
            value = int16(row[x] - (row[x - 1] if x else 0))
            low_byte = (value + 128) % 256 - 128
            low.append(low_byte % 256)
            high.append((int16(value - low_byte) >> 8) % 256)
    return bytes(low + high)


def reference(slice_hu: np.ndarray, name: str) -> bytes:
    rows = [[int(value) for value in row] for row in slice_hu]
    if name == "hilp":
        return reference_hilp(rows)
    values = [value % 65536 for row in rows for value in row]
    if name == "planes":
        return bytes(value % 256 for value in values) + bytes(value // 256 for value in values)
    return b"".join(struct.pack("<H", value) for value in values)


@pytest.mark.parametrize("name", FILTERS)
@given(slice_hu=SLICES)
def test_filter_is_its_definition_and_reversible(name: str, slice_hu: np.ndarray) -> None:
    filtered = apply_filter(slice_hu, name)
    assert filtered.tobytes() == reference(slice_hu, name)
    # Into a slot of a larger slab, whose other values must stay.
    slab = np.full((slice_hu.shape[0] + 1, slice_hu.shape[1] + 3), 77, np.int16)
    remove_filter(filtered, name, slab[: slice_hu.shape[0], : slice_hu.shape[1]], Scratch())
    np.testing.assert_array_equal(slab[: slice_hu.shape[0], : slice_hu.shape[1]], slice_hu)
    assert (slab[slice_hu.shape[0] :] == 77).all()
    assert (slab[:, slice_hu.shape[1] :] == 77).all()


@pytest.mark.parametrize(("low", "high"), [(-128, -128), (127, 127), (-1, -128), (-128, 127)])
def test_sums_wrap(low: int, high: int) -> None:
    """The largest differences, summed up over a long row: far beyond 2^16, and still exact modulo that."""
    filtered = np.array([[low] * 4000, [high] * 4000], np.int8).view(np.uint8).reshape(-1)
    out = np.empty((4, 1000), np.int16)
    remove_filter(filtered, "hilp", out, Scratch())
    assert apply_filter(out, "hilp").tobytes() == filtered.tobytes()
    assert reference_hilp(out.tolist()) == filtered.tobytes()


@pytest.mark.parametrize("name", FILTERS)
def test_frame_round_trip(name: str) -> None:
    decoder = SliceDecoder(name)
    for shape in ((64, 48), (1, 1), (700, 900), (5, 1000)):
        slice_hu = np.random.default_rng(1).normal(0, 300, shape).astype(np.int16)
        frame = SliceEncoder(name).encode(slice_hu)
        assert frame.checksum == xxhash.xxh64_intdigest(reference(slice_hu, name)) & 0xFFFFFFFF or shape[0] > 64
        header = zstandard.get_frame_parameters(frame.data)
        assert header.content_size == frame.size == 2 * slice_hu.size
        assert (header.window_size, header.has_checksum, header.dict_id) == (frame.size, False, 0)
        out = np.empty(shape, np.int16)
        decoder.decode_into(memoryview(frame.data), out, frame.checksum)
        np.testing.assert_array_equal(out, slice_hu)
        assert SliceEncoder(name).encode(slice_hu) == frame
    assert decoder.decoded_bytes == 2 * (64 * 48 + 1 + 700 * 900 + 5000)


def test_none_is_readable_by_plain_zstd() -> None:
    slice_hu = np.arange(-50, 50, dtype=np.int16).reshape(10, 10)
    assert zstandard.decompress(SliceEncoder("none").encode(slice_hu).data) == slice_hu.astype("<i2").tobytes()


def test_every_bit_of_a_frame_is_covered() -> None:
    slice_hu = np.random.default_rng(2).normal(0, 30, (16, 16)).astype(np.int16)
    frame = SliceEncoder("hilp").encode(slice_hu)
    decoder, out = SliceDecoder("hilp"), np.empty((16, 16), np.int16)
    for bit in range(8 * len(frame.data)):
        damaged = bytearray(frame.data)
        damaged[bit // 8] ^= 1 << bit % 8
        out[:] = 0
        try:
            decoder.decode_into(bytes(damaged), out, frame.checksum)
        except ShardError:
            continue
        np.testing.assert_array_equal(out, slice_hu)  # a bit that zstd does not use


@pytest.mark.parametrize("cut", [0, 1, 3, 5, 20, -1])
def test_a_cut_frame_is_refused(cut: int) -> None:
    frame = SliceEncoder("planes").encode(np.random.default_rng(3).normal(0, 30, (16, 16)).astype(np.int16))
    with pytest.raises(ShardError):
        SliceDecoder("planes").decode_into(frame.data[:cut], np.empty((16, 16), np.int16), frame.checksum)


def test_a_frame_that_claims_another_size_is_refused_unread() -> None:
    """A bomb: 4 KB that would be 128 MiB. And frames without a size, with a dictionary, with a huge window."""
    out = np.empty((16, 16), np.int16)
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 27))
    sizeless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(512))
    # Magic; a frame of 512 bytes with a window of 2^26 bytes; its content size in two bytes.
    window = b"\x28\xb5\x2f\xfd" + bytes([0x40, 0x80]) + struct.pack("<H", 512 - 256) + b"\x01\x00\x00"
    dictionary = b"\x28\xb5\x2f\xfd" + bytes([0x61, 7]) + struct.pack("<H", 512 - 256) + b"\x01\x00\x00"
    for data, reason in (
        (bomb, "claims 134217728"),
        (sizeless, "claims"),
        (window, "window"),
        (dictionary, "dictionary"),
    ):
        with pytest.raises(ShardError, match=reason):
            SliceDecoder("none").decode_into(data, out, None)


def test_unknown_filter() -> None:
    with pytest.raises(ValueError, match="none, planes, hilp"):
        SliceEncoder("zigzag")
    with pytest.raises(ShardError, match="none, planes, hilp"):
        SliceDecoder("zigzag")
