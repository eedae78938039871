"""Supervised classification: does the window's middle slice bear a mark? A linear head on CLS and the network below it.

It is there for a baseline and as the smallest example of an objective: no teacher, one term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dinox_model import ViTConfig
from dinox_train.network import LinearHead, Networks
from dinox_train.objectives.objective import LOCAL_NORM, Aim, Losses, Needs, Values
from dinox_train.objectives.supervised import binary_cross_entropy
from dinox_train.view_batch import NUM_GLOBAL, ViewBatch


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings:
    """Settings of the objective `classification`."""

    labels: str = "marks"
    """Name of the labels: OUT/labels/NAME.jsonl of each set."""


class Classification:
    """Binary cross-entropy of "this slice bears a mark", mean over the two global views of each image."""

    terms = ("classification",)

    def __init__(self, settings: ClassificationSettings) -> None:
        self.settings = settings

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.settings.labels)

    @property
    def unread(self) -> tuple[str, ...]:
        return ("backbone.mask_token", LOCAL_NORM)

    def heads(self, vit: ViTConfig, seed: int) -> dict[str, nn.Module]:
        return {"mark": LinearHead(vit.width, 1, seed=seed)}

    def first_state(self) -> dict[str, Tensor]:
        return {}

    def values(self, update: int) -> dict[str, float]:
        return {"weight_classification": 1.0}

    def observe(self, networks: Networks, batch: ViewBatch, values: Values) -> None:
        return None

    def aim(self, observed: Sequence[Any], values: Values, state: Mapping[str, Tensor]) -> Aim:
        return Aim(targets=observed)

    def couple(
        self, networks: Networks, batches: Sequence[ViewBatch], targets: Sequence[Any], values: Values
    ) -> Sequence[Any]:
        return targets

    def losses(
        self, networks: Networks, batch: ViewBatch, targets: Any, values: Values, *, total_images: int
    ) -> Losses:
        assert batch.labels is not None
        student = networks.student
        features = student.backbone(batch.global_views, draws=batch.global_draws, mm_per_pixel=batch.global_mm)
        logits = student.heads["mark"](features.cls)[:, 0]
        labels = batch.labels.repeat(NUM_GLOBAL)
        return {"classification": binary_cross_entropy(logits, labels, total_rows=NUM_GLOBAL * total_images)}
