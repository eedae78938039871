"""A set of shards, on disk or in a bucket: its volumes, their slices and windows, each checked before it is believed.

Invariant: opening never writes, lists nothing, and reads a manifest, an index, and the small members of each volume;
pixels are checked by the hash of their frame when first touched. Damage of any kind, whenever found, is ShardError.
"""

from __future__ import annotations

import hashlib
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
from dinox_io.canonical import parse_json_object
from dinox_io.codec import FILTERS
from dinox_io.decoder import ThreadDecoder
from dinox_io.errors import ShardError
from dinox_io.index import INDEX_NAME, SetIndex, load_index, rebuild_index
from dinox_io.loading import slab_pipeline
from dinox_io.manifest import EARLIER_FOLDER, SIDES, manifest_in, set_folder
from dinox_io.members import check_shards
from dinox_io.pace import Pace
from dinox_io.pipeline import default_threads
from dinox_io.plan import in_order
from dinox_io.record import RESERVED_KEYS
from dinox_io.shard import BLOCK
from dinox_io.storage import ShardFile, ShardFolder, read_bytes
from dinox_io.verify import Damage, verify_manifest
from dinox_io.window import EDGES, WindowTable, in_slices, table_of, window_slices

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
        self,
        folder: ShardFolder,
        files: Sequence[ShardFile],
        manifest: dict[str, Any],
        index: SetIndex,
        edge: str,
        verify: str,
    ) -> None:
        self._folder, self._files, self._index, self._verify = folder, files, index, verify
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

    def verify(self, *, threads: int = 1) -> list[Damage]:
        """Read and hash every byte of its shards, and decode every slice; an empty list if all is whole.

        It looks at this set, with the manifest that it was opened with, also if another one stands there by now.
        """
        return verify_manifest(self._folder, self.manifest, earlier=self._superseded(), threads=threads)

    def _superseded(self) -> bool:
        try:
            return manifest_in(self._folder)["self"] != self.digest
        except ShardError:
            return False

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
        slices = window_slices(center, depth, step, self.num_slices_of(number), self.edge)
        self.read_frames_into(number, slices, out, self._thread_decoder())
        return out

    def facts(self, volume: VolumeRecord | int) -> dict[str, Any]:
        """What KEY.json says beyond the format's own members: docs/format.md lists the facts. Read from the shard.

        Raises:
            ShardError: KEY.json is not the one that was packed.
        """
        number = self._number(volume)
        file, record = self._files[int(self._index.shard[number])], self.volumes[number]
        start = int(self._index.meta_offset[number]) + BLOCK
        data = read_bytes(file, start, start + int(self._index.meta_bytes[number]))
        shard = self.manifest["shards"][int(self._index.shard[number])]
        listed = next(one["meta_sha256"] for one in shard["volumes"] if one["id"] == record.id)
        if hashlib.sha256(data).hexdigest() != listed:
            raise ShardError("its KEY.json is not the one that was packed", file=file.name, volume=record.id)
        members = parse_json_object(data, f"{file.name}: {record.id}")
        return {name: value for name, value in members.items() if name not in RESERVED_KEYS}

    def read_frames_into(
        self, volume: int, slices: np.ndarray, out: np.ndarray, decoder: ThreadDecoder, *, filtered: bool = False
    ) -> None:
        """Slices (s,), in any order, of volume number `volume` into `out`, int16 (s, y, x).

        One read over the bytes from the lowest to the highest; a slice that is wanted twice is decoded once, and where
        one is -1, none is. With `filtered`, out is uint8 (s, 2·y·x): what is unpacked, still filtered.
        """
        index, first = self._index, int(self._index.first[volume])
        file = self._files[int(index.shard[volume])]
        numbers = slices.tolist()
        wanted = numbers if min(numbers) >= 0 else [z for z in numbers if z >= 0]
        lowest, highest = min(wanted), max(wanted)
        offsets = index.frames(volume, lowest, highest + 1)
        start, stop = offsets[0], offsets[-1]
        begin_s = time.perf_counter()
        data = decoder.buffer(stop - start)
        try:
            file.read_into(start, data)
        except ShardError as error:
            raise error.at(volume=self.volumes[volume].id) from error
        decoder.read_s += time.perf_counter() - begin_s
        decoder.read_bytes += stop - start
        slice_decoder = decoder.of_filter(FILTERS[index.filter[volume]])
        decode = slice_decoder.decompress_into if filtered else slice_decoder.decode_into
        done: dict[int, int] = {}
        for row, z in enumerate(numbers):
            if z < 0:
                continue
            if z in done:
                out[row] = out[done[z]]
                continue
            number = first + z
            check = self._verify == "always" or (self._verify == "first" and not self._checked[number])
            try:
                decode(
                    data[offsets[z - lowest] - start : offsets[z - lowest + 1] - start],
                    out[row],
                    int(index.checksum[number]) if check else None,
                )
            except ShardError as error:
                raise error.at(file=file.name, volume=self.volumes[volume].id, slice_index=z) from None
            self._checked[number] = True
            done[z] = row

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

    def window_table(
        self,
        volumes: np.ndarray,
        depth: int,
        step: int = 1,
        every: int = 1,
        *,
        step_mm: float | None = None,
        every_mm: float | None = None,
    ) -> WindowTable:
        """The windows that these volumes (v,) have under the set's edge policy.

        step_mm and every_mm, where given, take the place of step and every: each volume's nearest number of slices.
        """
        num_slices, spacing_mm = self._index.shape[volumes, 0], self._index.spacing_mm[volumes, 0]
        return table_of(
            volumes,
            num_slices,
            depth=depth,
            step=step if step_mm is None else in_slices(step_mm, spacing_mm),
            edge=self.edge,
            every=every if every_mm is None else in_slices(every_mm, spacing_mm),
        )

    def num_slices_of(self, volume: int) -> int:
        """Slices of volume number `volume`."""
        return int(self._index.shape[volume, 0])

    def size_of(self, volume: np.ndarray) -> np.ndarray:
        """int64 (b, 2): true y, x of the slices of volumes (b,)."""
        return self._index.shape[volume, 1:].astype(np.int64)

    def spacing_of(self, volume: np.ndarray) -> np.ndarray:
        """float64 (b, 3): z, y, x in mm, of volumes (b,)."""
        return self._index.spacing_mm[volume].astype(np.float64)

    def filter_of(self, volume: np.ndarray) -> np.ndarray:
        """uint8 (b,): the filter of volumes (b,), as its place in `FILTERS`."""
        return np.asarray(self._index.filter[volume], np.uint8)

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
        return self._in_order(table, depth, min(batch_size, table.num_windows))

    def _in_order(self, table: WindowTable, depth: int, batch_size: int) -> Iterator[Batch]:
        pipeline = slab_pipeline(
            [self],
            in_order(table, batch_size),
            rows=batch_size,
            depth=depth,
            prefetch_bytes=_WINDOWS_PREFETCH_BYTES,
            pace=Pace(default_threads()),
            timeout_s=_WINDOWS_TIMEOUT_S,
        )
        try:
            while (batch := pipeline.take()) is not None:
                yield batch
        finally:
            pipeline.stop()


# --- opening -----------------------------------------------------------------------------------------------------


def open_shards(
    path: str | Path, edge: str = "clamp", verify: str = "first", *, share: tuple[int, int] = (0, 1)
) -> ShardSet:
    """Open the set in a folder or a bucket, or an earlier state of it by its `manifests/DIGEST.json`.

    Args:
        path: the folder that packing made, or the file of one of its manifests; or where they were copied to, a string
            s3://BUCKET/PREFIX (docs/data.md).
        edge: what a window holds beyond its volume: "clamp", "reflect", or "error" (such windows do not exist).
        verify: check the hash of each frame at its "first" touch, "always", or "never".
        share: (rank, ranks) where several processes open the set at once: each looks into its share of the shards now,
            all together into all of them; of the others it is told when it first reads there.

    Raises:
        ShardError: the set is damaged, of another version, or cannot be reached. ValueError: an unknown edge or verify,
            an impossible share. ImportError: a bucket without the extra `cloud`.
    """
    if edge not in EDGES or verify not in VERIFY:
        raise ValueError(f"edge {edge!r} must be one of {', '.join(EDGES)}, verify {verify!r} of {', '.join(VERIFY)}")
    if not 0 <= share[0] < share[1]:
        raise ValueError(f"share is {share}; it is (rank, ranks), the rank at least 0 and below the ranks")
    folder, name = set_folder(path)
    manifest = manifest_in(folder, name)
    files: list[ShardFile] = []
    try:
        files.extend(folder.open(shard["name"], shard["size"]) for shard in manifest["shards"])
        index = _trusted_index(folder, manifest, files, share, warn=not name.startswith(EARLIER_FOLDER))
        return ShardSet(folder, files, manifest, index, edge, verify)
    except BaseException:
        for file in files:
            file.close()
        raise


def _trusted_index(
    folder: ShardFolder, manifest: dict[str, Any], files: Sequence[ShardFile], share: tuple[int, int], *, warn: bool
) -> SetIndex:
    try:
        index = load_index(folder, manifest)
    except ShardError as error:
        if error.file != INDEX_NAME:
            raise
        # An earlier manifest has no index of its own: rebuilding is what is meant to happen.
        return _rebuilt_index(folder, manifest, files, error if warn else None)
    try:
        numbers = range(share[0], len(files), share[1])
        check_shards(files, manifest, index, numbers=numbers, in_flight=folder.in_flight)
    except ShardError as error:
        # Where one of several ranks finds that, the others would go on with the index as it is.
        if error.file != INDEX_NAME or share[1] > 1:
            raise
        return _rebuilt_index(folder, manifest, files, error)
    return index


def _rebuilt_index(
    folder: ShardFolder, manifest: dict[str, Any], files: Sequence[ShardFile], why: ShardError | None
) -> SetIndex:
    index = rebuild_index(files, manifest, in_flight=folder.in_flight)
    if why is not None:
        warnings.warn(f"{why}: ignored, and rebuilt from the shards", stacklevel=4)
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
