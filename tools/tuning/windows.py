"""A task's windows as tensors, drawn for training and read in order for scoring; equal seeds draw alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from inference.scan import Scan
from probing.features import patch_shares
from probing.tasks import Task
from torch import Tensor

from dinox_model import VisionTransformer


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of slices of one size."""

    items: np.ndarray
    """int64 (b,): numbers of the task's items."""
    hu: Tensor
    """int16 (b, k, y, x)."""
    spacing_mm: Tensor
    """float32 (b, 3)."""
    shares: Tensor | None
    """float32 (b, n): of findings, the shares of the patches, which sum to 1."""


class Windows:
    """Of one task, for one network."""

    def __init__(self, task: Task, scans: dict[int, Scan], model: VisionTransformer, device: str) -> None:
        self._task, self._scans, self._device = task, scans, device
        self._depth, self._side = model.config.in_channels, model.config.patch_size
        self._step, self._step_mm = model.preprocess.step or 1, model.preprocess.step_mm
        self._edge = model.preprocess.edge

    def batch(self, items: np.ndarray) -> Batch:
        """These items, whose slices have one size."""
        hu, spacing, shares = [], [], []
        for number in items:
            item = self._task.items[number]
            scan = self._scans[item.volume]
            step = scan.step(self._step, self._step_mm)
            window = scan.windows(np.array([item.center]), self._depth, step, self._edge)[0]
            hu.append(torch.from_numpy(window))
            spacing.append(scan.spacing_mm)
            if item.finding is not None:
                share = patch_shares(item.finding.on_slice(item.center, window.shape[1:]), self._side)
                shares.append(torch.from_numpy(share / share.sum()))
        return Batch(
            items,
            torch.stack(hu).to(self._device),
            torch.tensor(spacing, dtype=torch.float32, device=self._device),
            torch.stack(shares).to(self._device) if shares else None,
        )

    def in_order(self, items: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """Each item once, volume after volume."""
        for group in self._by(items, lambda number: self._task.items[number].volume):
            for start in range(0, len(group), batch_size):
                yield self.batch(group[start : start + batch_size])

    def drawn(self, items: np.ndarray, batch_size: int, steps: int, random: np.random.Generator) -> Iterator[Batch]:
        """`steps` batches: sizes by their share of the items, then items without replacement."""
        groups = self._by(items, lambda number: self._scans[self._task.items[number].volume].shape[1:])
        chance = np.array([len(group) for group in groups]) / len(items)
        for _ in range(steps):
            group = groups[int(random.choice(len(groups), p=chance))]
            yield self.batch(random.choice(group, min(batch_size, len(group)), replace=False))

    @staticmethod
    def _by(items: np.ndarray, kind) -> list[np.ndarray]:
        found: dict[object, list[int]] = defaultdict(list)
        for number in items.tolist():
            found[kind(number)].append(number)
        return [np.array(found[one]) for one in sorted(found)]  # pyright: ignore[reportArgumentType]
