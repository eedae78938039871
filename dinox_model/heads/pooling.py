"""The attentive pooling head: learned queries choose among the patches, and a Linear reads what they found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinox_model.config import ViTConfig
from dinox_model.features import ViTFeatures
from dinox_model.fields import Count
from dinox_model.heads.cross_attention import CrossAttention
from dinox_model.heads.head import HasOwnParameters, Head, HeadConfig
from dinox_model.initialisation import LINEAR_STD, materialise


@dataclass(frozen=True, kw_only=True)
class AttentivePoolHeadConfig(HeadConfig):
    """What an `AttentivePoolHead` asks the patches, and what it gives."""

    kind = "attentive_pool"
    out_features: Count
    """Classes, or values to predict."""
    num_queries: Count = 1
    """Learned queries; their answers are joined before the last Linear."""
    num_heads: Count | None = None
    """Attention heads; null: as many as the network has."""

    def build(self, network: ViTConfig, *, seed: int = 0) -> AttentivePoolHead:
        return AttentivePoolHead(self, network, seed=seed)


class AttentivePoolHead(Head, HasOwnParameters):
    """Learned queries attend to the patches; a Linear reads their answers.

    Source: attentive probing, Chen et al., Context Autoencoder (arXiv 2202.03026, section 3). First queries are near 0,
    so that the head begins near the mean of the patches.
    """

    def __init__(self, config: AttentivePoolHeadConfig, network: ViTConfig, *, seed: int = 0) -> None:
        """Raises ValueError if the heads do not divide the network's width."""
        super().__init__()
        width = network.width
        with torch.device("meta"):
            self.queries = nn.Parameter(torch.empty(1, config.num_queries, width))
            self.attention = CrossAttention(width, width, config.num_heads or network.num_heads)
            self.linear = nn.Linear(config.num_queries * width, config.out_features)
        materialise(self, seed)

    def forward(self, features: ViTFeatures) -> Tensor:
        """(b, out_features)."""
        patches = features.patches
        answers = self.attention(self.queries.expand(patches.shape[0], -1, -1), patches)
        return self.linear(answers.flatten(1))

    def initialise_own(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.queries, std=LINEAR_STD, generator=generator)
