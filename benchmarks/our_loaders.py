"""Our loader as contenders: random windows, runs, filtered; its kernel limit; its memory; what Python costs of it.

Runs in our interpreter, in processes of its own (serve.py); with DINOX_FILTERS=numpy for the tier without a compiler.
Invariant: a run begins and ends with all that may be made ahead made, so that it decodes just as many batches as it
takes; the first batch is compared bit for bit with the arrays before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import loader_meters
import machine
import numpy as np
from timing import Prepared, Setup

from dinox_io import Loader, codec, filters, open_shards
from dinox_io.batch import Batch
from dinox_io.codec import PRESETS, SliceEncoder
from dinox_io.decoder import ThreadDecoder
from dinox_io.filters import Scratch, remove_filter
from dinox_io.shardset import ShardSet
from dinox_io.storage import LocalFile

PACKAGES = ("numpy", "zstandard", "xxhash")
BATCH_SIZE, DEPTH = 64, 3
EPOCHS = 20


def versions() -> dict[str, str]:
    """Of what our loader stands on."""
    return machine.versions(PACKAGES)


class _Memory:
    """Gives the loader its memory, and says how much that was."""

    def __init__(self) -> None:
        self.size = 0

    def __call__(self, size: int) -> np.ndarray:
        self.size += size
        # Every page is touched now: a fresh one would cost whoever writes it first, in some round or other.
        return np.ones(size, np.uint8)


def settled(loader: Loader) -> None:
    """Wait until everything is made that may be made ahead: no thread of the loader has anything to do then."""
    pipeline = loader._pipeline

    def at_rest() -> bool:
        if pipeline._error is not None:
            return True
        if pipeline._jobs or pipeline._running or pipeline._planning:
            return False
        # A batch that is planned and not begun waits for room: rest as well.
        return len(pipeline._on_the_way) >= pipeline._ahead or pipeline._planned is not None

    with pipeline._changed:
        pipeline._changed.wait_for(at_rest, 60)


class _Ours:
    def __init__(self, folder: str, quick: bool, cold: bool) -> None:
        self.folder, self.quick, self.cold = Path(folder), quick, cold
        self.meters: dict[str, loader_meters.Meter] = {}
        self.colds: dict[str, loader_meters.Cold] = {}
        self.decoded_bytes: dict[str, float] = {}
        self.loaders: dict[tuple[Any, ...], tuple[Loader, _Memory]] = {}

    @cache  # noqa: B019 (it lives as long as the process)
    def set(self, preset: str) -> ShardSet:
        """Frames are hashed at their first touch, as users have it."""
        return open_shards(self.folder / preset, edge="error")

    @property
    def batches(self) -> int:
        return 2 if self.quick else (4 if self.cold else 8)

    def batches_of(self, loader: Loader, mode: str) -> int:
        """Of one run. Mode runs decodes much at the head of a group of runs and little at its end: a whole pass."""
        return max(loader.num_windows[0] // BATCH_SIZE, 1) if mode == "runs" and not self.quick else self.batches

    def loader(self, preset: str, mode: str, threads: int | None, filtered: bool) -> tuple[Loader, _Memory]:
        key = (preset, mode, threads, filtered)
        if key not in self.loaders:
            memory = _Memory()
            shards = self.set(preset)
            batch_size = min(BATCH_SIZE, sum(volume.shape[0] - DEPTH + 1 for volume in shards.volumes))
            self.loaders[key] = (
                Loader(shards, batch_size, mode=mode, threads=threads, filtered=filtered, slab=memory),
                memory,
            )
        return self.loaders[key]

    def loading(
        self, name: str, mode: str, *, preset: str = "small", threads: int | None = None, filtered: bool = False,
        images: bool = False,
    ) -> Setup:  # fmt: skip
        def setup() -> Prepared:
            loader, memory = self.loader(preset, mode, threads, filtered)
            batches = self.batches_of(loader, mode)
            self.check(next(loader), preset, images)
            settled(loader)
            meter = self.meters[name] = loader_meters.Meter()
            self.decoded_bytes[name] = 0.0

            def run() -> float:
                windows, before_bytes = 0, loader.counters["decoded_bytes"]
                for _ in range(batches):
                    batch = next(loader)
                    windows += len(batch.images if images else batch)
                settled(loader)
                self.decoded_bytes[name] += loader.counters["decoded_bytes"] - before_bytes
                return windows

            paths = loader_meters.files_under(self.folder / preset)
            cold = self.colds[name] = loader_meters.Cold(paths)
            facts = {
                "budget_bytes": memory.size, "packed_bytes": sum(path.stat().st_size for path in paths),
                "filters": filters.describe(),
            }  # fmt: skip
            return Prepared(meter.around(run), facts, cold if self.cold else None)

        return setup

    def check(self, batch: Batch, preset: str, images: bool) -> None:
        """ValueError unless a batch holds what the arrays hold."""
        shards = self.set(preset)
        for row, (number, center) in enumerate(zip(batch.volume.tolist(), batch.center.tolist(), strict=True)):
            record = shards.volumes[number]
            stored = np.load(self.folder / "npy" / f"{int(record.id, 16):04d}.npy", mmap_mode="r", allow_pickle=False)
            window = batch.images[row] if images else batch.windows[row]
            if batch.filtered:
                out, scratch = np.empty((DEPTH, *record.shape[1:]), np.int16), Scratch()
                for z, one in enumerate(window):
                    remove_filter(one, PRESETS[preset][0], out[z], scratch)
                window = out
            if not np.array_equal(window, stored[center - 1 : center + 2]):
                raise ValueError(f"the loader does not give back what was packed (volume {number}, slice {center})")

    def kernel(self) -> Prepared:
        """zstd and the unfilter of 3 slices of a random window, into memory that is used again: the limit."""
        frames, shape = self._frames()
        out = np.empty((BATCH_SIZE, DEPTH, *shape), np.int16)
        decompressor, scratch = codec.zstandard.ZstdDecompressor(), Scratch()
        filtered = scratch.fit(shape).filtered
        chance = np.random.default_rng(0)

        def run() -> float:
            for row, first in enumerate(chance.integers(0, len(frames) - DEPTH + 1, BATCH_SIZE).tolist()):
                for z in range(DEPTH):
                    decompressor.stream_reader(frames[first + z]).readinto(filtered.data)
                    remove_filter(filtered, PRESETS["small"][0], out[row, z], scratch)
            return BATCH_SIZE

        return Prepared(run, {"frames": len(frames)})

    def _frames(self) -> tuple[list[bytes], tuple[int, int]]:
        encoder, frames = SliceEncoder(*PRESETS["small"]), []
        shape = (0, 0)
        for path in sorted((self.folder / "npy").glob("*.npy")):
            for one in np.load(path, mmap_mode="r", allow_pickle=False):
                shape = (one.shape[0], one.shape[1])
                frames.append(encoder.encode(np.ascontiguousarray(one)).data)
        return frames, shape

    # --- tables ----------------------------------------------------------------------------------------------

    def spent(self) -> dict[str, Any]:
        """Of each contender that ran: a window's CPU time, bytes read, slices decoded; what stayed in the cache."""
        y, x = self.set("small").slice_size
        return {
            name: {
                **meter.described(),
                "slices": self.decoded_bytes[name] / (2 * y * x) / max(meter.windows, 1),
                "left_in_cache": self.colds[name].left if self.cold else None,
            }
            for name, meter in self.meters.items()
        }

    def memory(self, mode: str) -> dict[str, Any]:
        """USS of this process after each of 20 epochs, and the budget: slabs or pool."""
        before = loader_meters.uss_bytes()
        loader, memory = self.loader("small", mode, None, False)
        batches = max(loader.num_windows[0] // BATCH_SIZE, 1)
        uss: list[int] = []
        for _ in range(EPOCHS):
            for _ in range(batches):
                next(loader)
            uss.append(loader_meters.uss_bytes())
        return {"before_bytes": before, "budget_bytes": memory.size, "uss_bytes": uss}

    def stages(self) -> dict[str, float]:
        """Shares of the thread time of random windows with one thread, by the loader's own counters."""
        loader, _ = self.loader("small", "random", 1, False)
        before, begin_s = loader.counters, time.perf_counter()
        for _ in range(4 * self.batches):
            next(loader)
        settled(loader)
        wall_s, after = time.perf_counter() - begin_s, loader.counters
        shares = {name: (after[name] - before[name]) / wall_s for name in ("read_s", "decode_s", "unfilter_s")}
        return {**shares, "the rest": 1 - sum(shares.values())}

    def python_share(self) -> dict[str, float]:
        """What of the decoding of a slice is not in pread, zstd and the unfilter, which let the GIL go: s a slice.

        The same read path runs with those three replaced by functions that do nothing, so "held_s" is Python's part,
        an upper bound of the time for which one thread holds the GIL; "whole_s" is the true path's. "loader_s" is the
        whole loader's with them replaced: planning, hand-over and the consumer's loop as well.
        """
        shards = open_shards(self.folder / "small", edge="error", verify="never")
        repeats = 40 if self.quick else 1000
        whole = _of_reads(shards, repeats)
        y, x = shards.slice_size
        with _without_kernels(SliceEncoder(*PRESETS["small"]).encode(np.zeros((y, x), np.int16)).data):
            held = _of_reads(shards, repeats)
            with Loader(shards, BATCH_SIZE, mode="random", threads=1, slab=_Memory()) as loader:
                settled(loader)
                begin_s = time.perf_counter()
                for _ in range(self.batches * 4):
                    next(loader)
                settled(loader)
                loader_s = (time.perf_counter() - begin_s) / (self.batches * 4 * BATCH_SIZE * DEPTH)
        return {"whole_s": whole, "held_s": held, "loader_s": loader_s}

    def index_bytes(self) -> dict[str, float]:
        """Bytes of the index's arrays in memory: of a slice, and of a volume."""
        index = self.set("small")._index
        slices, volumes = len(index.frame_bytes), len(index.shape)
        arrays = [value for value in vars(index).values() if isinstance(value, np.ndarray)]
        of_slices = sum(array.nbytes for array in arrays if len(array) == slices)
        rest = sum(array.nbytes for array in arrays if len(array) != slices)
        checked = self.set("small")._checked.nbytes
        return {"slice": (of_slices + checked) / slices, "volume": rest / volumes}


def _of_reads(shards: ShardSet, repeats: int) -> float:
    """s a slice of reading random windows, on this thread."""
    decoder, chance = ThreadDecoder(), np.random.default_rng(0)
    out = np.empty((DEPTH, *shards.slice_size), np.int16)
    wanted = []
    for volume in chance.integers(0, len(shards.volumes), repeats).tolist():
        first = int(chance.integers(0, shards.num_slices_of(volume) - DEPTH + 1))
        wanted.append((volume, np.arange(first, first + DEPTH)))
    times = []
    for _ in range(5):
        begin_s = time.perf_counter()
        for volume, slices in wanted:
            shards.read_frames_into(volume, slices, out, decoder)
        times.append((time.perf_counter() - begin_s) / (repeats * DEPTH))
    return float(np.median(times))


class _NoDecompressor:
    def stream_reader(self, _frame: object) -> _NoDecompressor:
        return self

    def readinto(self, out: memoryview) -> int:
        return len(out)


def _nothing(*_: object) -> None: ...


@contextmanager
def _without_kernels(frame: bytes) -> Iterator[None]:
    """Nothing is read, so the check of a frame's header, which is Python's own work, is done on `frame`."""
    check = codec._check_header
    with (
        mock.patch.object(codec, "_check_header", lambda _, size: check(frame, size)),
        mock.patch.object(codec.zstandard, "ZstdDecompressor", _NoDecompressor),
        mock.patch.object(codec, "remove_filter", _nothing),
        mock.patch.object(LocalFile, "read_into", _nothing),
    ):
        yield


@cache
def _shared(folder: str, quick: bool, cold: bool) -> _Ours:
    return _Ours(folder, quick, cold)


def contenders(folder: str, quick: bool, cold: bool) -> dict[str, Setup]:
    """Loaders of the sets in `folder`, with as many threads as this process may use cores. Work: windows."""
    ours = _shared(folder, quick, cold)
    listed = {
        "random": ours.loading("random", "random"),
        "random, 1 thread": ours.loading("random, 1 thread", "random", threads=1),
        "runs, views": ours.loading("runs, views", "runs"),
        "runs, images": ours.loading("runs, images", "runs", images=True),
        "random, filtered": ours.loading("random, filtered", "random", filtered=True),
        "fast random, filtered": ours.loading("fast random, filtered", "random", preset="fast", filtered=True),
    }
    return listed if cold else {**listed, "kernel limit": ours.kernel}


def tables(folder: str, quick: bool, cold: bool) -> dict[str, Callable[[], Any]]:
    """`spent`; `memory random`, `memory runs`; `stages`; `python share`; `index bytes`."""
    ours = _shared(folder, quick, cold)
    return {
        "spent": ours.spent,
        "memory random": lambda: ours.memory("random"),
        "memory runs": lambda: ours.memory("runs"),
        "stages": ours.stages,
        "python share": ours.python_share,
        "index bytes": ours.index_bytes,
    }
