"""The linear head: classes from one vector an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dinox_model.config import ViTConfig
from dinox_model.features import ViTFeatures
from dinox_model.fields import Count
from dinox_model.heads.head import Head, HeadConfig
from dinox_model.initialisation import materialise


@dataclass(frozen=True, kw_only=True)
class LinearHeadConfig(HeadConfig):
    """What a `LinearHead` looks at and gives."""

    kind = "linear"
    out_features: Count
    """Classes, or values to predict."""
    features: Literal["pooled", "patch_mean", "both"] = "pooled"
    """pooled: CLS, or the mean of the patches of a network without it; patch_mean: the mean of the patches; both: one
    behind the other, for networks with CLS."""

    def build(self, network: ViTConfig, *, seed: int = 0) -> LinearHead:
        return LinearHead(self, network, seed=seed)


class LinearHead(Head):
    """One Linear. With `features: both`, DINOv2's linear evaluation (Oquab et al., arXiv 2304.07193, appendix B)."""

    def __init__(self, config: LinearHeadConfig, network: ViTConfig, *, seed: int = 0) -> None:
        """Raises ValueError for `features: both` and a network without CLS: both would be the mean of the patches."""
        super().__init__()
        if config.features == "both" and not network.cls_token:
            raise ValueError("a linear head with features both needs a network with a CLS token; use patch_mean")
        self.config = config
        with torch.device("meta"):
            vectors = 2 if config.features == "both" else 1
            self.linear = nn.Linear(vectors * network.width, config.out_features)
        materialise(self, seed)

    def forward(self, features: ViTFeatures) -> Tensor:
        """(b, out_features)."""
        if self.config.features == "pooled":
            return self.linear(features.pooled)
        mean = features.patches.mean(dim=1)
        return self.linear(mean if self.config.features == "patch_mean" else torch.cat((features.pooled, mean), dim=1))
