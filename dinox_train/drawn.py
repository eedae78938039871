"""One global batch as it was drawn: its views, and which windows they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dinox_io import Batch
from dinox_train.data import Dataset
from dinox_train.view_batch import ViewBatch


@dataclass
class Drawn:
    """The views of one global batch, and which windows they come from (an array for each micro-batch)."""

    micro_batches: list[ViewBatch] = field(default_factory=list)
    sets: list[np.ndarray] = field(default_factory=list)
    volumes: list[np.ndarray] = field(default_factory=list)
    centers: list[np.ndarray] = field(default_factory=list)
    epoch: int = 2**63
    """That of the window which has been seen least often."""

    def add(self, batch: Batch, views: ViewBatch) -> None:
        """A micro-batch more; of `batch`, whose memory is the loader's, copies stay."""
        self.micro_batches.append(views)
        self.sets.append(batch.set.copy())
        self.volumes.append(batch.volume.copy())
        self.centers.append(batch.center.copy())
        self.epoch = min(self.epoch, int(batch.epoch.min()))

    def record(self, dataset: Dataset) -> dict[str, Any]:
        """Which windows of which volumes, and statistics of their views, as JSON values."""
        views = [batch.global_views for batch in self.micro_batches]
        return {
            "volumes": [
                dataset.sources[number].shards.volumes[index].id
                for parts in zip(self.sets, self.volumes, strict=True)
                for number, index in zip(*parts, strict=True)
            ],
            "centers": [int(center) for part in self.centers for center in part],
            "view_mean": [str(float(part.mean())) for part in views],
            "view_min_max": [[str(float(part.min())), str(float(part.max()))] for part in views],
        }
