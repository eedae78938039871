"""What a run looks at between updates: the loss on patients it never trains on, and how well its features tell how high
a slice lies in its volume.

The same windows and the same views every time, so that figures of different updates compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinox_io import ShardSet
from dinox_io.hounsfield import AIR_HU
from dinox_train.data import Dataset
from dinox_train.learner import Learner
from dinox_train.nearest import height_r2
from dinox_train.objectives.sinkhorn import sinkhorn
from dinox_train.pictures import save_patch_pca
from dinox_train.platform import autocast
from dinox_train.step import NUM_GLOBAL, ViewBatch, student_loss, teacher_outputs
from dinox_train.views import draw_views, render_views, render_whole_slices

# Views of an evaluation are drawn at a position that no training batch reaches.
EVALUATION_POSITION = 2**62
CHUNK = 32
PICTURE_SLICES = 3


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation; None where the set has no validation side."""

    loss_val: float | None
    knn_z: float | None


@dataclass(frozen=True)
class Sample:
    """Some windows of a side: int16 HU (b, depth, Y, X) on the device; the rest on the host, one row a window."""

    images: Tensor
    sizes: np.ndarray
    spacing_mm: np.ndarray
    rows: np.ndarray
    heights: np.ndarray
    """Height of the middle slice in its volume, 0 to 1."""


@dataclass(frozen=True)
class Place:
    """Where a window lies: a set, a volume of it, the middle slice, and how far apart the window's slices are."""

    shards: ShardSet
    volume: int
    center: int
    step: int


class Evaluator:
    """Evaluates a learner on fixed windows, evenly spread over a side's volumes and their slices."""

    def __init__(self, dataset: Dataset, learner: Learner, device: torch.device) -> None:
        self._dataset = dataset
        self._learner = learner
        self._config = learner.config
        self._device = device

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """loss_val at the final teacher temperature, and knn_z of the teacher's CLS features of whole slices."""
        if self._dataset.val_side is None:
            return Evaluation(None, None)
        sides: dict[str, tuple[Tensor, Tensor]] = {}
        for side in ("train", "val"):
            samples = [
                (self._features(sample).cpu(), torch.from_numpy(sample.heights))
                for sample in self._spread(side, self._config.evaluate.windows)
            ]
            sides[side] = torch.cat([item for item, _ in samples]), torch.cat([item for _, item in samples])
        (known, known_heights), (asked, heights_asked) = sides["train"], sides["val"]
        knn_z = height_r2(known, known_heights, asked, heights_asked, self._config.evaluate.neighbours)
        return Evaluation(self._loss(), knn_z)

    @torch.no_grad()
    def save_patch_picture(self, path: Path) -> None:
        """Slices of patients that the run does not train on (where it has such), beside their patch features."""
        side = self._dataset.val_side or self._dataset.train_side
        size = 2 * self._learner.views.global_size
        for sample in self._spread(side, PICTURE_SLICES):
            whole = self._whole_slices(sample, size)
            preprocess = self._learner.preprocess
            gray = (whole[:, whole.shape[1] // 2] * preprocess.std + preprocess.mean).cpu().numpy()
            found = self._learner.teacher.backbone(whole)
            grids = [found.grid] * len(gray)
            held_out = self._dataset.val_side is not None
            save_patch_pca(path, gray, found.patches.float().cpu().numpy(), grids, held_out=held_out)

    def _loss(self) -> float:
        """The loss over all validation windows, with one Sinkhorn. Views are rendered twice, and never all held."""
        learner, settings = self._learner, self._learner.settings
        logits = torch.cat(
            [teacher_outputs(learner.teacher, [batch], settings.precision)[1] for batch in self._view_batches()]
        )
        targets = sinkhorn(logits, self._config.objective.teacher_temperature, settings.sinkhorn_iterations)
        total, first = len(targets) // NUM_GLOBAL, 0
        loss = torch.zeros((), device=self._device)
        for batch in self._view_batches():
            rows = targets[first : first + len(batch.global_views)]
            loss += student_loss(learner.student, batch, rows, settings, total_images=total)
            first += len(rows)
        return float(loss)

    def _view_batches(self) -> Iterator[ViewBatch]:
        for sample in self._spread("val", self._config.evaluate.windows):
            yield self._view_batch(sample)

    def _view_batch(self, sample: Sample) -> ViewBatch:
        views, preprocess = self._learner.views, self._learner.preprocess
        plan = draw_views(
            views,
            seed=self._config.seed,
            position=EVALUATION_POSITION,
            rows=sample.rows,
            sizes=sample.sizes,
            spacing_mm=sample.spacing_mm,
        )
        return ViewBatch(*render_views(sample.images, plan, views, preprocess.mean, preprocess.std))

    def _features(self, sample: Sample) -> Tensor:
        whole = self._whole_slices(sample, self._learner.views.global_size)
        with autocast(self._device, self._config.precision):
            return self._learner.teacher.backbone(whole).cls.float()

    def _whole_slices(self, sample: Sample, size: int) -> Tensor:
        return render_whole_slices(sample.images, sample.sizes, size, self._learner.preprocess)

    def _spread(self, side: str | None, count: int) -> Iterator[Sample]:
        """`count` windows of a side (all, where it has fewer), from the middle of equal stretches of its windows."""
        data, sets = self._config.data, self._dataset.having(side)
        tables = [
            shards.window_table(shards.volumes_of(side), data.depth, data.step, step_mm=data.step_mm) for shards in sets
        ]
        ends = np.cumsum([table.num_windows for table in tables])
        count = min(count, int(ends[-1]))
        windows = (2 * np.arange(count) + 1) * ends[-1] // (2 * count)
        for first in range(0, count, CHUNK):
            rows = np.arange(first, min(first + CHUNK, count))
            places = []
            for window in windows[rows].tolist():
                number = int(np.searchsorted(ends, window, side="right"))
                before = int(ends[number]) - tables[number].num_windows
                volume, center, step = (int(one[0]) for one in tables[number].locate(np.array([window - before])))
                places.append(Place(sets[number], volume, center, step))
            yield self._read(places, rows)

    def _read(self, places: list[Place], rows: np.ndarray) -> Sample:
        depth = self._config.data.depth
        records = [place.shards.volumes[place.volume] for place in places]
        sizes = np.array([record.shape[1:] for record in records])
        images = np.full((len(rows), depth, *sizes.max(axis=0)), AIR_HU, dtype=np.int16)
        for image, place in zip(images, places, strict=True):
            window = place.shards.read_window(place.volume, place.center, depth, place.step)
            image[:, : window.shape[1], : window.shape[2]] = window
        centers = np.array([place.center for place in places])
        return Sample(
            images=torch.from_numpy(images).to(self._device),
            sizes=sizes,
            spacing_mm=np.array([record.spacing_mm for record in records], np.float64),
            rows=rows,
            heights=centers / np.maximum([record.shape[0] - 1 for record in records], 1),
        )
