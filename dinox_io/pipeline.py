"""Threads that decode planned windows straight into slabs of memory, and hand them over in the order of the plan.

    plan (a pure function of the sequence number) -> rows -> threads -> slab -> Batch -> slab again

Invariant: what comes out depends on the plan alone, not on the threads. A slab is written only while nobody holds the
batch that lies in it. The threads hold the `Pipeline`, never the iterator that a user holds: dropping that ends them.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from io import UnsupportedOperation
from pathlib import Path
from typing import Protocol

import numpy as np

from dinox_io.batch import Batch
from dinox_io.decoder import ThreadDecoder
from dinox_io.errors import LoaderError, LoaderStalled, ShardError
from dinox_io.hounsfield import AIR_HU

MAX_SLABS_IN_FLIGHT = 8
_JOIN_S = 1.5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One batch, or part of one, before it is decoded; arrays as in Batch."""

    volume: np.ndarray
    center: np.ndarray
    epoch: np.ndarray
    rows: np.ndarray
    position: int
    part: int


class WindowSource(Protocol):
    """What the threads call: a ShardSet."""

    def new_decoder(self) -> ThreadDecoder: ...
    def decode_window(
        self, volume: int, center: int, depth: int, step: int, out: np.ndarray, decoder: ThreadDecoder
    ) -> None: ...
    def size_of(self, volume: np.ndarray) -> np.ndarray: ...
    def spacing_of(self, volume: np.ndarray) -> np.ndarray: ...
    def place_of(self, volume: int) -> str: ...


class _Slab:
    """Memory of one batch, and how far it is filled."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.images = np.full(shape, AIR_HU, np.int16)
        self.written = np.zeros((shape[0], 2), np.int64)  # y, x of what each row held last

    def start(self, sequence: int, plan: Plan, sizes: np.ndarray) -> None:
        self.sequence, self.plan, self.sizes = sequence, plan, sizes
        self.next_row = self.rows_done = 0


class Pipeline:
    """`take()` gives batch after batch, from sequence number `first` on, until `plan` gives None."""

    def __init__(
        self,
        source: WindowSource,
        plan: Callable[[int], Plan | None],
        *,
        first: int,
        slab_shape: tuple[int, int, int, int],
        step: int,
        threads: int,
        prefetch_bytes: int,
        timeout_s: float,
    ) -> None:
        """slab_shape: (rows, depth, Y, X) of the largest batch. ValueError or MemoryError before anything is begun."""
        if threads < 1 or prefetch_bytes < 0 or not timeout_s > 0:
            raise ValueError("threads must be at least 1, prefetch_bytes not negative, timeout_s above 0")
        slab_bytes = 2 * int(np.prod(slab_shape, dtype=object))
        in_flight = min(max(prefetch_bytes // slab_bytes, 1), MAX_SLABS_IN_FLIGHT)
        check_memory((in_flight + 1) * slab_bytes)
        self._source, self._plan, self._step, self._timeout_s = source, plan, step, timeout_s
        self._changed = threading.Condition()
        self._free = [_Slab(slab_shape) for _ in range(in_flight + 1)]
        self._filling: deque[_Slab] = deque()
        self._ready: dict[int, _Slab] = {}
        self._held: _Slab | None = None
        self._next_planned = self._next_taken = first
        self._planning = self._ended = self._stopped = False
        self._error: BaseException | None = None
        self.wait_s = 0.0
        self.decoders = [source.new_decoder() for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._work, args=(decoder,), name=f"dinox-decoder-{number}", daemon=True)
            for number, decoder in enumerate(self.decoders)
        ]
        for thread in self._threads:
            thread.start()

    # --- the consumer ------------------------------------------------------------------------------------------

    def take(self) -> Batch | None:
        """The next batch, None at the end of the plan. The one before becomes invalid.

        Raises ShardError for damage, LoaderError for any other failure of a thread, LoaderStalled after timeout_s.
        """
        begin_s = time.monotonic()
        with self._changed:
            if self._held is not None:
                self._free.append(self._held)
                self._held = None
                self._changed.notify_all()
            come = self._changed.wait_for(self._has_come, self._timeout_s)
            self.wait_s += time.monotonic() - begin_s
            if self._error is not None:
                raise self._error
            if self._stopped:
                raise LoaderError("the loader is closed")
            if not come:
                self._stall()
            slab = self._ready.pop(self._next_taken, None)
            if slab is None:
                return None
            self._held = slab
            self._next_taken += 1
        return self._batch(slab)

    def _has_come(self) -> bool:
        ended = self._ended and self._next_taken >= self._next_planned
        return self._next_taken in self._ready or self._error is not None or self._stopped or ended

    def _batch(self, slab: _Slab) -> Batch:
        plan, count = slab.plan, len(slab.plan.volume)
        return Batch(
            images=slab.images[:count],
            sizes=slab.sizes.astype(np.int32),
            volume=plan.volume,
            center=plan.center,
            epoch=plan.epoch,
            rows=plan.rows,
            spacing_mm=self._source.spacing_of(plan.volume),
            position=plan.position,
            part=plan.part,
        )

    def _stall(self) -> None:
        waiting = [self._row_text(slab, slab.rows_done) for slab in self._filling][:1]
        self._error = LoaderStalled(
            f"no batch in {self._timeout_s:g} s" + (f"; decoding {waiting[0]}" if waiting else "") + ". The stacks of "
            "all threads are on standard error; is the storage reachable? timeout_s sets the limit"
        )
        self._stopped = True
        self._changed.notify_all()
        _dump_stacks()
        raise self._error

    def stop(self) -> None:
        """End all threads, waiting at most 1.5 s for them: one that hangs in the storage is left behind, a daemon."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        deadline_s = time.monotonic() + _JOIN_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(deadline_s - time.monotonic(), 0))

    # --- the threads -------------------------------------------------------------------------------------------

    def _work(self, decoder: ThreadDecoder) -> None:
        try:
            while (task := self._next_task()) is not None:
                slab, row = task
                self._decode(slab, row, decoder)
                with self._changed:
                    slab.rows_done += 1
                    if slab.rows_done == len(slab.plan.volume):
                        self._filling.remove(slab)
                        self._ready[slab.sequence] = slab
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._stopped = True
                self._changed.notify_all()

    def _next_task(self) -> tuple[_Slab, int] | None:
        """A row to decode; plans the next batch when none is left and a slab is free; None when there is no more."""
        with self._changed:
            while not self._stopped:
                for slab in self._filling:
                    if slab.next_row < len(slab.plan.volume):
                        slab.next_row += 1
                        return slab, slab.next_row - 1
                if self._free and not self._planning and not self._ended:
                    self._plan_next()
                elif self._ended:
                    return None
                else:
                    self._changed.wait()
        return None

    def _plan_next(self) -> None:
        """Called with the lock held, which is let go while planning: a pass may take a second to plan."""
        slab, sequence, self._planning = self._free.pop(), self._next_planned, True
        self._changed.release()
        try:
            plan = self._plan(sequence)
            sizes = None if plan is None else self._source.size_of(plan.volume)
        finally:
            self._changed.acquire()
            self._planning = False
        if plan is None or sizes is None:
            self._ended = True
            self._free.append(slab)
        else:
            slab.start(sequence, plan, sizes)
            self._filling.append(slab)
            self._next_planned += 1
        self._changed.notify_all()

    def _decode(self, slab: _Slab, row: int, decoder: ThreadDecoder) -> None:
        image, (y, x) = slab.images[row], slab.sizes[row]
        if (slab.written[row] > slab.sizes[row]).any():
            image[:, y:] = AIR_HU
            image[:, :y, x:] = AIR_HU
        slab.written[row] = slab.sizes[row]
        volume, center = int(slab.plan.volume[row]), int(slab.plan.center[row])
        try:
            self._source.decode_window(volume, center, image.shape[0], self._step, image[:, :y, :x], decoder)
        except ShardError:
            raise
        except Exception as error:
            raise LoaderError(f"{self._row_text(slab, row)}: {type(error).__name__}: {error}") from error

    def _row_text(self, slab: _Slab, row: int) -> str:
        row = min(row, len(slab.plan.volume) - 1)
        return f"{self._source.place_of(int(slab.plan.volume[row]))}: slices around {int(slab.plan.center[row])}"


def default_threads() -> int:
    """As many as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_memory(needed_bytes: int) -> None:
    """MemoryError, with both figures, if the slabs cannot fit into what is free now (or into the cgroup's limit)."""
    free_bytes = _free_memory_bytes()
    if free_bytes is not None and needed_bytes > free_bytes:
        raise MemoryError(
            f"the loader's slabs need {needed_bytes / 2**20:.0f} MiB and {free_bytes / 2**20:.0f} MiB are free: lower "
            "prefetch_bytes, the batch size, the depth of a window, or raise parts (the trainer's accumulation)"
        )


def _free_memory_bytes() -> int | None:
    """What the machine, and the limit of our cgroup if there is one, leave; None where the system does not tell."""
    free = [_available_bytes(), _group_free_bytes(Path("/sys/fs/cgroup"))]
    return min((size for size in free if size is not None), default=None)


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _group_free_bytes(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        used = {name: int(size) for name, size in (line.split() for line in lines)}
        current = int((group / "memory.current").read_text(encoding="ascii"))
        # Cached files (the shards we read, say) count as used, but give way; shared memory among them does not.
        return None if limit == "max" else int(limit) - (current - used["file"] + used["shmem"])
    except (OSError, ValueError, KeyError):
        return None


def _dump_stacks() -> None:
    for stream in (sys.stderr, sys.__stderr__):
        try:
            faulthandler.dump_traceback(file=stream, all_threads=True)  # type: ignore[arg-type]
        except (AttributeError, UnsupportedOperation, ValueError, RuntimeError):
            continue  # a stream without a file descriptor: try the process's own
        return
