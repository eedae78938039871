"""The loader: an endless stream of batches of windows, the same for any number of threads; its state is one integer.

    for batch in Loader(shards, batch_size=64, position=resumed_at): ...

Invariant: global batch p holds the windows that `order.Order` gives it, from a seed and p alone. `position` is the
number of the next global batch; parts (micro-batches) of one are handed out in order, and it moves after the last.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np

from dinox_io.batch import Batch
from dinox_io.order import Order
from dinox_io.pipeline import Pipeline, Plan, default_threads
from dinox_io.shardset import ShardSet
from dinox_io.window import WindowTable

MODES = ("random",)


class Loader:
    """Batches of the windows of one side of a set, for ever. Close it, or use it in a `with`.

    A batch is valid until the next one is asked for. Not to be iterated from two threads at once.
    """

    def __init__(
        self,
        shards: ShardSet,
        batch_size: int = 64,
        depth: int = 3,
        step: int = 1,
        seed: int = 0,
        mode: str = "random",
        split: str | None = "train",
        position: int = 0,
        parts: int = 1,
        threads: int | None = None,
        prefetch_bytes: int = 256 << 20,
        timeout_s: float = 300.0,
    ) -> None:
        """
        Args:
            shards: an open set; it must stay open as long as the loader.
            batch_size: windows of a global batch. depth, step: slices of a window (odd), and how far apart they are.
            seed: of the order. mode: "random", each window read on its own.
            split: side to draw from; None: all volumes. position: global batch to begin with.
            parts: in how many pieces each global batch is handed out; must divide batch_size.
            threads: that decode; as many as there are cores if None.
            prefetch_bytes: batches that are made ahead, at least one. timeout_s: how long a batch may take.

        Raises:
            ValueError: an argument is impossible, the side is empty or has fewer windows than a batch.
            MemoryError: the batches would not fit into the memory that is free.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; this version has {', '.join(MODES)}")
        if batch_size < 1 or parts < 1 or batch_size % parts:
            raise ValueError(f"parts is {parts}; it must divide batch_size, which is {batch_size}")
        if position < 0:
            raise ValueError(f"position is {position}; it must be at least 0")
        table, windows_per_series = _by_series(shards, shards.volumes_of(split), depth, step)
        self.position, self.num_windows = position, table.num_windows
        self._parts = parts
        self._pipeline = Pipeline(
            shards,
            _planner(Order(windows_per_series, batch_size, seed), table, parts),
            first=position * parts,
            slab_shape=(batch_size // parts, depth, *shards.slice_size),
            step=step,
            threads=default_threads() if threads is None else threads,
            prefetch_bytes=prefetch_bytes,
            timeout_s=timeout_s,
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
        """Sums since the start: read_bytes, decoded_bytes; read_s, decode_s (zstd and hash), unfilter_s over all
        threads; wait_s of the consumer."""
        decoders = self._pipeline.decoders
        names = ("read_bytes", "decoded_bytes", "read_s", "decode_s", "unfilter_s")
        return {name: sum(getattr(decoder, name) for decoder in decoders) for name in names} | {
            "wait_s": self._pipeline.wait_s
        }

    def close(self) -> None:
        """End all threads (in less than 2 s). Idempotent."""
        self._finalizer()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _by_series(shards: ShardSet, volumes: np.ndarray, depth: int, step: int) -> tuple[WindowTable, np.ndarray]:
    """The windows of `volumes`, series after series (those split at gaps too), and how many each has."""
    names = np.array([shards.volumes[number].series for number in volumes])
    volumes = volumes[np.argsort(names, kind="stable")]
    _, first = np.unique(np.sort(names, kind="stable"), return_index=True)
    table = shards.window_table(volumes, depth, step)
    return table, np.add.reduceat(table.centers, first)


def _planner(order: Order, table: WindowTable, parts: int) -> Callable[[int], Plan]:
    """Sequence number -> plan. It must not hold the loader: the threads hold it."""

    def plan(sequence: int) -> Plan:
        position, part = divmod(sequence, parts)
        windows, epoch = order.batch(position)
        size = order.batch_size // parts
        rows = np.arange(part * size, (part + 1) * size)
        volume, center = table.locate(windows[rows])
        return Plan(volume=volume, center=center, epoch=epoch[rows], rows=rows, position=position, part=part)

    return plan
