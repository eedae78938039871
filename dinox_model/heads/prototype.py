"""The head that training puts on a network: features to prototype logits. It is no part of an exported network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinox_model.config import ViTConfig
from dinox_model.fields import Count
from dinox_model.heads.head import Head, HeadConfig
from dinox_model.initialisation import materialise

SHORTEST = 1e-3
"""Length under which a bottleneck is divided by this, not by its own. Ordinary ones are about 1 long. A masked patch
in a fresh network is about 1e-4 long, or 0: divided by that, its gradient would drown all others in the first updates.
"""


@dataclass(frozen=True, kw_only=True)
class PrototypeHeadConfig(HeadConfig):
    """Features of each layer of a `PrototypeHead`."""

    kind = "prototype"
    hidden: Count
    """Of the two hidden layers."""
    bottleneck: Count
    """Of the vector that is compared with the prototypes, and of each of them."""
    prototypes: Count
    """Logits."""

    def build(self, network: ViTConfig, *, seed: int = 0) -> PrototypeHead:
        return PrototypeHead(network.width, self.hidden, self.bottleneck, self.prototypes, seed=seed)


class PrototypeHead(Head):
    """Three-layer MLP to a bottleneck, L2-normalised, then its dot product with each prototype.

    Source: DINO (Caron et al., arXiv 2104.14294, section 3.1), without weight normalisation of the prototypes as in
    DINOv3: logits are not bounded by 1.
    """

    def __init__(self, in_features: int, hidden: int, bottleneck: int, prototypes: int, *, seed: int = 0) -> None:
        """First weights are a function of the sizes and `seed`, as in `dinox_model.build`."""
        super().__init__()
        with torch.device("meta"):
            self.mlp = nn.Sequential(
                nn.Linear(in_features, hidden),
                nn.GELU(),
                nn.Linear(hidden, hidden),
                nn.GELU(),
                nn.Linear(hidden, bottleneck),
            )
            self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
            """Its rows are the prototypes."""
        materialise(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Features (…, in_features) to logits (…, prototypes), not yet divided by a temperature."""
        hidden = self.mlp(x)
        # In fp32: a bf16 sum of squares makes lengths that differ from 1 by half a percent.
        return self.last_layer(F.normalize(hidden.float(), dim=-1, eps=SHORTEST).to(hidden.dtype))
