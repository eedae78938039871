"""Where a network looks: the softmax weights of its attention, as the forward pass computes them.

Legend: b images, a heads, t tokens (p prefix tokens, then n = h·w patches), r registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dinox_model.block import Block
from dinox_model.vit import VisionTransformer, block_numbers


class AttentionMaps(NamedTuple):
    """One block's attention: each row sums to 1 over all tokens, so what it gives to patches alone sums to less."""

    weights: Tensor
    """float32 (b, a, t, t): how much of each token's value (last) goes to each token (before it)."""
    grid: tuple[int, int]
    """(h, w)."""
    has_cls: bool
    num_registers: int

    @property
    def from_cls(self) -> Tensor:
        """(b, a, h, w): what CLS takes from each patch. Raises ValueError for a network without CLS token."""
        if not self.has_cls:
            raise ValueError("this network has no CLS token; from_patches says what its patches look at")
        return self._to_patches(self.weights[:, :, 0])

    @property
    def from_registers(self) -> Tensor:
        """(b, a, r, h, w): what each register takes from each patch."""
        return self._to_patches(self.weights[:, :, int(self.has_cls) : self._num_prefix])

    @property
    def from_patches(self) -> Tensor:
        """(b, a, h, w, h, w): what each patch (first pair) takes from each patch (second pair)."""
        return self._to_patches(self.weights[:, :, self._num_prefix :]).unflatten(2, self.grid)

    @property
    def _num_prefix(self) -> int:
        return int(self.has_cls) + self.num_registers

    def _to_patches(self, weights: Tensor) -> Tensor:
        return weights[..., self._num_prefix :].unflatten(-1, self.grid)


def attention_maps(
    model: VisionTransformer,
    x: Tensor,
    layers: Sequence[int] = (-1,),
    masks: Tensor | None = None,
    *,
    mm_per_pixel: Tensor | None = None,
) -> tuple[AttentionMaps, ...]:
    """The attention of these blocks (numbers from 0, negative from the end) for images, in the order asked for.

    The other arguments, and errors, are those of the network's forward. Queries and keys are those that the network
    multiplies: normed and rotated where it does so, registers and masked patches included. A map takes 4·b·a·t² bytes
    (1 GB for one image of 1024 x 1024 pixels and 16 heads), so ask only for the blocks that you look at, and under
    `torch.no_grad()`.
    """
    wanted = block_numbers(layers, model.config.num_layers)
    tokens, by, grid = model.embed(x, masks, mm_per_pixel=mm_per_pixel)
    found: dict[int, AttentionMaps] = {}
    for number, block in enumerate(model.blocks[: max(wanted, default=-1) + 1]):
        assert isinstance(block, Block)
        if number in wanted:
            weights = block.attention.maps(block.norm1(tokens), by)
            found[number] = AttentionMaps(weights, grid, model.config.cls_token, model.config.num_registers)
        tokens = block(tokens, by)
    return tuple(found[number] for number in wanted)
