"""One CT slice to one zstd frame and back: a reversible filter, then plain Zstandard; bounded and exact.

    slice int16 (y, x)  --filter-->  2·y·x bytes  --zstd-->  one frame (content size in its header)

Invariant: decoding gives the very int16 values that were encoded, or raises ShardError. Nothing is allocated by
what a frame claims: sizes come from the caller's index, and a frame that claims another one is refused unread.

Filters (docs/format.md): `none` the slice itself, little endian; `planes` all low bytes, then all high bytes;
`hilp` the residual of a two-level vertical interpolation, horizontally differenced, in two byte planes whose high
one is sign-corrected. All their arithmetic is modulo 2^16.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import xxhash
import zstandard

from dinox_io.errors import ShardError

FILTERS = ("none", "planes", "hilp")
CODECS = ("zstd",)

# Largest slice that is encoded or decoded, in values: 16384 x 16384, far beyond any CT detector, 512 MiB.
MAX_SLICE_VALUES = 1 << 28


class Frame(NamedTuple):
    """One compressed slice: the zstd frame, bytes it decompresses to, low 32 bits of their XXH64."""

    data: bytes
    size: int
    checksum: int


def checksum32(data: bytes | memoryview) -> int:
    """Low 32 bits of XXH64 (seed 0), as the Zstandard Seekable Format stores them."""
    return xxhash.xxh64_intdigest(data) & 0xFFFFFFFF


# --- filters -----------------------------------------------------------------------------------------------------


def apply_filter(slice_hu: np.ndarray, name: str) -> np.ndarray:
    """int16 (y, x) -> uint8 (2·y·x,), the bytes that are compressed. ValueError for an unknown filter."""
    check_filter(name)
    slice_hu = np.ascontiguousarray(slice_hu, dtype="<i2")
    if name == "none":
        return slice_hu.view(np.uint8).reshape(-1)
    if name == "planes":
        return np.ascontiguousarray(slice_hu.view(np.uint8).reshape(-1, 2).T).reshape(-1)
    residual = _residual(slice_hu)
    difference = residual.copy()
    np.subtract(residual[:, 1:], residual[:, :-1], out=difference[:, 1:])
    planes = np.empty((2, *difference.shape), np.int8)
    low, high = planes[0], planes[1]
    np.copyto(low, difference, casting="unsafe")
    np.subtract(difference, low, out=difference)
    np.right_shift(difference, 8, out=difference)
    np.copyto(high, difference, casting="unsafe")
    return planes.view(np.uint8).reshape(-1)


def _residual(rows: np.ndarray) -> np.ndarray:
    """Rows 0,4,8… as they are, rows 2,6,10… minus the mean of their neighbours among those, odd rows minus theirs."""
    residual = np.empty_like(rows)
    first, second, _ = _row_groups(len(rows))
    residual[:first] = rows[0::4]
    np.subtract(rows[2::4], _vertical_mean(rows[0::4], second), out=residual[first : first + second])
    np.subtract(rows[1::2], _vertical_mean(rows[0::2], len(rows) // 2), out=residual[first + second :])
    return residual


def _row_groups(num_rows: int) -> tuple[int, int, int]:
    """How many rows there are of y % 4 == 0, of y % 4 == 2, and odd ones."""
    return (num_rows + 3) // 4, (num_rows + 1) // 4, num_rows // 2


def _vertical_mean(known: np.ndarray, count: int) -> np.ndarray:
    """For each of `count` rows between known rows: (up + down) >> 1, with down = up below the last known row."""
    mean = known[:count].copy()
    between = min(count, len(known) - 1)
    mean[:between] += known[1 : between + 1]
    mean[between:] += known[between:count]
    return np.right_shift(mean, 1, out=mean)


class Scratch:
    """Buffers that one thread reuses from slice to slice: fresh memory would cost more than the arithmetic."""

    def __init__(self) -> None:
        self.shape = (0, 0)

    def fit(self, shape: tuple[int, int]) -> Scratch:
        """Buffers for slices of `shape` (y, x), kept while the shape stays."""
        if shape != self.shape:
            rows, columns = shape
            self.filtered = np.empty(2 * rows * columns, np.uint8)
            self.residual = np.empty(shape, np.int16)
            self.mean = np.empty(((rows + 1) // 2, columns), np.int16)
            self.sums = np.empty(shape, np.int32)
            self.shape = shape
        return self


def remove_filter(filtered: np.ndarray, name: str, out: np.ndarray, scratch: Scratch) -> None:
    """uint8 (2·y·x,) -> int16 (y, x), written into `out` (any strides, so a slot of a larger slab will do)."""
    check_filter(name)
    if name == "none":
        np.copyto(out, filtered.view("<i2").reshape(out.shape))
        return
    half = filtered.size // 2
    low, high = filtered[:half].reshape(out.shape), filtered[half:].view(np.int8).reshape(out.shape)
    if name == "planes":
        np.multiply(high, 256, out=out, dtype=np.int16)
        np.add(out, low, out=out)
        return
    scratch.fit(out.shape)
    _undo_horizontal_difference(low.view(np.int8), high, scratch)
    _undo_vertical_prediction(scratch.residual, out, scratch.mean)


def _undo_horizontal_difference(low: np.ndarray, high: np.ndarray, scratch: Scratch) -> None:
    """scratch.residual = cumulative sum along x of low + 256·high, modulo 2^16."""
    np.multiply(high, 256, out=scratch.residual, dtype=np.int16)
    np.add(scratch.residual, low, out=scratch.residual)
    # Summed in 32 bits, which is congruent: NumPy's 16-bit cumsum takes 3 times as long (on x86-64, measured).
    np.cumsum(scratch.residual, axis=1, dtype=np.int32, out=scratch.sums)
    np.copyto(scratch.residual, scratch.sums, casting="unsafe")


def _undo_vertical_prediction(residual: np.ndarray, out: np.ndarray, mean: np.ndarray) -> None:
    first, second, third = _row_groups(len(out))
    out[0::4] = residual[:first]
    _add_vertical_mean(out[0::4], residual[first : first + second], out[2::4], mean[:second])
    _add_vertical_mean(out[0::2], residual[first + second :], out[1::2], mean[:third])


def _add_vertical_mean(known: np.ndarray, residual: np.ndarray, out: np.ndarray, mean: np.ndarray) -> None:
    count = len(out)
    between = min(count, len(known) - 1)
    np.add(known[:between], known[1 : between + 1], out=mean[:between])
    np.add(known[between:count], known[between:count], out=mean[between:])
    np.right_shift(mean, 1, out=mean)
    np.add(mean, residual, out=out)


def check_filter(name: str) -> None:
    """ValueError, with the names that exist, for a filter that does not."""
    if name not in FILTERS:
        raise ValueError(f"unknown filter {name!r}: this version knows {', '.join(FILTERS)}")


# --- frames ------------------------------------------------------------------------------------------------------


class SliceEncoder:
    """Filter and compressor of one thread, reused from slice to slice."""

    def __init__(self, filter: str, level: int = 1) -> None:
        check_filter(filter)
        self.filter, self.level = filter, level
        self._size, self._compressor = -1, zstandard.ZstdCompressor(level=level)

    def encode(self, slice_hu: np.ndarray) -> Frame:
        """int16 (y, x) -> one frame: content size present, single segment, no checksum, no dictionary."""
        filtered = apply_filter(slice_hu, self.filter)
        if filtered.size != self._size:
            self._size, self._compressor = filtered.size, _compressor(self.level, filtered.size)
        return Frame(self._compressor.compress(filtered.data), filtered.size, checksum32(filtered.data))


def _compressor(level: int, size: int) -> zstandard.ZstdCompressor:
    # A window that holds the whole slice makes zstd write a single segment: the reader's bound is the slice itself.
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=size,
        window_log=max(10, (size - 1).bit_length()),
        write_content_size=True,
        write_checksum=False,
        write_dict_id=False,
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


class SliceDecoder:
    """Decoder of one thread, its buffers reused from slice to slice. Not to be shared between threads.

    Attributes: `decode_s` (zstd and hash), `unfilter_s`, `decoded_bytes`: what it has cost and given since it was made.
    """

    def __init__(self, filter: str) -> None:
        try:
            check_filter(filter)
        except ValueError as error:
            raise ShardError(str(error)) from None
        self.filter = filter
        self._decompressor = zstandard.ZstdDecompressor()
        self._scratch = Scratch()
        self.decode_s = self.unfilter_s = 0.0
        self.decoded_bytes = 0

    def decode_into(self, frame: memoryview | bytes, out: np.ndarray, checksum: int | None) -> None:
        """Decode one frame into `out`, int16 (y, x); compare with `checksum` (low 32 bits of XXH64) unless None.

        Raises ShardError on any damage that can be seen; `out` is then undefined.
        """
        begin_s = time.perf_counter()
        size = 2 * out.shape[0] * out.shape[1]
        _check_header(frame, size)
        filtered = self._scratch.fit((out.shape[0], out.shape[1])).filtered
        try:
            given = self._decompressor.stream_reader(frame).readinto(filtered.data)
        except zstandard.ZstdError as error:
            raise ShardError(f"the zstd frame does not decode ({error})") from None
        if given != size:
            raise ShardError(f"the zstd frame ends after {given} of {size} bytes")
        if checksum is not None and checksum32(filtered.data) != checksum:
            raise ShardError("the slice's bytes are not those that were packed (XXH64 differs)")
        decoded_s = time.perf_counter()
        remove_filter(filtered, self.filter, out, self._scratch)
        self.decode_s += decoded_s - begin_s
        self.unfilter_s += time.perf_counter() - decoded_s
        self.decoded_bytes += size


def _check_header(frame: memoryview | bytes, size: int) -> None:
    """Refuse, before anything is allocated, a frame that claims another size, a dictionary, or a larger window."""
    try:
        header = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise ShardError(f"not a zstd frame ({error})") from None
    if header.content_size != size:
        raise ShardError(f"the zstd frame claims {header.content_size} bytes where the slice has {size}")
    if header.window_size > max(size, 1 << 10) or header.dict_id:
        raise ShardError(f"the zstd frame asks for a window of {header.window_size} bytes or a dictionary")
