"""Queries that attend to a network's patches: the attention, a block of it, and a decoder with learned queries.

    queries ─▶ [ + g0·self(norm) ─▶ + g1·cross(norm, patches) ─▶ + g2·mlp(norm) ] × layers ─▶ norm ─▶ Linear

Pre-norm, as the network; the patches come from behind its final norm and are not normed again. No positions are added:
the patches carry theirs. Legend: b images, q queries, n patches, d width of the queries, a heads.
Source: Vaswani et al., Attention is all you need (arXiv 1706.03762), with learned queries as in DETR (Carion et al.,
arXiv 2005.12872).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinox_model.config import ViTConfig
from dinox_model.features import ViTFeatures
from dinox_model.fields import Count
from dinox_model.heads.head import HasOwnParameters, Head, HeadConfig
from dinox_model.initialisation import LINEAR_STD, materialise


class CrossAttention(nn.Module):
    """Multi-head attention of queries to other tokens: softmax(q k^T / sqrt(d/a)) v. Keys and values are one GEMM."""

    def __init__(self, width: int, context_width: int, num_heads: int) -> None:
        """Raises ValueError if `num_heads` does not divide `width`."""
        super().__init__()
        if width % num_heads:
            raise ValueError(f"{num_heads} attention heads cannot share {width} features out evenly")
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        """Rows: all heads' keys, all heads' values."""
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Queries (b, q, d), tokens (b, n, context width) to (b, q, d). Without tokens the queries attend to each
        other."""
        query = self._by_head(self.query(x))
        key_value = self.key_value(x if context is None else context)
        key, value = (self._by_head(part) for part in key_value.chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.projection(mixed.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Residual(HasOwnParameters):
    """x + gamma · branch(norm(x), …): pre-norm, with LayerScale unless `layer_scale` is None."""

    def __init__(self, branch: nn.Module, width: int, eps: float, layer_scale: float | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.branch = branch
        self.layer_scale = layer_scale
        self.gamma = None if layer_scale is None else nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        added = self.branch(self.norm(x), *context)
        return x + (added if self.gamma is None else self.gamma * added)

    def initialise_own(self, generator: torch.Generator) -> None:
        if self.gamma is not None and self.layer_scale is not None:
            nn.init.constant_(self.gamma, self.layer_scale)


class CrossAttentionBlock(nn.Module):
    """Queries attend to tokens, then an MLP with the exact GELU: (b, q, d), (b, n, context width) to (b, q, d)."""

    def __init__(
        self, width: int, context_width: int, num_heads: int, mlp_hidden: int, *, eps: float, layer_scale: float | None
    ) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Linear(width, mlp_hidden), nn.GELU(), nn.Linear(mlp_hidden, width))
        self.cross_attention = Residual(CrossAttention(width, context_width, num_heads), width, eps, layer_scale)
        self.mlp = Residual(mlp, width, eps, layer_scale)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.mlp(self.cross_attention(x, context))


class DecoderBlock(CrossAttentionBlock):
    """A `CrossAttentionBlock` whose queries attend to each other first."""

    def __init__(
        self, width: int, context_width: int, num_heads: int, mlp_hidden: int, *, eps: float, layer_scale: float | None
    ) -> None:
        super().__init__(width, context_width, num_heads, mlp_hidden, eps=eps, layer_scale=layer_scale)
        self.self_attention = Residual(CrossAttention(width, width, num_heads), width, eps, layer_scale)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return super().forward(self.self_attention(x), context)


@dataclass(frozen=True, kw_only=True)
class CrossAttentionDecoderConfig(HeadConfig):
    """The shape of a `CrossAttentionDecoder`."""

    kind = "cross_attention"
    out_features: Count
    """Values that each query gives."""
    num_queries: Count
    num_layers: Count = 2
    """Blocks."""
    width: Count | None = None
    """Features of a query; null: as many as the network's tokens have."""
    num_heads: Count | None = None
    """Attention heads; null: as many as the network has."""
    mlp_hidden: Count | None = None
    """Hidden features of each MLP; null: 4 x width."""
    layer_scale: float | None = None
    """First value of LayerScale on each residual; null: none."""

    def build(self, network: ViTConfig, *, seed: int = 0) -> CrossAttentionDecoder:
        return CrossAttentionDecoder(self, network, seed=seed)


class CrossAttentionDecoder(Head, HasOwnParameters):
    """Learned queries, blocks in which they attend to each other and to the patches, a norm and a Linear."""

    def __init__(self, config: CrossAttentionDecoderConfig, network: ViTConfig, *, seed: int = 0) -> None:
        """Raises ValueError if the heads do not divide the width."""
        super().__init__()
        width = config.width or network.width
        num_heads, mlp_hidden = config.num_heads or network.num_heads, config.mlp_hidden or 4 * width
        eps = network.norm_eps
        with torch.device("meta"):
            self.queries = nn.Parameter(torch.empty(1, config.num_queries, width))
            self.blocks = nn.ModuleList(
                DecoderBlock(width, network.width, num_heads, mlp_hidden, eps=eps, layer_scale=config.layer_scale)
                for _ in range(config.num_layers)
            )
            self.norm = nn.LayerNorm(width, eps=eps)
            self.linear = nn.Linear(width, config.out_features)
        materialise(self, seed)

    def forward(self, features: ViTFeatures) -> Tensor:
        """(b, num_queries, out_features)."""
        x = self.queries.expand(features.patches.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, features.patches)
        return self.linear(self.norm(x))

    def initialise_own(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.queries, std=LINEAR_STD, generator=generator)
