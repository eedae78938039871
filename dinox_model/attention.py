"""Self-attention over all tokens of an image, with one GEMM for queries, keys and values.

Legend: b images, t tokens, d width, a heads, e = d/a features of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinox_model.config import ViTConfig
from dinox_model.positions import Rotations, rotate


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(e)) v, with rotated queries and keys."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias == "full")
        """Rows: all heads' queries, all heads' keys, all heads' values."""
        self.q_bias = nn.Parameter(torch.empty(width)) if config.qkv_bias == "k_masked" else None
        self.v_bias = nn.Parameter(torch.empty(width)) if config.qkv_bias == "k_masked" else None
        self.projection = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, by: Rotations) -> Tensor:
        """(b, t, d) to (b, t, d)."""
        num_images, num_tokens, width = x_BTD.shape
        qkv = F.linear(x_BTD, self.qkv.weight, self._bias())
        qkv = qkv.view(num_images, num_tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        query_BATE, key_BATE = rotate(qkv[:2], by)
        mixed_BATE = F.scaled_dot_product_attention(query_BATE, key_BATE, qkv[2])
        return self.projection(mixed_BATE.transpose(1, 2).reshape(num_images, num_tokens, width))

    def _bias(self) -> Tensor | None:
        if self.q_bias is None or self.v_bias is None:
            return self.qkv.bias
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
