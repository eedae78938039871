"""The norms a network can have, over the last dimension; identity at first."""

from __future__ import annotations

from torch import nn

from dinox_model.config import ViTConfig

Norm = nn.LayerNorm | nn.RMSNorm


def make_norm(config: ViTConfig, size: int) -> Norm:
    """The norm that `config.norm` names, over `size` features: maps (…, size) to the same shape.

    `layer`: (x - mean) / sqrt(variance + eps) · weight + bias (Ba et al., arXiv 1607.06450); `rms`: x / sqrt(mean of
    x^2 + eps) · weight (Zhang and Sennrich, arXiv 1910.07467). eps is `config.norm_eps`.
    """
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(size, eps=config.norm_eps)
