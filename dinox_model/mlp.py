"""The MLPs a block can have. Each maps (…, d) to (…, d) through `mlp_hidden` features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dinox_model.config import ViTConfig


class MLP(nn.Module):
    """down(f(up x)), f by name.

    `gelu`: the exact one, with erf (the tanh form would shift features by 1e-3). `relu2`: relu(x)^2, So et al., Primer
    (arXiv 2109.08668).
    """

    def __init__(self, width: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.squared = kind == "relu2"
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(F.relu(hidden).square() if self.squared else F.gelu(hidden))


class GatedMLP(nn.Module):
    """down(f(gate x) * up x), f by name: SiLU for `swiglu`, the exact GELU for `geglu`.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202).
    """

    def __init__(self, width: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.activation = {"swiglu": F.silu, "geglu": F.gelu}[kind]
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def make_mlp(config: ViTConfig) -> MLP | GatedMLP:
    """The MLP that `config.mlp` names."""
    kind = GatedMLP if config.mlp in ("swiglu", "geglu") else MLP
    return kind(config.width, config.mlp_hidden, config.mlp)
