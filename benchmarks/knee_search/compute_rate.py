"""The real training step on a batch that is there: views, teacher, student, losses, backward, optimizer, averages.

`measure_alone` has nothing beside it. `measure_beside` takes turns: the step alone, the loader alone, both together as
fast as each of them can, so that what disturbs the machine disturbs all three.

Invariant: time is taken when the device has done what was asked of it.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinox_io import Batch, Loader
from dinox_train.micro_batch import GlobalBatch
from dinox_train.slice_labels import SliceLabels
from dinox_train.stage_timers import STAGES, StageTimers
from dinox_train.view_batch import ViewBatch
from knee_search.learning import Learning, begin

WARM_UPDATES, LEAST_UPDATES = 2, 3
ROUNDS = 3
SETTLE_S = 0.3
"""The loader runs for so long before a turn with it is timed: what it had made ahead is gone then."""


@dataclass(frozen=True)
class _Resident:
    """A micro-batch of windows on the device."""

    images: Tensor
    rows: np.ndarray
    sizes: np.ndarray
    spacing_mm: np.ndarray
    labels: np.ndarray | None


class _Step:
    """Updates on one global batch, which stays on the device; views are drawn anew each time."""

    def __init__(self, learning: Learning, loader: Loader) -> None:
        self._learning, self._update = learning, 0
        self.timers = StageTimers(learning.device)
        labels = _labels_of(learning)
        self._parts: list[_Resident] = []
        for _ in range(learning.config.train.accumulation):
            batch = next(loader)
            marked = labels and labels.of(batch.set, batch.volume, batch.center)
            self._parts.append(_resident(learning, batch, marked))

    def __call__(self) -> float:
        """One update; s."""
        learner, begin_s = self._learning.learner, time.perf_counter()
        self._update += 1
        made = GlobalBatch(
            learner.recipe(learner.config.train.batch_size),
            self._update,
            gram=learner.wants_gram_views(self._update),
        )
        views: list[ViewBatch] = []
        for part in self._parts:
            with self.timers("views"):
                views.append(made.micro_batch(part.images, part.rows, part.sizes, part.spacing_mm, part.labels)[0])
        result, _ = learner.step(views, self._update, self.timers)
        result.to_host()  # waits for the device
        return time.perf_counter() - begin_s


def _labels_of(learning: Learning) -> SliceLabels | None:
    name = learning.learner.objective.needs.labels
    if name is None:
        return None
    return SliceLabels(name, [(source.folder, source.shards.volumes) for source in learning.dataset.sources])


def _resident(learning: Learning, batch: Batch, labels: np.ndarray | None) -> _Resident:
    images = learning.feed.to_device(batch).clone()
    return _Resident(images, batch.rows.copy(), batch.sizes.copy(), batch.spacing_mm.copy(), labels)


def measure_alone(file: str, overrides: Sequence[str], folder: str, *, seconds: float) -> dict[str, Any]:
    """Seconds of each update, by stage too, and the memory."""
    learning = begin(file, overrides, folder)
    with learning.loader() as loader:
        step = _Step(learning, loader)
    for _ in range(WARM_UPDATES):
        step()
    step.timers.take()
    cpu_s, update_s = time.process_time(), _for(step, seconds)
    cpu_s = time.process_time() - cpu_s
    stages = step.timers.take().seconds()
    return {
        "update_s": update_s,
        "batch_size": learning.config.train.batch_size,
        "stage_s": {name: stages[name] / len(update_s) for name in STAGES if stages[name]},
        "cpu_s_per_update": cpu_s / len(update_s),
        **_memory(learning.device),
    }


def _memory(device: torch.device) -> dict[str, int | None]:
    """Peaks, bytes: of the device's allocator (what it took from the device), of this process on the host."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cpu":
        return {"device_memory_bytes": None, "host_memory_bytes": host}
    return {"device_memory_bytes": torch.cuda.max_memory_reserved(device), "host_memory_bytes": host}


def _for(step: Callable[[], float], seconds: float) -> list[float]:
    taken: list[float] = []
    while len(taken) < LEAST_UPDATES or sum(taken) < seconds:
        taken.append(step())
    return taken


class _Drain:
    """Takes batches from the loader on a thread of its own, while it is `flowing`."""

    def __init__(self, loader: Loader, windows: int) -> None:
        """windows: of a batch."""
        self._loader, self._windows, self.taken = loader, windows, 0
        self._flows, self._ends = threading.Event(), False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while self._flows.wait() and not self._ends:
                batch = next(self._loader)
                _ = batch.windows if batch.filtered else batch.images
                self.taken += self._windows
        except BaseException as error:
            self.error = error

    def __enter__(self) -> _Drain:
        self._flows.set()
        time.sleep(SETTLE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._flows.clear()

    def end(self) -> None:
        self._ends = True
        self._flows.set()
        self._thread.join()
        if self.error is not None:
            raise self.error


def measure_beside(file: str, overrides: Sequence[str], folder: str, *, seconds: float) -> dict[str, Any]:
    """Seconds of each update alone and beside the loader; windows a second of the loader alone and beside compute.
    seconds: of each turn of each."""
    learning = begin(file, overrides, folder)
    train = learning.config.train
    alone_s: list[float] = []
    beside_s: list[float] = []
    alone: list[float] = []
    beside: list[float] = []
    with learning.loader() as loader:
        step = _Step(learning, loader)
        drain = _Drain(loader, train.batch_size // train.accumulation)
        for _ in range(WARM_UPDATES):
            step()
        for number in range(ROUNDS):
            turns = [(False, True), (True, False), (True, True)]
            for computes, loads in turns[number % 3 :] + turns[: number % 3]:
                with drain if loads else nullcontext():
                    begin_s, before = time.perf_counter(), drain.taken
                    taken = _for(step, seconds) if computes else time.sleep(seconds)
                    rate = (drain.taken - before) / (time.perf_counter() - begin_s)
                if computes:
                    (beside_s if loads else alone_s).extend(taken or [])
                if loads:
                    (beside if computes else alone).append(rate)
        drain.end()
    return {
        "update_alone_s": alone_s,
        "update_beside_s": beside_s,
        "loader_alone": alone,
        "loader_beside": beside,
        "batch_size": train.batch_size,
    }
