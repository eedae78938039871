"""A block: attention and MLP, each on the normed tokens, scaled by feature (LayerScale), added to the tokens.

Legend: b images, k of them that drop path keeps, t tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinox_model.attention import Attention
from dinox_model.config import ViTConfig
from dinox_model.initialisation import initialise_linear
from dinox_model.kernels.dispatch import REFERENCE
from dinox_model.mlp import make_mlp
from dinox_model.norm import Norm, make_norm
from dinox_model.positions import Rotations


class KeptRows(NamedTuple):
    """The images that a block's residuals are computed for; the others pass by. One block's share of `Draws`."""

    attention: Tensor
    """int64 (k,), indices into b; k may be 0."""
    mlp: Tensor
    attention_scale: float
    """By this the kept images' residual is multiplied."""
    mlp_scale: float


class Block(nn.Module):
    """x + gamma1 · attention(norm1 x), then x + gamma2 · mlp(norm2 x); without LayerScale there are no gammas."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        scaled = config.layer_scale is not None
        self.kernels = REFERENCE
        """What runs; `execution.use` chooses."""
        self.norm1 = make_norm(config, config.width)
        self.attention = Attention(config)
        self.gamma1 = nn.Parameter(torch.empty(config.width)) if scaled else None
        self.norm2 = make_norm(config, config.width)
        self.mlp = make_mlp(config)
        self.gamma2 = nn.Parameter(torch.empty(config.width)) if scaled else None

    def forward(self, x_BTD: Tensor, by: Rotations | None, kept: KeptRows | None = None) -> Tensor:
        """(b, t, d) to (b, t, d). by: None for networks without rotary positions. kept: None for all images."""
        if kept is None and self.kernels.residual_norm != REFERENCE.residual_norm:
            return self._fused(x_BTD, by)
        if kept is None:
            x_BTD = _plus(x_BTD, self.gamma1, self.attention(self.norm1(x_BTD), by))
            return _plus(x_BTD, self.gamma2, self.mlp(self.norm2(x_BTD)))

        def attention(some_KTD: Tensor) -> Tensor:
            return self.attention(self.norm1(some_KTD), by and by.of_images(kept.attention))

        def mlp(some_KTD: Tensor) -> Tensor:
            return self.mlp(self.norm2(some_KTD))

        x_BTD = _plus_kept(x_BTD, self.gamma1, attention, kept.attention, kept.attention_scale)
        return _plus_kept(x_BTD, self.gamma2, mlp, kept.mlp, kept.mlp_scale)

    def _fused(self, x_BTD: Tensor, by: Rotations | None) -> Tensor:
        """The same with each norm in one pass, the second together with the residual before it."""
        from dinox_model.kernels.residual_norm import norm, residual_norm

        # Under autocast the products would round the norms' results anyway: they are stored so.
        device = x_BTD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        residual = self.attention(norm(x_BTD, **_parts_of(self.norm1), normed_dtype=dtype), by)
        parts = _parts_of(self.norm2)
        x_BTD, normed = residual_norm(x_BTD, residual, self.gamma1, **parts, normed_dtype=dtype)
        return _plus(x_BTD, self.gamma2, self.mlp(normed))

    def initialise(self, generator: torch.Generator, config: ViTConfig) -> None:
        """Truncated normal linears without bias, identity norms, LayerScale as configured."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                initialise_linear(module, generator)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
        for bias in (self.attention.q_bias, self.attention.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for gamma in (self.gamma1, self.gamma2):
            if gamma is not None and config.layer_scale is not None:
                nn.init.constant_(gamma, config.layer_scale)
        if config.zero_init_residuals:  # after their draws, so that no other weight changes
            nn.init.zeros_(self.attention.projection.weight)
            nn.init.zeros_(self.mlp.down.weight)


def _parts_of(norm: Norm) -> dict[str, Any]:
    """A norm as the kernels' arguments."""
    if isinstance(norm, nn.LayerNorm):
        return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps, "kind": "layer"}
    return {"weight": norm.weight, "bias": None, "eps": norm.eps, "kind": "rms"}


def _plus(x: Tensor, gamma: Tensor | None, residual: Tensor) -> Tensor:
    """x + gamma · residual, in one pass over memory; LayerScale: Touvron et al. (arXiv 2103.17239, section 2)."""
    return x + residual if gamma is None else torch.addcmul(x, gamma, residual)


def _plus_kept(
    x: Tensor, gamma: Tensor | None, residual_of: Callable[[Tensor], Tensor], rows: Tensor, scale: float
) -> Tensor:
    """The same for some rows of x, with the residual times `scale`; nothing is computed for the others."""
    residual = residual_of(x.index_select(0, rows))
    scaled = residual if gamma is None else gamma * residual
    return x.index_add(0, rows, scaled.to(x.dtype), alpha=scale)
