"""The peers that compress slices in memory: how small, and how fast back. Runs in the peers' interpreter (serve.py).

Invariant: nothing of dinox is imported; a slice that does not come back bit for bit is an error; one thread.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from timing import Prepared, Setup

PACKAGES = (
    "numpy",
    "blosc2",
    "imagecodecs",
    "opencv-python-headless",
    "zarr",
    "numcodecs",
    "h5py",
    "hdf5plugin",
    "webdataset",
)
PNG_OFFSET = 32768
"""PNG has no negative values: stored = HU + 32768."""


def versions() -> dict[str, str]:
    """Of the peers' packages."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def read_slices(folder: Path) -> list[np.ndarray]:
    """All slices, int16 (y, x), of the arrays (z, y, x) in `folder`."""
    return [one for path in sorted(folder.glob("*.npy")) for one in np.load(path, allow_pickle=False)]


class _Codec:
    """One way to store a slice: encode (y, x) -> bytes, decode (bytes, out)."""

    def __init__(self, encode: Callable[[np.ndarray], bytes], decode: Callable[[bytes, np.ndarray], None]) -> None:
        self.encode, self.decode = encode, decode


def _blosc2(codec: str, filters: tuple[str, ...], level: int) -> _Codec:
    blosc2: Any = import_module("blosc2")
    pipeline = [blosc2.Filter.NOFILTER] * (6 - len(filters)) + [blosc2.Filter[name] for name in filters]
    options = {
        "codec": blosc2.Codec[codec], "clevel": level, "typesize": 2, "nthreads": 1, "filters": pipeline,
        "filters_meta": [0] * 6,
    }  # fmt: skip

    def decode(data: bytes, out: np.ndarray) -> None:
        blosc2.decompress2(data, dst=out, nthreads=1)

    return _Codec(lambda one: blosc2.compress2(one, **options), decode)


def png_imagecodecs(level: int | None) -> _Codec:
    imagecodecs: Any = import_module("imagecodecs")

    def decode(data: bytes, out: np.ndarray) -> None:
        stored = out.view(np.uint16)
        imagecodecs.png_decode(data, out=stored)
        np.bitwise_xor(stored, PNG_OFFSET, out=stored)

    return _Codec(lambda one: imagecodecs.png_encode(one.view(np.uint16) ^ PNG_OFFSET, level=level), decode)


def png_opencv() -> _Codec:
    cv2: Any = import_module("cv2")
    cv2.setNumThreads(1)

    def encode(one: np.ndarray) -> bytes:
        done, data = cv2.imencode(".png", one.view(np.uint16) ^ PNG_OFFSET)
        assert done
        return data.tobytes()

    def decode(data: bytes, out: np.ndarray) -> None:
        stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        np.bitwise_xor(stored, PNG_OFFSET, out=out.view(np.uint16))

    return _Codec(encode, decode)


def _image(name: str, **options: Any) -> _Codec:
    """JPEG-LS and JPEG 2000's kin: unsigned 16 bit, HU + 32768 would cost them a bit plane, so + 4096 where it fits."""
    imagecodecs: Any = import_module("imagecodecs")
    encode, decode = getattr(imagecodecs, f"{name}_encode"), getattr(imagecodecs, f"{name}_decode")

    def back(data: bytes, out: np.ndarray) -> None:
        np.subtract(decode(data).view(np.int16), 4096, out=out)

    return _Codec(lambda one: encode((one + np.int16(4096)).view(np.uint16), **options), back)


def grid(quick: bool) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """The settings of blosc2 that are tried: codec, filters, level."""
    filters = (("SHUFFLE",), ("BITSHUFFLE",), ("SHUFFLE", "BYTEDELTA"))
    for codec in ("ZSTD",) if quick else ("ZSTD", "LZ4", "ZLIB", "LZ4HC", "BLOSCLZ"):
        for names in filters:
            for level in (1, 5) if quick else range(1, 10):
                yield codec, names, level


class _Peers:
    def __init__(self, data: str, quick: bool) -> None:
        self.slices, self.quick = read_slices(Path(data)), quick
        self.raw_bytes = sum(one.nbytes for one in self.slices)

    @cached_property
    def blosc2_sizes(self) -> dict[tuple[str, tuple[str, ...], int], int]:
        return {key: sum(map(len, map(_blosc2(*key).encode, self.slices))) for key in grid(self.quick)}

    @cached_property
    def codecs(self) -> dict[str, Callable[[], _Codec]]:
        return {
            "blosc2 smallest": lambda: _blosc2(*min(self.blosc2_sizes, key=lambda key: self.blosc2_sizes[key])),
            "blosc2 zstd 1 bitshuffle": lambda: _blosc2("ZSTD", ("BITSHUFFLE",), 1),
            "png16 imagecodecs": lambda: png_imagecodecs(None),
            "png16 opencv": png_opencv,
            "jpeg-ls": lambda: _image("jpegls"),
            "htj2k": lambda: _image("htj2k", reversible=True),
        }

    def sizes(self) -> list[dict[str, Any]]:
        """Bytes of all slices: blosc2 with each setting, PNG with each level, JPEG-LS and HTJ2K."""
        rows = [
            {"family": "blosc2", "name": f"{codec.lower()} {level} {'+'.join(names).lower()}", "bytes": size}
            for (codec, names, level), size in self.blosc2_sizes.items()
        ]
        images: list[tuple[str, str, Callable[[], _Codec]]] = [
            ("png16", "opencv", png_opencv),
            *(("png16", f"imagecodecs {n}", lambda n=n: png_imagecodecs(n)) for n in ((6,) if self.quick else (6, 9))),
            ("information", "jpeg-ls", self.codecs["jpeg-ls"]),
            ("information", "htj2k", self.codecs["htj2k"]),
        ]
        for family, name, make in images:
            rows.append({"family": family, "name": name, "bytes": sum(map(len, map(make().encode, self.slices)))})
        return rows

    def decoding(self, name: str) -> Setup:
        """Decodes every slice, one after the other, into one buffer. Work: bytes of int16."""

        def setup() -> Prepared:
            codec = self.codecs[name]()
            frames, out = [codec.encode(one) for one in self.slices], np.empty_like(self.slices[0])
            for frame, one in zip(frames, self.slices, strict=True):
                codec.decode(frame, out)
                if not np.array_equal(out, one):
                    raise ValueError(f"{name} does not give back what it was given")

            def run() -> float:
                for frame in frames:
                    codec.decode(frame, out)
                return self.raw_bytes

            return Prepared(run, {"packed_bytes": sum(map(len, frames))})

        return setup


@cache
def _shared(data: str, quick: bool) -> _Peers:
    return _Peers(data, quick)


def contenders(data: str, quick: bool) -> dict[str, Setup]:
    """Decoders of the slices in the folder `data`."""
    peers = _shared(data, quick)
    return {name: peers.decoding(name) for name in peers.codecs}


def tables(data: str, quick: bool) -> dict[str, Callable[[], Any]]:
    """`sizes`: bytes of all slices."""
    return {"sizes": _shared(data, quick).sizes}
