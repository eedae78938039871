"""Self-attention over all tokens of an image, with one GEMM for queries, keys and values.

Legend: b images, t tokens, d width, a heads, e = d/a features of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinox_model.config import ViTConfig
from dinox_model.kernels.dispatch import REFERENCE, attend, attend_packed
from dinox_model.norm import Norm, make_norm
from dinox_model.positions import Rotations, rotate


class JoinedLinear(nn.Linear):
    """A linear that can be handed its bias; called as a module, so that what is put around it (LoRA) takes part."""

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(input, self.weight, self.bias if bias is None else bias)


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(e)) v; queries and keys are normed first and then rotated, if at all.

    Source of the norm of queries and keys: Dehghani et al., ViT-22B (arXiv 2302.05442, section 2).
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.width
        self.kernels = REFERENCE
        """What runs; `execution.use` chooses."""
        self.num_heads = config.num_heads
        self.qkv = JoinedLinear(width, 3 * width, bias=config.qkv_bias == "full")
        """Rows: all heads' queries, all heads' keys, all heads' values."""
        self.q_bias = nn.Parameter(torch.empty(width)) if config.qkv_bias == "k_masked" else None
        self.v_bias = nn.Parameter(torch.empty(width)) if config.qkv_bias == "k_masked" else None
        self.q_norm = make_norm(config, config.head_width) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_width) if config.qk_norm else None
        self.projection = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, by: Rotations | None) -> Tensor:
        """(b, t, d) to (b, t, d). by: None where queries and keys are not rotated."""
        num_tokens = x_BTD.shape[1]
        backend = self.kernels.attention_of(num_tokens)
        if self.kernels.wants_packed(num_tokens):
            mixed_BTAE = attend_packed(self._packed(x_BTD, by), backend)
        else:
            mixed_BTAE = attend(*self.queries_keys_values(x_BTD, by), backend).transpose(1, 2)
        return self.projection(mixed_BTAE.reshape(x_BTD.shape))

    def maps(self, x_BTD: Tensor, by: Rotations | None) -> Tensor:
        """The weights that `forward` mixes values with: fp32 (b, a, t, t), a row for each query, rows summing to 1."""
        query_BATE, key_BATE, _ = self.queries_keys_values(x_BTD, by)
        with torch.autocast(x_BTD.device.type, enabled=False):
            logits = query_BATE.float() @ key_BATE.float().transpose(-1, -2)
            return (logits / math.sqrt(query_BATE.shape[-1])).softmax(dim=-1)

    def queries_keys_values(self, x_BTD: Tensor, by: Rotations | None) -> tuple[Tensor, Tensor, Tensor]:
        """(b, a, t, e) each, of one dtype; queries and keys as they are multiplied with each other."""
        qkv = self.qkv(x_BTD, self._bias())
        # unbind, not indexing: its backward writes the three gradients into one buffer instead of adding zeros.
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        return self._placed(query, self.q_norm, by), self._placed(key, self.k_norm, by), value

    def _packed(self, x_BTD: Tensor, by: Rotations | None) -> Tensor:
        """The same as (b, t, 3, a, e), where the GEMM left them unless queries and keys are normed."""
        from dinox_model.kernels.rotate import rotate_packed, rotate_packed_reference

        qkv_BT3AE = self.qkv(x_BTD, self._bias()).unflatten(-1, (3, self.num_heads, -1))
        if self.q_norm is not None or self.k_norm is not None:
            query, key, value = qkv_BT3AE.unbind(2)
            parts = (self._placed(query, self.q_norm, None), self._placed(key, self.k_norm, None), value)
            qkv_BT3AE = torch.stack(parts, dim=2)
        if by is None:
            return qkv_BT3AE
        if self.kernels.rotate == REFERENCE.rotate:
            return rotate_packed_reference(qkv_BT3AE, by)
        # Attention alone reads what comes back, and every backend of it makes a gradient of its own.
        return rotate_packed(qkv_BT3AE, by, owned=True)

    def _placed(self, x_BATE: Tensor, norm: Norm | None, by: Rotations | None) -> Tensor:
        placed = x_BATE if norm is None else norm(x_BATE.to(norm.weight.dtype))
        return (placed if by is None else rotate(placed, by)).to(x_BATE.dtype)

    def _bias(self) -> Tensor | None:
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
