"""The features of one volume in one file, safetensors or npz, written batch by batch.

    cls      float32 (w, d)         a vector for each window
    patches  float32 (w, n, d)      a vector for each patch of each window, row by row
    slice    int64   (w,)           the window's middle slice, from 0
    z_mm     float64 (w,)           its height, millimetres along the slice normal
    grid     int64   (2,)           rows and columns of patches
    volume, patient, …              texts: a safetensors file's metadata, arrays of an npz

Invariant: a file has its name when it is whole, and no more than one batch of it is in memory.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dinox_io.atomic import fsync_folder, temporary_path

FORMAT = "dinox-features"
FORMATS = ("safetensors", "npz")
_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class ArraySpec:
    """A shape and a dtype's name."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class FeatureFile:
    """A file that is being written; a context manager: whole at its end, gone after an exception."""

    def __init__(self, path: Path, specs: Mapping[str, ArraySpec], texts: Mapping[str, str]) -> None:
        """path: ends with .safetensors or .npz. specs: all arrays, each to be filled by `put`."""
        self.path, self._specs, self._texts = path, specs, {"format": FORMAT, **texts}
        self._temporary = temporary_path(path)
        header, self._offsets = _layout(specs, self._texts)
        self._file = self._temporary.open("wb+")
        self._file.write(header)
        self._file.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))

    def put(self, name: str, start: int, values: np.ndarray) -> None:
        """Write rows [start, start + len(values)) of an array. ValueError for another dtype or shape."""
        spec = self._specs[name]
        if values.dtype != spec.dtype or values.shape[1:] != spec.shape[1:] or start + len(values) > spec.shape[0]:
            raise ValueError(f"{name} is {spec.dtype} {spec.shape}, not {values.dtype} {values.shape} at row {start}")
        self._file.seek(self._offsets[name] + start * (spec.nbytes // spec.shape[0]))
        self._file.write(np.ascontiguousarray(values).data)

    def __enter__(self) -> "FeatureFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self.path.suffix == ".npz":
            archive = self._temporary.with_name(self._temporary.name.replace(".npz", ".zip"))
            try:
                with archive.open("wb") as file:
                    self._copy_to_npz(file)
                    _sync(file)
                archive.replace(self.path)
            finally:
                archive.unlink(missing_ok=True)
        else:
            _sync(self._file)
            self._temporary.replace(self.path)
        fsync_folder(self.path.parent)

    def _copy_to_npz(self, file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, text in self._texts.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.array(text), allow_pickle=False)
            for name, spec in self._specs.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    description = np.lib.format.dtype_to_descr(np.dtype(spec.dtype))
                    header = {"descr": description, "fortran_order": False, "shape": spec.shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    self._file.seek(self._offsets[name])
                    for start in range(0, spec.nbytes, _PIECE_BYTES):
                        member.write(self._file.read(min(_PIECE_BYTES, spec.nbytes - start)))


def _layout(specs: Mapping[str, ArraySpec], texts: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file, and where in the file each array begins.

    Source: the format's description (github.com/huggingface/safetensors): 8 bytes of length, JSON, the arrays in a row.
    """
    starts: dict[str, int] = {}
    entries: dict[str, object] = {"__metadata__": dict(texts)}
    end = 0
    # Those of 8 bytes an element first, so that every array is aligned.
    for name in sorted(specs, key=lambda name: -np.dtype(specs[name].dtype).itemsize):
        spec = specs[name]
        starts[name], end = end, end + spec.nbytes
        entries[name] = {"dtype": _DTYPES[spec.dtype], "shape": spec.shape, "data_offsets": [starts[name], end]}
    document = json.dumps(entries).encode()
    document += b" " * (-len(document) % 8)
    header = len(document).to_bytes(8, "little") + document
    return header, {name: start + len(header) for name, start in starts.items()}


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
