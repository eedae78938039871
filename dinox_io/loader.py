"""The loader: an endless stream of batches of windows, the same for any number of threads; its state is one integer.

    for batch in Loader(shards, batch_size=64, position=resumed_at): ...

Invariant: global batch p holds the windows that `mixture.Mixture` gives it, from a seed and p alone. `position` is the
number of the next global batch; parts (micro-batches) of one are handed out in order, and it moves after the last.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np

from dinox_io.batch import Batch
from dinox_io.cache import with_cache
from dinox_io.limit import limited, shared
from dinox_io.loading import run_pipeline, slab_pipeline
from dinox_io.memory import Allocate, plain_memory
from dinox_io.mixture import Mixture, check_weights
from dinox_io.pace import Pace
from dinox_io.pipeline import default_threads
from dinox_io.plan import Planner
from dinox_io.shardset import ShardSet
from dinox_io.window import WindowTable

MODES = ("runs", "random")
Sets = ShardSet | Sequence[tuple[ShardSet, float]]
"""One set, or several with the weights by which they share each batch."""
RUN_LENGTH = 8


class Loader:
    """Batches of the windows of one side of a set, or of several, for ever. Close it, or use it in a `with`.

    A batch is valid until the next one is asked for. Not to be iterated from two threads at once.
    """

    def __init__(
        self,
        shards: Sets,
        batch_size: int = 64,
        depth: int = 3,
        step: int = 1,
        step_mm: float | None = None,
        every: int = 1,
        every_mm: float | None = None,
        limit: int | None = None,
        seed: int = 0,
        mode: str = "runs",
        run_length: int = RUN_LENGTH,
        split: str | None = "train",
        inflation: int = 1,
        position: int = 0,
        parts: int = 1,
        rank: int = 0,
        world: int = 1,
        threads: int | None = None,
        prefetch_bytes: int = 256 << 20,
        pool_bytes: int = 2 << 30,
        cache_bytes: int = 0,
        max_gbps: float | None = None,
        filtered: bool = False,
        slab: Allocate | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        """
        Args:
            shards: an open set, or a list of (set, weight); they must stay open as long as the loader.
            batch_size: windows of a global batch, over all parts and ranks.
            depth, step: slices of a window (odd), and how far apart they are; step_mm takes the place of step: each
                volume's nearest number of slices.
            every: draw only every so many-th centre of a volume (its neighbours stay true); every_mm likewise.
            limit: draw only from so many windows that the seed chooses (sets share them by weight); all if None.
            seed: of the order.
            mode: "random", each window read and decoded on its own, or "runs": the slices of `run_length` neighbouring
                windows are decoded once, for as many batches near each other. Either is exact; they order differently.
            split: side to draw from; None: all volumes. inflation: how often an epoch holds each window.
            position: global batch to begin with.
            parts: in how many pieces each global batch is handed out. rank, world: which share of each part is ours,
                of how many; parts times world must divide batch_size.
            threads: that decode, at most; as many as there are cores if None. No more are active than are needed.
            prefetch_bytes: batches that are made ahead, at least one. pool_bytes: decoded runs (mode "runs"); where not
                all that are alive fit, some are decoded again (`counters["decoded_again"]`).
            cache_bytes: decoded slices of as many whole volumes as that holds stay in memory, from pass to pass.
            max_gbps: cap on decoded data, 10^9 bytes a second.
            filtered: hand out what is unpacked but still filtered, for a device that undoes the filter.
            slab: gives the memory for slabs, or for pool and images: uint8 (n,) for a number of bytes; plain if None.
            timeout_s: how long a batch may take.

        Raises:
            ValueError: an argument is impossible, the side is empty or has fewer windows than a batch.
            MemoryError: the batches would not fit into the memory that is free.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; there are {', '.join(MODES)}")
        if position < 0:
            raise ValueError(f"position is {position}; it must be at least 0")
        weighted = [(shards, 1.0)] if isinstance(shards, ShardSet) else list(shards)
        sets, weights = [one for one, _ in weighted], [weight for _, weight in weighted]
        check_weights(weights, len(sets))
        limits = [None] * len(sets) if limit is None else shared(limit, weights)
        tables, sizes = zip(
            *(
                _by_series(one, split, depth, step, every, step_mm=step_mm, every_mm=every_mm, limit=most, seed=seed)
                for one, most in zip(sets, limits, strict=True)
            ),
            strict=True,
        )
        runs = run_length if mode == "runs" else 1
        mixture = Mixture(sizes, weights, batch_size=batch_size, seed=seed, inflation=inflation, run_length=runs)
        self._mixture = mixture
        planner = Planner(mixture, tables, parts=parts, rank=rank, world=world)
        self.position = position
        self.num_windows = tuple(table.num_windows for table in tables)
        """Of each set: windows of a pass; an epoch holds each of them `inflation` times."""
        self._parts = parts
        self._pace = Pace(default_threads() if threads is None else threads, max_gbps and max_gbps * 1e9)
        self._runs = None
        given = {
            "depth": depth,
            "prefetch_bytes": prefetch_bytes,
            "pace": self._pace,
            "timeout_s": timeout_s,
            "first": position * parts,
            "filtered": filtered,
            "allocate": slab or plain_memory,
        }
        sources = sets
        if cache_bytes:
            draws = [weight / table.num_windows for weight, table in zip(weights, tables, strict=True)]
            sources = with_cache(sets, [table.volume for table in tables], draws, cache_bytes=cache_bytes)
        if runs == 1:
            self._pipeline = slab_pipeline(sources, planner, rows=planner.rows, **given)
        else:
            self._pipeline, self._runs = run_pipeline(
                sources, planner, mixture, tables, parts=parts, run_length=runs, pool_bytes=pool_bytes, **given
            )
        # Ends the threads when a user drops the loader without closing it, and at exit.
        self._finalizer = weakref.finalize(self, self._pipeline.stop)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The next part of a global batch.

        Raises ShardError for damage (file, volume, slice), LoaderError for another failure of a thread, LoaderStalled
        when none came in timeout_s.
        """
        batch = self._pipeline.take()
        assert batch is not None, "the stream has no end"
        if batch.part == self._parts - 1:
            self.position = batch.position + 1
        return batch

    @property
    def counters(self) -> dict[str, float]:
        """Sums since the start: read_bytes, decoded_bytes, cached_bytes (that were decoded before); copied_bytes of
        `Batch.images`; read_s, decode_s (zstd and
        hash), unfilter_s over all threads; wait_s of the consumer; decoded_again, the runs that the pool had no room to
        keep. And how many threads are active now, active_threads."""
        names = ("read_bytes", "decoded_bytes", "cached_bytes", "read_s", "decode_s", "unfilter_s")
        counters: dict[str, float] = {
            name: sum(getattr(decoder, name) for decoder in self._pipeline.decoders) for name in names
        }
        counters["wait_s"], counters["copied_bytes"] = self._pipeline.wait_s, self._pipeline.room.copied_bytes
        counters["decoded_again"] = self._runs.again if self._runs else 0
        counters["active_threads"] = self._pace.active
        return counters

    @property
    def shares(self) -> list[float]:
        """Of each set: its share of all windows of the batches before `position`; zeros before the first."""
        draws = [int(order.cuts.starts(self.position, 0)[0]) for order in self._mixture.orders]
        return [own / max(sum(draws), 1) for own in draws]

    def close(self) -> None:
        """End all threads (in less than 2 s). Idempotent."""
        self._finalizer()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _by_series(
    shards: ShardSet,
    split: str | None,
    depth: int,
    step: int,
    every: int,
    *,
    step_mm: float | None,
    every_mm: float | None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[WindowTable, np.ndarray]:
    """The windows of a side, series after series (those split at gaps too), and how many each series has."""
    volumes = shards.volumes_of(split)
    names = np.array([shards.volumes[number].series for number in volumes])
    volumes = volumes[np.argsort(names, kind="stable")]
    table = shards.window_table(volumes, depth, step, every, step_mm=step_mm, every_mm=every_mm)
    if limit is not None:
        table = limited(table, limit, seed)
    _, first = np.unique([shards.volumes[number].series for number in table.volume], return_index=True)
    return table, np.add.reduceat(table.centers, first)
