"""Our shards in other people's pipelines: windows streamed by `webdataset`, tar after tar.

    shards of a side -> split by node and worker -> volumes (webdataset's tar reader) -> windows -> shuffle buffer

Invariant: a window that comes out is what was packed (every frame's hash is compared), of a volume of the side that was
asked for. The structure of a shard is checked before its stream is read: no size that a header claims is believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinox_io.batch import Room
from dinox_io.codec import FILTERS, SliceDecoder
from dinox_io.errors import ShardError
from dinox_io.manifest import set_folder
from dinox_io.shard import BODY_SUFFIX, ShardEntry, read_shard_index
from dinox_io.shardset import ShardSet, open_shards
from dinox_io.storage import LocalFile
from dinox_io.window import window_slices

if TYPE_CHECKING:
    from webdataset.pipeline import DataPipeline

Sample = dict[str, Any]
_BODY = BODY_SUFFIX.removeprefix(".")


def webdataset_pipeline(
    path: str | Path,
    *,
    depth: int = 3,
    step: int = 1,
    edge: str = "clamp",
    split: str | None = "train",
    shuffle_buffer: int = 512,
    seed: int = 0,
) -> DataPipeline:
    """One pass over the windows of a side, as a `webdataset.DataPipeline`: for trainers that have one already.

    `dinox_io.Loader` is faster and exact. What this gives up:

    - Randomness. Shards are shuffled, and windows within a buffer: neighbours of one volume come near each other. A
      batch of the loader is spread over the whole side.
    - Exact epochs over several nodes or workers: each has the windows of its own shards, some more, some fewer. Fix the
      length (`.with_epoch(windows)`), or ranks that wait for each other hang at the end.
    - Resume: it has no state. Worker processes that end with an epoch begin the next with the same order
      (`DataLoader(persistent_workers=True)` keeps them, and `.repeat()` goes on).
    - Bytes: whole shards are read, other sides' volumes too; whatever is not drawn was read in vain.

    Args:
        path: folder of a set on this machine, or one of its manifests.
        depth, step, edge: of a window, as in `Loader` and `open_shards`.
        split: side to draw from; None: all volumes.
        shuffle_buffer: windows to choose the next one from, in each process; about as many decoded slices are in
            memory. 0: shards and windows come in order.
        seed: of the order of shards (the same on all nodes) and in the buffers.

    Yields dicts: `window` int16 HU (depth, y, x) of its own memory; `__key__` "volume id/centre"; `__url__` path of the
    shard; `volume` id; `center` z of the middle slice; `spacing_mm` (z, y, x). See `collate` for batches.

    Raises:
        ImportError: webdataset is not installed. ValueError: an argument is impossible, or the side has no window;
        when iterated, that there are fewer shards than nodes times workers. ShardError: damage, also when iterated.
    """
    try:
        from webdataset.filters import detshuffle
        from webdataset.pipeline import DataPipeline
        from webdataset.shardlists import split_by_node, split_by_worker
    except ImportError as error:
        raise ImportError("webdataset is not installed: pip install 'dinox[webdataset]'") from error
    if "://" in str(path):
        raise ValueError(f"{path}: this pipeline streams a set that lies in a folder; open_shards reads others")
    if shuffle_buffer < 0:
        raise ValueError(f"shuffle_buffer is {shuffle_buffer}; it must be at least 0")
    with open_shards(path, edge=edge) as shards:
        windows = _Windows(depth=depth, step=step, edge=edge, centers=_centers(shards, split, depth, step))
        streamed = _streamed(shards, Path(str(set_folder(path)[0])).resolve(), windows.centers)
    shuffle = [detshuffle(size, initial=size, seed=seed) for size in (len(streamed), shuffle_buffer)]
    return DataPipeline(
        [streamed],
        shuffle[0] if shuffle_buffer else None,
        split_by_node,
        split_by_worker,
        _at_least_one,
        _volumes,
        windows,
        shuffle[1] if shuffle_buffer else None,
        _stacked,
    )


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Windows of the pipeline as a batch: `pipeline.compose(webdataset.batched(64, collation_fn=collate))`.

    Returns `images` int16 HU (b, depth, Y, X), Y and X the largest of these b, -1024 beyond a slice's true size;
    `sizes` int32 (b, 2), that size; `spacing_mm` float64 (b, 3); `center` int64 (b,); `volume`, a list of b ids.
    """
    windows = [sample["window"] for sample in samples]
    sizes = np.array([window.shape[1:] for window in windows], np.int32)
    return {
        "images": Room((int(sizes[:, 0].max()), int(sizes[:, 1].max()))).assemble(windows),
        "sizes": sizes,
        "spacing_mm": np.array([sample["spacing_mm"] for sample in samples], np.float64),
        "center": np.array([sample["center"] for sample in samples], np.int64),
        "volume": [sample["volume"] for sample in samples],
    }


# --- which shards, which windows ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A shard with volumes of the side; digests of their KEY.json and seek table by id, as the manifest has them."""

    path: Path
    size: int
    digests: dict[str, tuple[str, str]]


def _centers(shards: ShardSet, split: str | None, depth: int, step: int) -> dict[str, range]:
    """The centres of each volume of the side by its id; volumes without a window are left out."""
    table = shards.window_table(shards.volumes_of(split), depth, step)
    if table.num_windows == 0:
        raise ValueError(f"the side {split!r} has no window of {depth} slices, {step} apart, with edge {shards.edge!r}")
    rows = zip(table.volume.tolist(), table.first_center.tolist(), table.centers.tolist(), strict=True)
    return {shards.volumes[volume].id: range(first, first + count) for volume, first, count in rows if count}


def _streamed(shards: ShardSet, folder: Path, wanted: Mapping[str, range]) -> list[_Shard]:
    found = []
    for shard in shards.manifest["shards"]:
        digests = {
            volume["id"]: (volume["meta_sha256"], volume["seek_table_sha256"])
            for volume in shard["volumes"]
            if volume["id"] in wanted
        }
        if digests:
            found.append(_Shard(path=folder / shard["name"], size=shard["size"], digests=digests))
    return found


# --- stages: each an iterator of an iterator, and picklable for worker processes ---------------------------------


def _at_least_one(shards: Iterable[_Shard]) -> Iterator[_Shard]:
    """A process without a shard would give no window, and let the others wait for ever."""
    count = 0
    for count, shard in enumerate(shards, start=1):  # noqa: B007 (read behind the loop)
        yield shard
    if not count:
        raise ValueError(
            "this process has no shard: nodes times workers are more than the shards with volumes of this side. Take "
            "fewer workers, or pack with a smaller --shard-size"
        )


def _volumes(shards: Iterable[_Shard]) -> Iterator[Sample]:
    """The volumes of the side in each shard, compressed, as webdataset reads them; `entry` is added."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for shard in shards:
        entries = _checked_entries(shard)
        with shard.path.open("rb") as stream:
            members = tar_file_expander(
                iter([{"url": str(shard.path), "stream": stream}]),
                select_files=lambda name, entries=entries: name.partition(".")[0] in entries,
            )
            for sample in group_by_keys(members):
                yield sample | {"entry": entries[sample["__key__"]]}


def _checked_entries(shard: _Shard) -> dict[str, ShardEntry]:
    """The volumes of the side by id. ShardError for a header, KEY.json or seek table that was not packed so."""
    file = LocalFile(shard.path)
    try:
        entries = {entry.meta.id: entry for entry in read_shard_index(file, shard.size)}
    finally:
        file.close()
    for key, digests in shard.digests.items():
        entry = entries.get(key)
        if entry is None or (entry.meta_sha256, entry.seek_table_sha256) != digests:
            raise ShardError("is not the volume that the manifest names", file=shard.path.name, volume=key)
    return {key: entries[key] for key in shard.digests}


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Volumes to windows, whose slices are not yet together: windows in the shuffle buffer share them."""

    depth: int
    step: int
    edge: str
    centers: dict[str, range]

    def __call__(self, volumes: Iterable[Sample]) -> Iterator[Sample]:
        decoders = {name: SliceDecoder(name) for name in FILTERS}
        for volume in volumes:
            yield from self._of(volume, decoders[volume["entry"].meta.filter])

    def _of(self, volume: Sample, decoder: SliceDecoder) -> Iterator[Sample]:
        entry: ShardEntry = volume["entry"]
        meta, reach = entry.meta, self.depth // 2 * self.step
        told = {"__url__": volume["__url__"], "volume": meta.id, "spacing_mm": meta.spacing_mm}
        frames = _Frames(entry, volume[_BODY], Path(volume["__url__"]).name, decoder)
        decoded: dict[int, np.ndarray] = {}
        for center in self.centers[meta.id]:
            wanted = window_slices(center, self.depth, self.step, meta.shape[0], self.edge).tolist()
            decoded = {z: one for z, one in decoded.items() if z >= center - reach}
            for z in wanted:
                if z not in decoded:
                    decoded[z] = frames.decode(z)
            slices = [decoded[z] for z in wanted]
            yield {"__key__": f"{meta.id}/{center}", **told, "center": center, "slices": slices}


class _Frames:
    """The frames of one volume in memory."""

    def __init__(self, entry: ShardEntry, body: bytes, file_name: str, decoder: SliceDecoder) -> None:
        self._entry, self._body, self._file_name, self._decoder = entry, memoryview(body), file_name, decoder
        self._starts = np.concatenate([[0], np.cumsum(entry.frames["compressed"], dtype=np.int64)])

    def decode(self, z: int) -> np.ndarray:
        """int16 HU (y, x) of slice z, its hash compared; ShardError."""
        _, y, x = self._entry.meta.shape
        out = np.empty((y, x), np.int16)
        frame = self._body[int(self._starts[z]) : int(self._starts[z + 1])]
        try:
            self._decoder.decode_into(frame, out, int(self._entry.frames["checksum"][z]))
        except ShardError as error:
            raise error.at(file=self._file_name, volume=self._entry.meta.id, slice_index=z) from None
        return out


def _stacked(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        slices = sample.pop("slices")
        yield sample | {"window": np.stack(slices)}
