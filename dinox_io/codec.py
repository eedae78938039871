"""One CT slice to one zstd frame and back: a reversible filter, then plain Zstandard; bounded and exact.

    slice int16 (y, x)  --filter-->  2·y·x bytes  --zstd-->  one frame (content size in its header)

Invariant: decoding gives the very int16 values that were encoded, or raises ShardError. Nothing is allocated by
what a frame claims: sizes come from the caller's index, and a frame that claims another one is refused unread.
"""

from __future__ import annotations

import time
from functools import cache
from typing import NamedTuple

import numpy as np
import xxhash
import zstandard

from dinox_io.errors import ShardError
from dinox_io.filters import FILTERS as FILTERS
from dinox_io.filters import Scratch, apply_filter, check_filter, remove_filter
from dinox_io.filters import describe as describe
from dinox_io.filters import tier as tier

CODECS = ("zstd",)

PRESETS = {"small": ("hilp", 1), "fast": ("hilp", -1)}
"""Filter and zstd level by name, the default first. Measured on 97 slices of 512 x 512 of five real CT series:

- `small` stores them in 1/2.68 of int16.
- `fast` in 1/2.20; zstd takes 0.4 times as long to decode it (its negative levels do without Huffman codes) and 0.8
  times as long to pack. For a large disk, and a processor that training waits for.
"""

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


# --- frames ------------------------------------------------------------------------------------------------------


class SliceEncoder:
    """Filter and compressor of one thread, reused from slice to slice."""

    def __init__(self, filter: str, level: int = 1) -> None:
        """`level`: zstd's, up to 22, negative ones included. ValueError for an unknown filter or a level beyond."""
        check_filter(filter)
        self.filter, self.level = filter, level
        self._filtered = np.empty(0, np.uint8)
        self._size, self._compressor = -1, zstandard.ZstdCompressor(level=level)

    def encode(self, slice_hu: np.ndarray) -> Frame:
        """int16 (y, x) -> one frame: content size present, single segment, no checksum, no dictionary."""
        size = 2 * slice_hu.size
        if size != self._size:
            self._filtered = np.empty(size, np.uint8)
            self._size, self._compressor = size, _compressor(self.filter, self.level, size)
        filtered = apply_filter(slice_hu, self.filter, self._filtered)
        return Frame(self._compressor.compress(filtered.data), size, checksum32(filtered.data))


def _compressor(filter: str, level: int, size: int) -> zstandard.ZstdCompressor:
    chosen = {}
    if level == 1 and filter != "none":
        # What is left of a filtered slice is noise, in which nearly all matches are junk: a table of 2^12 places finds
        # as much in it as zstd's own of 2^14 does (0.03 % more bytes), stays in the processor's first cache, and is
        # 1.17 times as fast. 2^8 places would be 1.22 times as fast, and lose a fifth on slices enlarged by repetition.
        chosen = {"hash_log": 12}
    # A window that holds the whole slice makes zstd write a single segment: the reader's bound is the slice itself.
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=size,
        window_log=max(10, (size - 1).bit_length()),
        write_content_size=True,
        write_checksum=False,
        write_dict_id=False,
        **chosen,
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
        filtered = self._scratch.fit((out.shape[0], out.shape[1])).filtered
        self.decompress_into(frame, filtered, checksum)
        begin_s = time.perf_counter()
        remove_filter(filtered, self.filter, out, self._scratch)
        self.unfilter_s += time.perf_counter() - begin_s

    def decompress_into(self, frame: memoryview | bytes, out: np.ndarray, checksum: int | None) -> None:
        """As `decode_into`, but the filter stays: `out` is contiguous uint8 (2·y·x,)."""
        begin_s = time.perf_counter()
        _check_header(frame, out.size)
        try:
            given = self._decompressor.stream_reader(frame).readinto(out.data)
        except zstandard.ZstdError as error:
            raise ShardError(f"the zstd frame does not decode ({error})") from None
        if given != out.size:
            raise ShardError(f"the zstd frame ends after {given} of {out.size} bytes")
        if checksum is not None and checksum32(out.data) != checksum:
            raise ShardError("the slice's bytes are not those that were packed (XXH64 differs)")
        self.decode_s += time.perf_counter() - begin_s
        self.decoded_bytes += out.size


def _check_header(frame: memoryview | bytes, size: int) -> None:
    """Refuse, before anything is allocated, a frame that claims another size, a dictionary, or a larger window."""
    usual = _usual_header(size)
    if frame[: len(usual)] == usual:
        return
    try:
        header = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise ShardError(f"not a zstd frame ({error})") from None
    if header.content_size != size:
        raise ShardError(f"the zstd frame claims {header.content_size} bytes where the slice has {size}")
    if header.window_size > max(size, 1 << 10) or header.dict_id:
        raise ShardError(f"the zstd frame asks for a window of {header.window_size} bytes or a dictionary")


@cache
def _usual_header(size: int) -> bytes:
    """What a frame of ours begins with: 4 bytes of content size, a single segment (so its window is that size), no
    dictionary. It need not be parsed then. Source: RFC 8878, section 3.1.1.1."""
    return b"\x28\xb5\x2f\xfd\xa0" + size.to_bytes(4, "little")
