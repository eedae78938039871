"""Masked pixels: the student predicts the pixels of the patches that it does not see, with one Linear on its tokens.

The mask token stands in a masked patch's place from the first block on, and the decoder is one Linear: SimMIM's form
(Xie et al., arXiv 2111.09886) with MAE's share of masked patches and normalised targets (He et al., arXiv 2111.06377).
An encoder that runs on the visible patches only, as MAE's, would be faster; this one needs nothing of its own in the
network. It is there for a baseline. It has no use for a teacher: that is only the student's average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dinox_model import ViTConfig
from dinox_train.masking import MaskSettings, masked_counts
from dinox_train.network import LinearHead, Networks
from dinox_train.objectives.mae import mae_loss, normalised_patches, patches_of
from dinox_train.objectives.objective import LOCAL_NORM, Aim, Losses, Needs, Values
from dinox_train.view_batch import NUM_GLOBAL, ViewBatch


@dataclass(frozen=True, kw_only=True)
class MAESettings:
    """Settings of the objective `mae`."""

    masked_share: float = 0.75
    normalise: bool = True
    """Each patch's pixels are compared less their mean and over their standard deviation."""


class MaskedAutoencoder:
    """Mean squared error of masked pixels, over the global views."""

    terms = ("mae",)

    def __init__(self, settings: MAESettings) -> None:
        self.settings = settings
        share = settings.masked_share
        self._masks = MaskSettings(fraction=1.0, share=(share, share), blocks=False)

    @property
    def needs(self) -> Needs:
        return Needs(masks=self._masks)

    @property
    def unread(self) -> tuple[str, ...]:
        return (LOCAL_NORM,)

    def heads(self, vit: ViTConfig, seed: int) -> dict[str, nn.Module]:
        return {"pixels": LinearHead(vit.width, vit.in_channels * vit.patch_size**2, seed=seed)}

    def first_state(self) -> dict[str, Tensor]:
        return {}

    def values(self, update: int) -> dict[str, float]:
        return {"weight_mae": 1.0}

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
        assert batch.masked is not None
        student, masked = networks.student, batch.masked
        seen = student.backbone(
            batch.global_views, masked.masks, draws=batch.global_draws, mm_per_pixel=batch.global_mm
        )
        predicted = student.heads["pixels"](seen.patches.flatten(0, 1).index_select(0, masked.indices))
        pixels = patches_of(batch.global_views, student.backbone.config.patch_size).flatten(0, 1)
        pixels = pixels.index_select(0, masked.indices)
        if self.settings.normalise:
            pixels = normalised_patches(pixels)
        num_crops = NUM_GLOBAL * total_images
        counts = masked_counts(
            self.needs.masks or MaskSettings(), num_crops=num_crops, num_patches=seen.patches.shape[1]
        )
        return {"mae": mae_loss(predicted, pixels, total_patches=int(counts.sum()))}
