"""The two MLPs a block can have. Each maps (…, d) to (…, d) through `mlp_hidden` features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dinox_model.config import ViTConfig


class GeluMLP(nn.Module):
    """down(gelu(up x)), with the exact GELU (erf): the tanh form would shift features by 1e-3."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x). Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def make_mlp(config: ViTConfig) -> GeluMLP | SwiGLU:
    """The MLP that `config.mlp` names."""
    kind = SwiGLU if config.mlp == "swiglu" else GeluMLP
    return kind(config.width, config.mlp_hidden)
