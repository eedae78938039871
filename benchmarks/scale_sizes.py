"""What a set of n volumes takes, by the project's own code on volumes that exist as numbers only: no pixel is there.

Invariant: what is measured is what training would do with such a set (its manifest, its index, its order); nothing is
assumed of them. Sizes that are not run are extrapolated in a straight line from the largest that was, and say so.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dinox_io
from dinox_io.canonical import canonical_json, parse_json_object
from dinox_io.descriptors import Descriptors, HeldFile
from dinox_io.index import SetIndex, encode_index
from dinox_io.manifest import build_manifest, commit_set
from dinox_io.mixture import Mixture
from dinox_io.plan import Planner
from dinox_io.settings import PackSettings
from dinox_io.shard import ShardSummary, ShardWriter, VolumeSummary, encode_volume
from dinox_io.shardset import ShardSet
from dinox_io.storage import LocalFolder
from dinox_io.stretches import StretchFinder
from dinox_io.volume import Volume
from dinox_io.window import table_of

SLICES, SIDE, SPACING_MM = 250, 512, (1.25, 0.7, 0.7)
"""Of a volume."""
FRAME_BYTES = 2 * SIDE * SIDE / 2.75
"""Of a slice in a shard (docs/loader.md)."""
DEPTH, RUN_LENGTH = 3, 8
SHARD_BYTES: int = PackSettings.shard_bytes
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class SetSizes:
    """Bytes, seconds and counts of a set of so many volumes."""

    volumes: int
    manifest_bytes: float
    index_bytes: float
    parse_s: float
    """To parse the manifest."""
    open_bytes: float
    """Host memory of an open set: manifest, index and records."""
    measured: bool
    """False: extrapolated from a smaller set."""

    @property
    def stored_bytes(self) -> float:
        """Of its shards."""
        return self.volumes * SLICES * FRAME_BYTES

    @property
    def shards(self) -> int:
        """Files of the packer's usual size."""
        return -(-int(self.stored_bytes) // SHARD_BYTES)

    def opening_reads(self, ranks: int) -> float:
        """Small reads of a rank that opens the set: manifest and index, and its share of the heads and the volumes."""
        return 2 + (self.shards + self.volumes) / ranks


def made_up_manifest(volumes: int) -> dict[str, Any]:
    """The manifest of so many volumes, as packing would write it."""
    per_shard = max(int(SHARD_BYTES / (SLICES * FRAME_BYTES)), 1)
    histogram = np.zeros(4096, np.int64)
    histogram[::40] = 123_456  # a hundred bins: as many as CT fills of those of 16 HU
    summaries = []
    for number, first in enumerate(range(0, volumes, per_shard)):
        listed = tuple(_summary(volume) for volume in range(first, min(first + per_shard, volumes)))
        size = int(len(listed) * SLICES * FRAME_BYTES) + (1 << 20)
        name = f"shard-{number:06d}.tar"
        summaries.append(
            ShardSummary(name=name, size=size, sha256=f"{number:064x}", volumes=listed, histogram=histogram)
        )
    sides = {f"{volume:032x}": "val" if volume % 10 == 9 else "train" for volume in range(volumes)}
    made = build_manifest(
        summaries, sides=sides, options={}, rejected_by_code={}, config_digest="0" * 64, leaks=[],
        packer="simulate", sources={"files": 0, "bytes": 0}, previous=None,
    )  # fmt: skip
    return made | {"index_sha256": "0" * 64, "self": "0" * 64}


def _summary(number: int) -> VolumeSummary:
    name, digest = f"{number:032x}", f"{number:064x}"
    return VolumeSummary(
        id=name, patient=f"{number // 2:032x}", series=name, shape=(SLICES, SIDE, SIDE), spacing_mm=SPACING_MM,
        digest=digest, offset=1024, meta_bytes=6000, body_bytes=int(SLICES * FRAME_BYTES), meta_sha256=digest,
        seek_table_sha256=digest,
    )  # fmt: skip


def made_up_index(volumes: int, depth: int = SLICES) -> SetIndex:
    """The index of so many volumes of `depth` slices."""
    slices = volumes * depth
    columns: dict[str, Any] = {
        "shard": np.zeros(volumes, "<u4"),
        "meta_offset": np.zeros(volumes, "<u8"),
        "meta_bytes": np.full(volumes, 6000, "<u8"),
        "body_offset": np.zeros(volumes, "<u8"),
        "shape": np.tile(np.array([depth, SIDE, SIDE], "<u4"), (volumes, 1)),
        "filter": np.zeros(volumes, "u1"),
        "spacing_mm": np.tile(np.array(SPACING_MM, "<f8"), (volumes, 1)),
        "orientation": np.tile(np.array(AXIAL, "<f8"), (volumes, 1)),
        "frame_bytes": np.full(slices, int(FRAME_BYTES), "<u4"),
        "checksum": np.zeros(slices, "<u4"),
        "z_mm": np.tile(np.arange(depth, dtype="<f8"), volumes),
    }
    return SetIndex(columns)


def measured_set(volumes: int, depth: int = SLICES) -> SetSizes:
    """Make, write and parse the manifest and the index of so many volumes, and open the set without its files.

    depth: slices of a volume, as the index and the records have them.
    """
    written = canonical_json(made_up_manifest(volumes))
    index_bytes = len(encode_index(made_up_index(volumes, depth)))
    begin_s = time.process_time()
    parse_json_object(written, "manifest.json")
    parse_s = time.process_time() - begin_s
    tracemalloc.start()
    try:
        manifest = parse_json_object(written, "manifest.json")
        opened = ShardSet(LocalFolder(Path()), [], manifest, made_up_index(volumes, depth), "clamp", "first")
        open_bytes = tracemalloc.get_traced_memory()[0]
        assert len(opened.volumes) == volumes
    finally:
        tracemalloc.stop()
    return SetSizes(
        volumes=volumes, manifest_bytes=len(written), index_bytes=index_bytes, parse_s=parse_s, open_bytes=open_bytes,
        measured=True,
    )  # fmt: skip


def memory_of_index() -> tuple[float, float]:
    """Host memory of an open set: bytes a volume, and bytes a slice. Each rank has its own: none is shared."""
    few, more, deep = measured_set(100, 10), measured_set(300, 10), measured_set(300, 1010)
    of_slice = (deep.open_bytes - more.open_bytes) / (300 * 1000)
    return (more.open_bytes - few.open_bytes) / 200 - 10 * of_slice, of_slice


def extrapolated(largest: SetSizes, volumes: int) -> SetSizes:
    """A larger set, in proportion."""
    factor = volumes / largest.volumes
    return SetSizes(
        volumes=volumes, manifest_bytes=factor * largest.manifest_bytes, index_bytes=factor * largest.index_bytes,
        parse_s=factor * largest.parse_s, open_bytes=factor * largest.open_bytes, measured=False,
    )  # fmt: skip


@dataclass(frozen=True)
class OrderCost:
    """What the order of training takes."""

    start_s: float
    """To the first batch."""
    peak_bytes: int
    """The most memory over some batches of two passes."""


def order_cost(volumes: int, batch_size: int) -> OrderCost:
    """Of so many volumes; all sizes are run."""
    sizes = np.full(volumes, SLICES, np.int64)

    def make() -> Mixture:
        return Mixture([sizes], [1.0], batch_size=batch_size, seed=0, run_length=RUN_LENGTH)

    begin_s = time.perf_counter()
    make().batch(0)
    start_s = time.perf_counter() - begin_s
    tracemalloc.start()
    try:
        mixture = make()
        last = int(sizes.sum()) // batch_size
        for position in (0, 1, last - 1, last, last + 1):
            mixture.batch(position)
        return OrderCost(start_s, tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


class _Source:
    """Volumes as the stretches ask for them."""

    edge = "clamp"

    def num_slices_of(self, volume: int) -> int:
        """All have as many."""
        return SLICES


@dataclass(frozen=True)
class Reading:
    """What a rank reads for a window."""

    slices: float
    """Decoded for a window."""
    reads: float
    """Contiguous reads for a window."""


def reading_of(world: int, mode: str, *, batch_size: int, volumes: int = 200, batches: int = 96) -> Reading:
    """Of rank 0 of so many, planned with the loader's own code (a pool that is large enough). Raises ValueError where
    `world` does not divide the batch."""
    runs = RUN_LENGTH if mode == "runs" else 1
    sizes = np.full(volumes, SLICES, np.int64)
    table = table_of(np.arange(volumes), sizes, depth=DEPTH, step=1, edge="clamp", every=1)
    mixture = Mixture([sizes], [1.0], batch_size=batch_size, seed=0, run_length=runs)
    planner = Planner(mixture, [table], parts=1, rank=0, world=world)
    if runs == 1:
        return Reading(float(DEPTH), 1.0)
    finder = StretchFinder(mixture, [table], [_Source()], depth=DEPTH, parts=1)  # type: ignore[list-item]
    seen: set[tuple[int, ...]] = set()
    decoded = reads = windows = 0
    warm_up = 4 * RUN_LENGTH  # batches after which as many runs end as begin
    for sequence in range(batches + warm_up):
        for stretch in finder(planner(sequence), sequence):
            counts = sequence >= warm_up
            if stretch.key not in seen:
                seen.add(stretch.key)
                decoded += int((stretch.slices >= 0).sum()) * counts
                reads += counts
            windows += counts
    return Reading(decoded / windows, reads / windows)


@dataclass(frozen=True)
class Opening:
    """Seconds of a core for opening a set of tiny volumes on a local disk: what others do beside it does not count."""

    known_s: float
    """Manifest, index and records: each rank's."""
    checked_s: float
    """To compare each volume's members with them: shared by the ranks."""


def opening_s(folder: Path, volumes: int) -> Opening:
    """Of a set of so many volumes in one shard, of as many slices as real ones have, but tiny: pixels are not read."""
    random = np.random.default_rng(0)
    writer = ShardWriter(folder / "shard-000000.tar", config_digest="0" * 64)
    for number in range(volumes):
        name = f"{number:032x}"
        hu = random.integers(-1000, 1000, (SLICES, 4, 4)).astype(np.int16)
        writer.add(
            encode_volume(
                Volume(
                    id=name, series=name, patient=name, hu=hu, spacing_mm=SPACING_MM,
                    z_positions_mm=tuple(1.25 * z for z in range(SLICES)), orientation=AXIAL, facts={},
                )
            )
        )  # fmt: skip
    manifest = build_manifest(
        [writer.finish()], sides={f"{number:032x}": "train" for number in range(volumes)}, options={},
        rejected_by_code={}, config_digest="0" * 64, leaks=[], packer="simulate", sources={"files": 0, "bytes": 0},
        previous=None,
    )  # fmt: skip
    commit_set(folder, manifest)
    known_s, all_s = (_seconds_to_open(folder, share) for share in ((1, 2), (0, 2)))  # the one shard is rank 0's
    return Opening(known_s, max(all_s - known_s, 0.0))


def _seconds_to_open(folder: Path, share: tuple[int, int]) -> float:
    begin_s = time.process_time()
    dinox_io.open_shards(folder, share=share).close()
    return time.process_time() - begin_s


def reopening_s(folder: Path, rounds: int = 200) -> float:
    """By how much a read is longer whose file had given way to another one (dinox_io/descriptors.py)."""
    files = [HeldFile(folder / f"{name}.bin") for name in "ab"]
    for file in files:
        file.path.write_bytes(bytes(1))
    taken_s = {1: math.inf, 2: math.inf}
    for most in [1, 2] * 3:
        pool = Descriptors(most)
        begin_s = time.process_time()
        for number in range(rounds):
            pool.take(files[number % 2])
            pool.give(files[number % 2])
        taken_s[most] = min(taken_s[most], (time.process_time() - begin_s) / rounds)
        for file in files:
            pool.end(file)
            file.over = False
    return max(taken_s[1] - taken_s[2], 0.0)
