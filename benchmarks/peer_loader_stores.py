"""How the peers store volumes slice by slice, and read a few slices of one back. Runs in the peers' interpreter.

Invariant: nothing of dinox is imported; a store holds each volume int16 (z, y, x) without loss, and is read by
`Reader.read`, whose result is compared bit for bit before it is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from peer_codecs import PNG_OFFSET
from peer_stores import WRITERS, Write

Shapes = Sequence[Sequence[int]]


class Reader(Protocol):
    """An open store."""

    def read(self, volume: int, first: int, out: np.ndarray) -> None:
        """Slices first … first + s of a volume into out, int16 (s, y, x)."""
        ...

    def read_many(self, wanted: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        """For each row the slices of a window, into out, int16 (b, s, y, x)."""
        ...

    def close(self) -> None:
        """Forget open files and maps."""
        ...


class _Arrays:
    """One array a volume, opened at its first use."""

    def __init__(self, folder: Path, opened: Callable[[Path, int], Any]) -> None:
        self._folder, self._opened, self._arrays = folder, opened, {}

    def array(self, volume: int) -> Any:
        if volume not in self._arrays:
            self._arrays[volume] = self._opened(self._folder / f"{volume:04d}", volume)
        return self._arrays[volume]

    def read(self, volume: int, first: int, out: np.ndarray) -> None:
        out[...] = self.array(volume)[first : first + len(out)]

    def read_many(self, wanted: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        for row, (volume, first) in zip(out, wanted, strict=True):
            self.read(volume, first, row)

    def close(self) -> None:
        self._arrays.clear()


@dataclass(frozen=True)
class Store:
    """write: one volume under a path without a suffix. open: (folder, shapes, mapped, threads) -> Reader.

    packages: what it needs. processes: whether its users decode in DataLoader's workers; else it has threads of its
    own, or none.
    """

    write: Callable[[], Write]
    open: Callable[[Path, Shapes, bool, int], Reader]
    packages: tuple[str, ...]
    processes: bool = True


# ---------------------------------------------------------------------------------------------- .npy, PNG, NIfTI


def _save(volume: np.ndarray, path: Path) -> None:
    np.save(path.with_suffix(".npy"), volume, allow_pickle=False)


class _Raw(_Arrays):
    """Memory-mapped; where a map would keep pages in the cache (cold rounds) it is made anew for each window."""

    def __init__(self, folder: Path, shapes: Shapes, mapped: bool) -> None:
        super().__init__(folder, self._map)
        self._shapes, self._mapped = shapes, mapped

    def _map(self, path: Path, volume: int) -> Any:
        shape = tuple(self._shapes[volume])
        return np.memmap(path.with_suffix(".npy"), np.int16, "r", offset=128, shape=shape)

    def read(self, volume: int, first: int, out: np.ndarray) -> None:
        super().read(volume, first, out)
        if not self._mapped:
            self.close()


class _RawRead(_Arrays):
    """`preadv` straight into the slot."""

    def __init__(self, folder: Path, shapes: Shapes) -> None:
        super().__init__(folder, lambda path, _: os.open(path.with_suffix(".npy"), os.O_RDONLY))
        self._shapes = shapes

    def read(self, volume: int, first: int, out: np.ndarray) -> None:
        slice_bytes = 2 * self._shapes[volume][1] * self._shapes[volume][2]
        if (
            os.preadv(self.array(volume), [out.reshape(-1).view(np.uint8).data], 128 + first * slice_bytes)
            != out.nbytes
        ):
            raise OSError("the array ends early")

    def close(self) -> None:
        for descriptor in self._arrays.values():
            os.close(descriptor)
        super().close()


class _Png(_Arrays):
    """A file a slice, as DINO-X has it: cv2 is the fastest of PNG's usual readers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, lambda path, _: path)
        self._cv2: Any = import_module("cv2")
        self._cv2.setNumThreads(1)

    def read(self, volume: int, first: int, out: np.ndarray) -> None:
        for z, one in enumerate(out, first):
            stored = self._cv2.imread(str(self.array(volume) / f"{z:04d}.png"), self._cv2.IMREAD_UNCHANGED)
            np.bitwise_xor(stored, PNG_OFFSET, out=one.view(np.uint16))


def _nifti_writer() -> Write:
    nibabel: Any = import_module("nibabel")

    def write(volume: np.ndarray, path: Path) -> None:
        image = nibabel.Nifti1Image(volume.T, np.eye(4), dtype=np.int16)
        nibabel.save(image, str(path) + ".nii.gz")

    return write


class _Nifti(_Arrays):
    def __init__(self, folder: Path) -> None:
        nibabel: Any = import_module("nibabel")
        super().__init__(folder, lambda path, _: nibabel.load(str(path) + ".nii.gz").dataobj)

    def read(self, volume: int, first: int, out: np.ndarray) -> None:
        out[...] = np.asarray(self.array(volume)[:, :, first : first + len(out)]).T


# ---------------------------------------------------------------------------------------------- chunked arrays


def _zarr(folder: Path, *_: object) -> Reader:
    zarr: Any = import_module("zarr")
    return _Arrays(folder, lambda path, _: zarr.open_array(str(path) + ".zarr", mode="r"))


class _TensorStore(_Arrays):
    """Reads of a batch of 32 windows are in flight together; its own threads decode."""

    def __init__(self, folder: Path, threads: int) -> None:
        ts: Any = import_module("tensorstore")
        context = ts.Context({"data_copy_concurrency": {"limit": threads}, "file_io_concurrency": {"limit": threads}})

        def opened(path: Path, _: int) -> Any:
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path) + ".zarr/"}}
            return ts.open(spec, context=context, read=True).result()

        super().__init__(folder, opened)
        self._ts = ts

    def read(self, volume: int, first: int, out: np.ndarray) -> None:
        out[...] = self.array(volume)[first : first + len(out)].read().result()

    def read_many(self, wanted: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        for begin in range(0, len(wanted), 32):
            rows = range(begin, min(begin + 32, len(wanted)))
            reads = [self.array(v)[first : first + out.shape[1]].read() for v, first in wanted[rows.start : rows.stop]]
            for row, read in zip(rows, reads, strict=True):
                out[row] = read.result()


class _Hdf5(_Arrays):
    """Without its cache of decoded chunks: on a set larger than memory it would hold nothing that is asked for."""

    def __init__(self, folder: Path) -> None:
        h5py: Any = import_module("h5py")
        import_module("hdf5plugin")
        self._files = ExitStack()

        def opened(path: Path, _: int) -> Any:
            return self._files.enter_context(h5py.File(str(path) + ".h5", "r", rdcc_nbytes=0))["hu"]

        super().__init__(folder, opened)

    def read(self, volume: int, first: int, out: np.ndarray) -> None:
        self.array(volume).read_direct(out, np.s_[first : first + len(out)])

    def close(self) -> None:
        super().close()
        self._files.close()


def _blosc2(folder: Path, _shapes: Shapes, mapped: bool, _threads: int) -> Reader:
    blosc2: Any = import_module("blosc2")
    blosc2.set_nthreads(1)
    mode = {"mmap_mode": "r"} if mapped else {"mode": "r"}
    return _Arrays(folder, lambda path, _: blosc2.open(str(path) + ".b2nd", **mode))


# ---------------------------------------------------------------------------------------------- ArrayRecord


def _array_record_writer() -> Write:
    module: Any = import_module("array_record.python.array_record_module")

    def write(volume: np.ndarray, path: Path) -> None:
        writer = module.ArrayRecordWriter(str(path) + ".array_record", "group_size:1,zstd:3")
        for one in volume:
            writer.write(one.tobytes())
        writer.close()

    return write


class _ArrayRecord(_Arrays):
    def __init__(self, folder: Path, threads: int) -> None:
        module: Any = import_module("array_record.python.array_record_module")
        # No read-ahead: the record wanted next is a random one.
        options = f"readahead_buffer_size:0,max_parallelism:{threads}"
        super().__init__(folder, lambda path, _: module.ArrayRecordReader(str(path) + ".array_record", options))

    def read(self, volume: int, first: int, out: np.ndarray) -> None:
        records = self.array(volume).read(list(range(first, first + len(out))))
        for one, record in zip(out, records, strict=True):
            one[...] = np.frombuffer(record, np.int16).reshape(one.shape)


STORES: dict[str, Store] = {
    "png16 files": Store(WRITERS["png16 files opencv"], lambda folder, *_: _Png(folder), ("cv2",)),
    "npy memmap": Store(lambda: _save, lambda folder, shapes, mapped, _: _Raw(folder, shapes, mapped), ()),
    "npy pread": Store(lambda: _save, lambda folder, shapes, *_: _RawRead(folder, shapes), ()),
    "zarr zstd": Store(WRITERS["zarr zstd 3"], _zarr, ("zarr",)),
    "zarr blosc": Store(WRITERS["zarr blosc zstd 5 bitshuffle"], _zarr, ("zarr",)),
    "tensorstore zstd": Store(
        WRITERS["zarr zstd 3"], lambda folder, _, __, threads: _TensorStore(folder, threads), ("zarr", "tensorstore"),
        processes=False,
    ),
    "tensorstore blosc": Store(
        WRITERS["zarr blosc zstd 5 bitshuffle"], lambda folder, _, __, threads: _TensorStore(folder, threads),
        ("zarr", "tensorstore"), processes=False,
    ),
    "hdf5 zstd": Store(WRITERS["hdf5 shuffle zstd 3"], lambda folder, *_: _Hdf5(folder), ("h5py", "hdf5plugin")),
    "hdf5 blosc": Store(
        WRITERS["hdf5 blosc zstd 5 bitshuffle"], lambda folder, *_: _Hdf5(folder), ("h5py", "hdf5plugin")
    ),
    "blosc2": Store(WRITERS["blosc2 b2nd zstd 1 bitshuffle"], _blosc2, ("blosc2",)),
    "array_record": Store(
        _array_record_writer, lambda folder, _, __, threads: _ArrayRecord(folder, threads), ("array_record",)
    ),
    "nifti gz": Store(_nifti_writer, lambda folder, *_: _Nifti(folder), ("nibabel",)),
}  # fmt: skip
SHARED = {
    "npy pread": "npy memmap", "tensorstore zstd": "zarr zstd", "tensorstore blosc": "zarr blosc",
}  # fmt: skip
"""Stores that read what another one wrote."""
