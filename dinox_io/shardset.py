"""A set of shards on disk: its volumes, their slices and windows, each checked before it is believed.

Invariant: opening never writes, and reads a manifest, an index, and two small members of each volume; pixels are
checked by the hash of their frame when first touched. Damage of any kind, whenever found, is ShardError.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io.batch import Batch
from dinox_io.codec import FILTERS, SliceDecoder
from dinox_io.decoder import ThreadDecoder
from dinox_io.errors import ShardError
from dinox_io.index import SetIndex, check_shards, load_index, rebuild_index
from dinox_io.manifest import SIDES, read_manifest, set_folder
from dinox_io.pipeline import Pipeline, Plan, default_threads
from dinox_io.storage import LocalFile
from dinox_io.window import EDGES, WindowTable, table_of, window_slices

VERIFY = ("first", "always", "never")
_WINDOWS_PREFETCH_BYTES = 256 << 20
_WINDOWS_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True, eq=False)
class VolumeRecord:
    """One volume of a set. Its place in `ShardSet.volumes` is `index`."""

    index: int
    id: str
    patient: str
    series: str
    split: str
    """ "train", "val", "test" or "none"."""
    digest: str
    """sha256 of its int16 little-endian HU in C order."""
    shape: tuple[int, int, int]
    """z, y, x."""
    spacing_mm: tuple[float, float, float]
    """z, y, x."""
    z_positions_mm: np.ndarray
    """float64 (z,), ascending."""
    orientation: tuple[float, ...]
    """9 direction cosines: along a row, along a column, the slice normal."""


class ShardSet:
    """Volumes of one set; made by `open_shards`. May be read from many threads at once."""

    def __init__(
        self, files: list[LocalFile], manifest: dict[str, Any], index: SetIndex, edge: str, verify: str
    ) -> None:
        self._files, self._index, self._verify = files, index, verify
        self.manifest, self.edge = manifest, edge
        self.volumes: Sequence[VolumeRecord] = tuple(
            _record(number, volume, index) for number, volume in enumerate(manifest["volumes"])
        )
        # Which frames were checked. Two threads may both check one: its byte is set either way.
        self._checked = np.zeros(len(index.frame_bytes), bool)
        self._local = threading.local()

    @property
    def digest(self) -> str:
        """The manifest's `self`: names this very set."""
        return self.manifest["self"]

    @property
    def slice_size(self) -> tuple[int, int]:
        """Largest y and largest x of the set."""
        y, x = self._index.shape[:, 1:].max(axis=0)
        return int(y), int(x)

    def close(self) -> None:
        """Close its files; reading is over then. Idempotent."""
        for file in self._files:
            file.close()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading -----------------------------------------------------------------------------------------------

    def read(self, volume: VolumeRecord | int, start: int, stop: int) -> np.ndarray:
        """int16 HU (stop - start, y, x), one contiguous read. IndexError if the slices are not in the volume."""
        number = self._number(volume)
        depth, rows, columns = self.volumes[number].shape
        if not 0 <= start < stop <= depth:
            raise IndexError(f"slices {start} to {stop} are not in volume {self.volumes[number].id}, which has {depth}")
        out = np.empty((stop - start, rows, columns), np.int16)
        self.read_frames_into(number, np.arange(start, stop), out, self._thread_decoder())
        return out

    def read_window(self, volume: VolumeRecord | int, center: int, depth: int = 3, step: int = 1) -> np.ndarray:
        """int16 HU (depth, y, x), one contiguous read; beyond the volume, the set's edge policy. See window_slices."""
        number = self._number(volume)
        out = np.empty((depth, *self.volumes[number].shape[1:]), np.int16)
        self.decode_window(number, center, depth, step, out, self._thread_decoder())
        return out

    def decode_window(
        self, volume: int, center: int, depth: int, step: int, out: np.ndarray, decoder: ThreadDecoder
    ) -> None:
        """The window around `center` of volume number `volume` into `out`, int16 (depth, y, x)."""
        slices = window_slices(center, depth, step, int(self._index.shape[volume, 0]), self.edge)
        self.read_frames_into(volume, slices, out, decoder)

    def read_frames_into(self, volume: int, slices: np.ndarray, out: np.ndarray, decoder: ThreadDecoder) -> None:
        """Slices (s,), in any order, of volume number `volume` into `out`, int16 (s, y, x).

        One read over the bytes from the lowest to the highest; a slice that is wanted twice is decoded once.
        """
        index, first = self._index, int(self._index.first[volume])
        file = self._files[int(index.shard[volume])]
        lowest, highest = first + int(slices.min()), first + int(slices.max())
        start, stop = int(index.frame_offset[lowest]), int(index.frame_offset[highest] + index.frame_bytes[highest])
        begin_s = time.perf_counter()
        data = decoder.buffer(stop - start)
        try:
            file.read_into(start, data)
        except ShardError as error:
            raise error.at(volume=self.volumes[volume].id) from error
        decoder.read_s += time.perf_counter() - begin_s
        decoder.read_bytes += stop - start
        slice_decoder = decoder.of_filter(FILTERS[index.filter[volume]])
        done: dict[int, int] = {}
        for row, z in enumerate(slices.tolist()):
            if z in done:
                out[row] = out[done[z]]
                continue
            frame = int(index.frame_offset[first + z]) - start
            try:
                self._decode(
                    slice_decoder, first + z, data[frame : frame + int(index.frame_bytes[first + z])], out[row]
                )
            except ShardError as error:
                raise error.at(file=file.name, volume=self.volumes[volume].id, slice_index=z) from None
            done[z] = row

    def _decode(self, decoder: SliceDecoder, number: int, frame: memoryview, out: np.ndarray) -> None:
        check = self._verify == "always" or (self._verify == "first" and not self._checked[number])
        decoder.decode_into(frame, out, int(self._index.checksum[number]) if check else None)
        self._checked[number] = True

    def new_decoder(self) -> ThreadDecoder:
        """Buffers for one more thread that reads this set."""
        return ThreadDecoder()

    def _thread_decoder(self) -> ThreadDecoder:
        if not hasattr(self._local, "decoder"):
            self._local.decoder = ThreadDecoder()
        return self._local.decoder

    def _number(self, volume: VolumeRecord | int) -> int:
        number = volume.index if isinstance(volume, VolumeRecord) else volume
        if not 0 <= number < len(self.volumes) or (
            isinstance(volume, VolumeRecord) and volume is not self.volumes[number]
        ):
            raise IndexError(f"volume {volume if isinstance(volume, int) else volume.id} is not one of this set")
        return number

    # --- windows -----------------------------------------------------------------------------------------------

    def volumes_of(self, split: str | None) -> np.ndarray:
        """int64: indices of the volumes of a side (None: of all). ValueError, with what each side has, if none."""
        if split is not None and split not in SIDES:
            raise ValueError(f"split is {split!r}, not one of {', '.join(SIDES)}")
        chosen = [volume.index for volume in self.volumes if split in (None, volume.split)]
        if not chosen:
            counts = Counter(volume.split for volume in self.volumes)
            sides = ", ".join(f"{side} {counts[side]}" for side in SIDES)
            raise ValueError(f"no volume of this set is on the side {split!r}; volumes on each: {sides}")
        return np.array(chosen, np.int64)

    def window_table(self, volumes: np.ndarray, depth: int, step: int, every: int = 1) -> WindowTable:
        """The windows that these volumes (v,) have under the set's edge policy."""
        num_slices = self._index.shape[volumes, 0]
        return table_of(volumes, num_slices, depth=depth, step=step, edge=self.edge, every=every)

    def size_of(self, volume: np.ndarray) -> np.ndarray:
        """int64 (b, 2): true y, x of the slices of volumes (b,)."""
        return self._index.shape[volume, 1:].astype(np.int64)

    def spacing_of(self, volume: np.ndarray) -> np.ndarray:
        """float64 (b, 3): z, y, x in mm, of volumes (b,)."""
        return self._index.spacing_mm[volume].astype(np.float64)

    def place_of(self, volume: int) -> str:
        """File and volume, for messages."""
        return f"{self._files[int(self._index.shard[volume])].name}: volume {self.volumes[volume].id}"

    def windows(
        self, split: str | None = "val", every: int = 1, depth: int = 3, step: int = 1, batch_size: int = 64
    ) -> Iterator[Batch]:
        """All windows of a side, once and in order (every `every`-th of each volume), the last batch short.

        Each batch is valid until the next one is asked for. ValueError if the side has no volume or no window.
        """
        table = self.window_table(self.volumes_of(split), depth, step, every)
        if table.num_windows == 0 or batch_size < 1:
            raise ValueError(f"the side {split!r} has {table.num_windows} windows for batches of {batch_size}")
        return self._in_order(table, depth, step, min(batch_size, table.num_windows))

    def _in_order(self, table: WindowTable, depth: int, step: int, batch_size: int) -> Iterator[Batch]:
        def plan(number: int) -> Plan | None:
            windows = np.arange(number * batch_size, min((number + 1) * batch_size, table.num_windows))
            if not len(windows):
                return None
            volume, center = table.locate(windows)
            rows, epoch = np.arange(len(windows)), np.zeros(len(windows), np.int64)
            return Plan(volume=volume, center=center, epoch=epoch, rows=rows, position=number, part=0)

        pipeline = Pipeline(
            self,
            plan,
            first=0,
            slab_shape=(batch_size, depth, *self.slice_size),
            step=step,
            threads=default_threads(),
            prefetch_bytes=_WINDOWS_PREFETCH_BYTES,
            timeout_s=_WINDOWS_TIMEOUT_S,
        )
        try:
            while (batch := pipeline.take()) is not None:
                yield batch
        finally:
            pipeline.stop()


# --- opening -----------------------------------------------------------------------------------------------------


def open_shards(path: str | Path, edge: str = "clamp", verify: str = "first") -> ShardSet:
    """Open the set in a folder, or an earlier state of it by its `manifests/DIGEST.json`.

    Args:
        path: the folder that packing made, or the file of one of its manifests.
        edge: what a window holds beyond its volume: "clamp", "reflect", or "error" (such windows do not exist).
        verify: check the hash of each frame at its "first" touch, "always", or "never".

    Raises:
        ShardError: the set is damaged or of another version. ValueError: an unknown edge or verify.
    """
    if edge not in EDGES or verify not in VERIFY:
        raise ValueError(f"edge {edge!r} must be one of {', '.join(EDGES)}, verify {verify!r} of {', '.join(VERIFY)}")
    path = Path(path)
    manifest = read_manifest(path)
    folder, earlier = set_folder(path)
    files: list[LocalFile] = []
    try:
        for shard in manifest["shards"]:
            files.append(LocalFile(folder / shard["name"]))
            if files[-1].size != shard["size"]:
                raise ShardError(
                    f"has {files[-1].size} bytes where the manifest says {shard['size']}", file=shard["name"]
                )
        index = _trusted_index(folder, manifest, files, warn=not earlier)
        return ShardSet(files, manifest, index, edge, verify)
    except BaseException:
        for file in files:
            file.close()
        raise


def _trusted_index(folder: Path, manifest: dict[str, Any], files: list[LocalFile], *, warn: bool) -> SetIndex:
    try:
        index = load_index(folder, manifest)
    except ShardError as error:
        # An earlier manifest has no index of its own: rebuilding is what is meant to happen.
        if warn:
            warnings.warn(f"{error}: ignored, and rebuilt from the shards", stacklevel=3)
        return rebuild_index(files, manifest)
    check_shards(files, manifest, index)
    return index


def _record(number: int, volume: dict[str, Any], index: SetIndex) -> VolumeRecord:
    z_positions_mm = index.z_mm[index.first[number] : index.first[number + 1]]
    z_positions_mm.flags.writeable = False
    return VolumeRecord(
        index=number,
        id=volume["id"],
        patient=volume["patient"],
        series=volume["series"],
        split=volume["split"],
        digest=volume["digest"],
        shape=tuple(volume["shape"]),
        spacing_mm=tuple(volume["spacing_mm"]),
        z_positions_mm=z_positions_mm,
        orientation=tuple(index.orientation[number].tolist()),
    )
