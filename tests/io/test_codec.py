"""Frames: both ways, at every preset, against damage, and bounds before memory. The filters: test_codec_filters.py."""

import struct

import numpy as np
import pytest
import xxhash
import zstandard

from dinox_io.codec import FILTERS, PRESETS, SliceDecoder, SliceEncoder
from dinox_io.errors import ShardError
from tests.io.filter_reference import reference


@pytest.mark.parametrize("name", FILTERS)
def test_frame_round_trip(name: str) -> None:
    decoder = SliceDecoder(name)
    for shape in ((64, 48), (1, 1), (700, 900), (5, 1000)):
        slice_hu = np.random.default_rng(1).normal(0, 300, shape).astype(np.int16)
        frame = SliceEncoder(name).encode(slice_hu)
        if shape[0] <= 64:  # the reference is slow
            assert frame.checksum == xxhash.xxh64_intdigest(reference(slice_hu, name)) & 0xFFFFFFFF
        header = zstandard.get_frame_parameters(frame.data)
        assert header.content_size == frame.size == 2 * slice_hu.size
        assert (header.window_size, header.has_checksum, header.dict_id) == (frame.size, False, 0)
        out = np.empty(shape, np.int16)
        decoder.decode_into(memoryview(frame.data), out, frame.checksum)
        np.testing.assert_array_equal(out, slice_hu)
        assert SliceEncoder(name).encode(slice_hu) == frame
    assert decoder.decoded_bytes == 2 * (64 * 48 + 1 + 700 * 900 + 5000)


@pytest.mark.parametrize(("filter", "level"), [*PRESETS.values(), ("hilp", -5), ("planes", 1), ("hilp", 3)])
@pytest.mark.parametrize("shape", [(200, 300), (1, 1), (64, 96), (3, 5000)])
def test_every_level_is_a_standard_frame(filter: str, level: int, shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(4).normal(0, 20, shape)
    slice_hu = (noise + np.linspace(-1000, 1000, shape[1])).astype(np.int16)
    frame = SliceEncoder(filter, level).encode(slice_hu)
    assert zstandard.decompress(frame.data) == reference(slice_hu, filter)
    header = zstandard.get_frame_parameters(frame.data)
    assert (header.content_size, header.has_checksum, header.dict_id) == (2 * slice_hu.size, False, 0)
    out = np.empty(shape, np.int16)
    SliceDecoder(filter).decode_into(frame.data, out, frame.checksum)
    np.testing.assert_array_equal(out, slice_hu)


def test_presets_trade_size_for_time() -> None:
    """Noise of 20 HU on a ramp. `small` has Huffman codes, `fast` has none; neither may be what the other one is."""
    noise = np.random.default_rng(5).normal(0, 20, (512, 512))
    slice_hu = (noise + np.linspace(-1000, 1000, 512)).astype(np.int16)
    bytes_of = {name: len(SliceEncoder(*preset).encode(slice_hu).data) for name, preset in PRESETS.items()}
    assert next(iter(PRESETS)) == "small"
    assert bytes_of["small"] < 0.9 * bytes_of["fast"] < 0.9 * slice_hu.nbytes


def test_the_small_table_costs_no_bytes() -> None:
    """A search table of 2^12 places (codec.py) finds what zstd's own of 2^14 does: in noise, repeats and nothing."""
    noise = np.random.default_rng(6).normal(0, 20, (512, 512))
    slice_hu = np.where(np.arange(512) < 60, -1024, noise + np.linspace(-1000, 1000, 512)).astype(np.int16)
    for repeated in (slice_hu, slice_hu[:256, :256].repeat(2, 0).repeat(2, 1), np.full_like(slice_hu, -3024)):
        ours = len(SliceEncoder("hilp", 1).encode(repeated).data)
        assert ours < 1.02 * len(zstandard.ZstdCompressor(level=1).compress(reference(repeated, "hilp"))) + 16


def test_a_level_beyond_zstd_is_refused() -> None:
    with pytest.raises(ValueError, match="level"):
        SliceEncoder("hilp", 23)


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
