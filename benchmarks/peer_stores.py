"""The peers that store volumes in files: how large, and how fast to write. Runs in the peers' interpreter (serve.py).

Every store holds one slice a chunk, as random windows want it. Invariant: nothing of dinox is imported; one thread.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from peer_codecs import PNG_OFFSET, png_imagecodecs, png_opencv
from peer_codecs import versions as versions
from timing import Prepared, Setup

Write = Callable[[np.ndarray, Path], None]
"""Stores one volume, int16 (z, y, x), under a path that does not exist; it may add a suffix to it."""


def _zarr(compressor: Callable[[Any], Any]) -> Write:
    zarr: Any = import_module("zarr")
    codecs: Any = import_module("zarr.codecs")

    def write(volume: np.ndarray, path: Path) -> None:
        array = zarr.create_array(
            store=str(path) + ".zarr", shape=volume.shape, dtype="int16", chunks=(1, *volume.shape[1:]),
            shards=volume.shape, compressors=[compressor(codecs)],
        )  # fmt: skip
        array[:] = volume

    return write


def _zarr_blosc(level: int, shuffle: str) -> Write:
    return _zarr(lambda codecs: codecs.BloscCodec(cname="zstd", clevel=level, shuffle=shuffle, typesize=2))


def _zarr_zstd(level: int) -> Write:
    return _zarr(lambda codecs: codecs.ZstdCodec(level=level))


def _hdf5(shuffle: bool, compression: Callable[[Any], Any]) -> Write:
    h5py: Any = import_module("h5py")
    plugins: Any = import_module("hdf5plugin")

    def write(volume: np.ndarray, path: Path) -> None:
        with h5py.File(str(path) + ".h5", "w") as file:
            chunks = (1, *volume.shape[1:])
            file.create_dataset("hu", data=volume, chunks=chunks, shuffle=shuffle, **compression(plugins))

    return write


def _hdf5_zstd(level: int) -> Write:
    return _hdf5(True, lambda plugins: plugins.Zstd(clevel=level))


def _hdf5_blosc(level: int, shuffle: str) -> Write:
    return _hdf5(
        False, lambda plugins: plugins.Blosc(cname="zstd", clevel=level, shuffle=getattr(plugins.Blosc, shuffle))
    )


def _blosc2(level: int, shuffle: str) -> Write:
    blosc2: Any = import_module("blosc2")
    blosc2.set_nthreads(1)

    def write(volume: np.ndarray, path: Path) -> None:
        options = {"codec": blosc2.Codec.ZSTD, "clevel": level, "filters": [blosc2.Filter[shuffle]], "nthreads": 1}
        blosc2.asarray(volume, urlpath=str(path) + ".b2nd", mode="w", chunks=(1, *volume.shape[1:]), cparams=options)

    return write


def _png_files(codec: Callable[[], Any]) -> Write:
    encode = codec().encode

    def write(volume: np.ndarray, path: Path) -> None:
        path.mkdir()
        for z, one in enumerate(volume):
            (path / f"{z:04d}.png").write_bytes(encode(one))

    return write


def _png_webdataset() -> Write:
    webdataset: Any = import_module("webdataset")
    cv2: Any = import_module("cv2")

    def encode(one: np.ndarray) -> bytes:
        return cv2.imencode(".png", one.view(np.uint16) ^ PNG_OFFSET)[1].tobytes()

    def write(volume: np.ndarray, path: Path) -> None:
        with io.FileIO(str(path) + ".tar", "w") as file, webdataset.TarWriter(file) as sink:
            for z, one in enumerate(volume):
                sink.write({"__key__": f"{path.name}-{z:04d}", "png": encode(one)})

    return write


SIZES: dict[str, Callable[[], Write]] = {
    **{f"zarr zstd {level}": lambda level=level: _zarr_zstd(level) for level in (3, 9, 19)},
    **{
        f"zarr blosc zstd {level} {shuffle}": lambda level=level, shuffle=shuffle: _zarr_blosc(level, shuffle)
        for level in (1, 5, 9)
        for shuffle in ("shuffle", "bitshuffle")
    },
    **{f"hdf5 shuffle zstd {level}": lambda level=level: _hdf5_zstd(level) for level in (3, 9, 19)},
    **{
        f"hdf5 blosc zstd {level} {shuffle.lower()}": lambda level=level, shuffle=shuffle: _hdf5_blosc(level, shuffle)
        for level in (1, 5, 9)
        for shuffle in ("SHUFFLE", "BITSHUFFLE")
    },
}
"""Settings whose smallest is "the best zstd setting" of zarr and of HDF5."""
QUICK_SIZES = ("zarr zstd 3", "zarr blosc zstd 5 bitshuffle", "hdf5 shuffle zstd 3", "hdf5 blosc zstd 5 bitshuffle")
WRITERS: dict[str, Callable[[], Write]] = {
    "zarr zstd 3": SIZES["zarr zstd 3"],
    "zarr blosc zstd 5 bitshuffle": SIZES["zarr blosc zstd 5 bitshuffle"],
    "hdf5 shuffle zstd 3": SIZES["hdf5 shuffle zstd 3"],
    "hdf5 blosc zstd 5 bitshuffle": SIZES["hdf5 blosc zstd 5 bitshuffle"],
    "blosc2 b2nd zstd 1 bitshuffle": lambda: _blosc2(1, "BITSHUFFLE"),
    "blosc2 b2nd zstd 5 shuffle": lambda: _blosc2(5, "SHUFFLE"),
    "png16 files imagecodecs": lambda: _png_files(lambda: png_imagecodecs(None)),
    "png16 files opencv": lambda: _png_files(png_opencv),
    "png16 webdataset": _png_webdataset,
}
"""What packing is timed against: usual and fast settings."""


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class _Stores:
    def __init__(self, data: str, scratch: str, quick: bool) -> None:
        self.volumes = [np.load(path, allow_pickle=False) for path in sorted(Path(data).glob("*.npy"))]
        self.scratch, self.quick = Path(scratch), quick

    def write_all(self, write: Write) -> int:
        """Write all volumes into a new folder; returns its bytes, and removes it."""
        folder = self.scratch / "peers"
        folder.mkdir(parents=True)
        try:
            for number, volume in enumerate(self.volumes):
                write(volume, folder / f"volume{number:04d}")
            return _size_bytes(folder)
        finally:
            shutil.rmtree(folder)

    def sizes(self) -> list[dict[str, Any]]:
        names = QUICK_SIZES if self.quick else tuple(SIZES)
        return [{"family": n.split()[0], "name": n, "bytes": self.write_all(SIZES[n]())} for n in names]

    def writing(self, name: str) -> Setup:
        def setup() -> Prepared:
            write = WRITERS[name]()
            work = sum(volume.nbytes for volume in self.volumes)

            def run() -> float:
                self.write_all(write)
                return work

            return Prepared(run, {"packed_bytes": self.write_all(write)})

        return setup


@cache
def _shared(data: str, scratch: str, quick: bool) -> _Stores:
    return _Stores(data, scratch, quick)


def contenders(data: str, scratch: str, quick: bool) -> dict[str, Setup]:
    """Writers of the volumes in the folder `data` into `scratch`. Work: bytes of int16."""
    stores = _shared(data, scratch, quick)
    return {name: stores.writing(name) for name in WRITERS}


def tables(data: str, scratch: str, quick: bool) -> dict[str, Callable[[], Any]]:
    """`sizes`: bytes on disk of all volumes, with each setting of zarr and HDF5."""
    return {"sizes": _shared(data, scratch, quick).sizes}
