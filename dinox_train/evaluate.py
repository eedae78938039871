"""What a run looks at between updates: the loss on patients it never trains on, and what its features tell: how high a
slice lies in its volume, whether it bears a mark, and, as they should not, which scanner took it.

The same windows and the same views every time, so that figures of different updates compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinox_io import ShardError, ShardSet
from dinox_io.hounsfield import AIR_HU
from dinox_io.window import WindowTable
from dinox_train.config import Config
from dinox_train.data import Dataset
from dinox_train.learner import Learner
from dinox_train.micro_batch import GlobalBatch, pieces
from dinox_train.nearest import height_r2, mark_auroc
from dinox_train.pictures import save_patch_pca
from dinox_train.platform import autocast
from dinox_train.shortcut import ScannerFacts, strongest
from dinox_train.slice_labels import SliceLabels
from dinox_train.step import batch_loss
from dinox_train.view_batch import ViewBatch
from dinox_train.views import render_whole_slices

# Views of an evaluation are drawn at a position that no training batch reaches.
EVALUATION_POSITION = 2**62
LAST_UPDATE = 2**62
"""One that all schedules have ended by."""
CHUNK = 32
PICTURE_SLICES = 3


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation; None where the set has no validation side, or one too small to say."""

    loss_val: float | None = None
    knn_z: float | None = None
    knn_label: float | None = None
    """AUROC of `evaluate.labels` by the marks of the nearest slices of training patients; None without labels."""
    shortcut: float | None = None
    """How far training patients' features tell the scanner or the set beyond chance: 1 all of it, 0 nothing."""
    shortcut_name: str | None = None
    """The fact that is told best."""
    shortcut_accuracy: float | None = None
    shortcut_chance: float | None = None


@dataclass(frozen=True)
class Sample:
    """Some windows of a side: int16 HU (b, depth, Y, X) on the device; the rest on the host, one row a window."""

    images: Tensor
    sizes: np.ndarray
    spacing_mm: np.ndarray
    heights: np.ndarray
    """Height of the middle slice in its volume, 0 to 1."""
    labels: np.ndarray | None
    """1.0 where it bears a mark, where the objective asks for labels."""
    places: list[Place]


@dataclass(frozen=True)
class Place:
    """Where a window lies: a set, a volume of it, the middle slice, and how far apart the window's slices are."""

    shards: ShardSet
    volume: int
    center: int
    step: int

    @property
    def patient(self) -> str:
        return self.shards.volumes[self.volume].patient


@dataclass(frozen=True)
class Seen:
    """The windows of a side that an evaluation looks at: the teacher's CLS (n, d), heights (n,), marks (n,), places."""

    features: Tensor
    heights: Tensor
    marked: Tensor | None
    """1.0 where the middle slice bears a mark of `evaluate.labels`."""
    places: list[Place]


class Evaluator:
    """Evaluates a learner on fixed windows, evenly spread over a side's volumes and their slices."""

    def __init__(
        self, dataset: Dataset, learner: Learner, device: torch.device, labels: SliceLabels | None = None
    ) -> None:
        self._dataset, self._labels = dataset, labels
        self._learner = learner
        self._device = device
        self._facts = ScannerFacts([source.shards for source in dataset.sources])
        self._marks: SliceLabels | None = None
        if learner.run_config.evaluate.labels is not None:
            sets = [(source.folder, source.shards.volumes) for source in dataset.sources]
            self._marks = SliceLabels(learner.run_config.evaluate.labels, sets, "evaluate.labels")

    @property
    def _config(self) -> Config:
        return self._learner.config

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """loss_val, and what the teacher's CLS features of whole slices tell."""
        if self._dataset.val_side is None:
            return Evaluation()
        known, asked, k = self._see("train"), self._see("val"), self._config.evaluate.neighbours
        knn_label = None
        if known.marked is not None and asked.marked is not None:
            knn_label = mark_auroc(known.features, known.marked, asked.features, asked.marked, k)
        places = [(place.shards, place.volume) for place in known.places]
        patients = [place.patient for place in known.places]
        shortcut = strongest(known.features, patients, self._facts.of(places), k)
        return Evaluation(
            loss_val=self._loss(),
            knn_z=height_r2(known.features, known.heights, asked.features, asked.heights, k),
            knn_label=knn_label,
            shortcut=None if shortcut is None else shortcut.share,
            shortcut_name=None if shortcut is None else shortcut.name,
            shortcut_accuracy=None if shortcut is None else shortcut.accuracy,
            shortcut_chance=None if shortcut is None else shortcut.chance,
        )

    def _see(self, side: str) -> Seen:
        features, heights, marked, places = [], [], [], []
        for sample in self._spread(side, self._count(side)):
            features.append(self._features(sample).cpu())
            heights.append(torch.from_numpy(sample.heights))
            places += sample.places
            if self._marks is not None:
                marked.append(torch.from_numpy(self._of(self._marks, sample.places)))
        return Seen(torch.cat(features), torch.cat(heights), torch.cat(marked) if marked else None, places)

    @torch.no_grad()
    def save_patch_picture(self, path: Path | None) -> None:
        """Slices of patients that the run does not train on (where it has such), beside their patch features.

        path: None on all ranks but one: what a forward takes is every rank's.
        """
        side = self._dataset.val_side or self._dataset.train_side
        size = 2 * self._learner.views.global_size
        for sample in self._spread(side, min(PICTURE_SLICES, self._count(side))):
            whole, mm = self._whole_slices(sample, size)
            preprocess = self._learner.preprocess
            gray = (whole[:, whole.shape[1] // 2] * preprocess.std + preprocess.mean).cpu().numpy()
            with autocast(self._device, self._config.precision):
                found = self._learner.teacher.backbone(whole, mm_per_pixel=mm)
            grids = [found.grid] * len(gray)
            if path is None:
                continue
            held_out = self._dataset.val_side is not None
            patches, patch = found.patches.float().cpu().numpy(), self._learner.vit.patch_size
            save_patch_pca(path, gray, patches, grids, held_out=held_out, patch_size=patch)

    def _loss(self) -> float | None:
        """The loss over all validation windows, in batches of training's size, since a batch is balanced as a whole.
        None for a single window where KoLeo, which compares images, is on.

        At the values that schedules end at, and without Gram anchoring, so that figures of different updates compare.
        """
        learner = self._learner
        values = learner.objective.values(LAST_UPDATE) | {"weight_gram": 0.0}
        if self._count("val") < 2 and values.get("weight_koleo"):
            return None
        sums, count = torch.zeros((), device=self._device), 0
        for number, rows in enumerate(pieces(self._count("val"), self._config.train.batch_size)):
            if count and len(rows) < 2:
                break  # one image has no neighbour and nothing to be balanced with
            batches = list(self._view_batches(rows, number))
            sums += len(rows) * batch_loss(
                learner.networks, learner.objective_alone, learner.state, batches, learner.settings, values=values
            )
            count += len(rows)
        return float(sums / count)

    def _view_batches(self, rows: np.ndarray, number: int) -> Iterator[ViewBatch]:
        """Batch `number` of an evaluation, of the windows with these places in the side's spread."""
        batch = GlobalBatch(self._learner.recipe(len(rows)), EVALUATION_POSITION + number, gram=False, draws=False)
        for piece in pieces(len(rows), CHUNK):
            sample = self._sample("val", rows[piece], self._count("val"))
            yield batch.micro_batch(sample.images, piece, sample.sizes, sample.spacing_mm, sample.labels)[0]

    def _features(self, sample: Sample) -> Tensor:
        whole, mm = self._whole_slices(sample, self._learner.views.global_size)
        with autocast(self._device, self._config.precision):
            cls = self._learner.teacher.backbone(whole, mm_per_pixel=mm).cls
        assert cls is not None
        return cls.float()

    def _whole_slices(self, sample: Sample, size: int) -> tuple[Tensor, Tensor | None]:
        """The slices at size x size, and float32 (b, 2), mm of a pixel of them, where the network wants to know."""
        mm = None
        if self._learner.vit.uses_mm_per_pixel:
            mm_per_pixel = sample.spacing_mm[:, 1:] * sample.sizes / size
            mm = torch.from_numpy(mm_per_pixel.astype(np.float32)).to(self._device)
        return render_whole_slices(sample.images, sample.sizes, size, self._learner.preprocess), mm

    def _count(self, side: str | None) -> int:
        """Windows of a side that an evaluation looks at: `evaluate.windows`, or all, where it has fewer."""
        return min(self._config.evaluate.windows, sum(table.num_windows for table in self._tables(side)))

    def _tables(self, side: str | None) -> list[WindowTable]:
        data = self._config.data
        return [
            shards.window_table(shards.volumes_of(side), data.depth, data.step, step_mm=data.step_mm)
            for shards in self._dataset.having(side)
        ]

    def _spread(self, side: str | None, count: int) -> Iterator[Sample]:
        """`count` windows of a side, evenly spread."""
        return (self._sample(side, rows, count) for rows in pieces(count, CHUNK))

    def _sample(self, side: str | None, rows: np.ndarray, count: int) -> Sample:
        """Some of `count` windows, each from the middle of one of as many equal stretches of the side's windows."""
        sets, tables = self._dataset.having(side), self._tables(side)
        ends = np.cumsum([table.num_windows for table in tables])
        places = []
        for window in ((2 * rows + 1) * ends[-1] // (2 * count)).tolist():
            number = int(np.searchsorted(ends, window, side="right"))
            before = int(ends[number]) - tables[number].num_windows
            volume, center, step = (int(one[0]) for one in tables[number].locate(np.array([window - before])))
            places.append(Place(sets[number], volume, center, step))
        return self._read(places)

    def _read(self, places: list[Place]) -> Sample:
        # Where one rank alone meets damage, all end here together: the others would wait for it in the next forward.
        return self._learner.parallel.together(lambda: self._windows(places), ShardError)

    def _windows(self, places: list[Place]) -> Sample:
        depth = self._config.data.depth
        records = [place.shards.volumes[place.volume] for place in places]
        sizes = np.array([record.shape[1:] for record in records])
        images = np.full((len(places), depth, *sizes.max(axis=0)), AIR_HU, dtype=np.int16)
        for image, place in zip(images, places, strict=True):
            window = place.shards.read_window(place.volume, place.center, depth, place.step)
            image[:, : window.shape[1], : window.shape[2]] = window
        centers = np.array([place.center for place in places])
        return Sample(
            images=torch.from_numpy(images).to(self._device),
            sizes=sizes,
            spacing_mm=np.array([record.spacing_mm for record in records], np.float64),
            heights=centers / np.maximum([record.shape[0] - 1 for record in records], 1),
            labels=None if self._labels is None else self._of(self._labels, places),
            places=places,
        )

    def _of(self, labels: SliceLabels, places: list[Place]) -> np.ndarray:
        """float32 (b,) of the middle slices."""
        sets = [source.shards for source in self._dataset.sources]
        numbers = np.array([sets.index(place.shards) for place in places])
        volumes, centers = (np.array([getattr(place, name) for place in places]) for name in ("volume", "center"))
        return labels.of(numbers, volumes, centers)
