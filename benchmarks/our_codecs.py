"""Our codec's parts as contenders: whole decoding, zstd alone, the unfilter alone; and plain zstd as the reference.

Runs in this process, and in one with DINOX_FILTERS=numpy for the tier without a compiler (serve.py).
Invariant: every decoder writes each slice into the same given buffer; one that is not bit-exact is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import machine
import numpy as np
import zstandard
from timing import Prepared, Setup

from dinox_io import codec, filters
from dinox_io.codec import Frame, SliceDecoder, SliceEncoder
from dinox_io.filters import Scratch, apply_filter, remove_filter

PACKAGES = ("numpy", "zstandard", "xxhash", "pydicom")
REFERENCE_LEVEL = 3
SMALL, FAST = codec.PRESETS["small"], codec.PRESETS["fast"]
SETTINGS = {"hilp": SMALL, "hilp fast": FAST, "planes": ("planes", 1), "raw zstd 3": ("none", REFERENCE_LEVEL)}
"""Name -> filter and zstd level: what we store, and the yardstick."""


def versions() -> dict[str, str]:
    """Of what our codec stands on."""
    return machine.versions(PACKAGES)


def encode(slices: list[np.ndarray], setting: tuple[str, int]) -> list[Frame]:
    """One frame a slice."""
    encoder = SliceEncoder(*setting)
    return [encoder.encode(one) for one in slices]


class _Ours:
    def __init__(self, data: str) -> None:
        paths = sorted(Path(data).glob("*.npy"))
        self.slices = [one for path in paths for one in np.load(path, allow_pickle=False)]
        self.out = np.empty_like(self.slices[0])
        self.raw_bytes = sum(one.nbytes for one in self.slices)

    def decoding(self, name: str, *, check: bool = False) -> Setup:
        """SliceDecoder into a given buffer, as the loader uses it. With `check`, hashes too (the first touch)."""

        def setup() -> Prepared:
            frames, decoder = encode(self.slices, SETTINGS[name]), SliceDecoder(SETTINGS[name][0])
            sums = [frame.checksum if check else None for frame in frames]
            for frame, one in zip(frames, self.slices, strict=True):
                decoder.decode_into(frame.data, self.out, frame.checksum)
                if not np.array_equal(self.out, one):
                    raise ValueError(f"{name} does not give back what it was given")

            def run() -> float:
                for frame, checksum in zip(frames, sums, strict=True):
                    decoder.decode_into(frame.data, self.out, checksum)
                return self.raw_bytes

            return Prepared(run, {"packed_bytes": sum(len(f.data) for f in frames), "filters": filters.describe()})

        return setup

    def decompressing(self, name: str) -> Setup:
        """zstd alone, into a given buffer: plain zstd of raw int16, or of our frames without the unfilter."""

        def setup() -> Prepared:
            frames = [frame.data for frame in encode(self.slices, SETTINGS[name])]
            decompressor, filtered = zstandard.ZstdDecompressor(), memoryview(bytearray(self.out.nbytes))

            def run() -> float:
                for frame in frames:
                    decompressor.stream_reader(frame).readinto(filtered)
                return self.raw_bytes

            return Prepared(run, {"packed_bytes": sum(map(len, frames))})

        return setup

    def unfiltering(self) -> Prepared:
        """The unfilter alone, of bytes that lie in the cache as they do after zstd."""
        filtered = apply_filter(self.slices[0], SMALL[0])
        scratch = Scratch()

        def run() -> float:
            remove_filter(filtered, SMALL[0], self.out, scratch)
            return self.out.nbytes

        return Prepared(run, {"filters": filters.describe()})

    def copying(self) -> Prepared:
        """The unfilter's floor: a slice's filtered bytes are read once, the slice is written once."""
        filtered = apply_filter(self.slices[0], SMALL[0])
        target = self.out.view(np.uint8).reshape(-1)

        def run() -> float:
            np.copyto(target, filtered)
            return self.out.nbytes

        return Prepared(run, {"buffer_bytes": self.out.nbytes})


def contenders(data: str) -> dict[str, Setup]:
    """Decoders of the slices in the folder `data`. Work: bytes of int16."""
    ours = _Ours(data)
    return {
        **{name: ours.decoding(name) for name in ("hilp", "hilp fast", "planes")},
        "hilp checked": ours.decoding("hilp", check=True),
        "raw zstd 3": ours.decompressing("raw zstd 3"),
        "zstd of hilp": ours.decompressing("hilp"),
        "unfilter": ours.unfiltering,
        "copy": ours.copying,
    }


def tables(data: str) -> dict[str, Callable[[], int]]:
    """Bytes of the frames of all slices with each of SETTINGS, the seek table's 12 bytes a slice included."""
    ours = _Ours(data)

    def size(setting: tuple[str, int]) -> int:
        return sum(len(frame.data) + 12 for frame in encode(ours.slices, setting))

    return {name: partial(size, setting) for name, setting in SETTINGS.items()}
