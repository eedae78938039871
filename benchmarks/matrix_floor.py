"""The floor of a network: its matrix products and attention alone, with nothing in between.

Each product has weights and results of its own, as in the network; what goes in is there already (one tensor for all
layers, so that it comes from the cache where it fits), and so is what comes back in the backward pass. No bias, norm,
activation, residual, rotation, loss or optimizer. The results of a forward are kept until its backward, as the
network's are.

Legend: b images, t tokens, d width, a heads, e features of a head.
Invariant: the floor does as many operations as `dinox_model.flops` counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dinox_model import ViTConfig
from dinox_model.flops import GATED
from dinox_model.heads.prototype import PrototypeHeadConfig
from dinox_model.workload import grid_of, num_tokens

Operation = Callable[[], Callable[[], object] | None]
"""A forward; returns its backward, which holds what it needs, or None where there is none."""


@dataclass(frozen=True)
class Tensors:
    """Makes the tensors of a floor: random, one for each shape that may be shared."""

    device: torch.device
    dtype: torch.dtype

    def fresh(self, *shape: int) -> Tensor:
        """Random numbers, of about the size that weights and features have."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * 0.1


class Floor:
    """Operations that `run` does one after the other, and backwards if there is a backward pass."""

    def __init__(self, tensors: Tensors, *, backward: bool) -> None:
        self.tensors, self.backward = tensors, backward
        self._operations: list[Operation] = []
        self._shared: dict[tuple[int, ...], Tensor] = {}

    def run(self) -> None:
        """Do all of it once."""
        if not self.backward:
            with torch.no_grad():
                for operation in self._operations:
                    operation()
            return
        pending = [operation() for operation in self._operations]
        gradients = []  # those of the weights stay, as in a network
        while pending:
            back = pending.pop()
            gradients.append(None if back is None else back())

    def product(self, rows: int, inputs: int, outputs: int, *, first: bool = False) -> None:
        """rows x inputs times a weight (outputs, inputs) of its own. first: no gradient for the input is needed."""
        weight = self.tensors.fresh(outputs, inputs)
        given, returned = self._share(rows, inputs), self._share(rows, outputs)

        def forward() -> Callable[[], object] | None:
            result = given @ weight.t()

            def back() -> Tensor:
                nonlocal result
                gradient = returned.t() @ given
                if not first:
                    torch.mm(returned, weight)
                del result
                return gradient

            return back if self.backward else None

        self._operations.append(forward)

    def attention(self, images: int, heads: int, tokens: int, features: int) -> None:
        """Scaled dot products of queries, keys, values (b, a, t, e) that lie as (b, t, a, e)."""
        shape = (images, tokens, heads, features)
        query, key, value = (self.tensors.fresh(*shape).transpose(1, 2).requires_grad_(self.backward) for _ in range(3))
        returned = self.tensors.fresh(*shape).transpose(1, 2)

        def forward() -> Callable[[], object] | None:
            mixed = F.scaled_dot_product_attention(query, key, value)

            def back() -> None:
                torch.autograd.grad(mixed, (query, key, value), returned)

            return back if self.backward else None

        self._operations.append(forward)

    def _share(self, *shape: int) -> Tensor:
        if shape not in self._shared:
            self._shared[shape] = self.tensors.fresh(*shape)
        return self._shared[shape]

    # ------------------------------------------------------------------------------------ parts of our networks

    def patch_embed(self, config: ViTConfig, images: int, size: int) -> None:
        """The first product of a network."""
        rows, columns = grid_of(config, size)
        self.product(images * rows * columns, config.in_channels * config.patch_size**2, config.width, first=True)

    def qkv(self, config: ViTConfig, images: int, size: int) -> None:
        """Queries, keys and values in one product."""
        self.product(images * num_tokens(config, size), config.width, 3 * config.width)

    def mixing(self, config: ViTConfig, images: int, size: int) -> None:
        """Attention of a block."""
        self.attention(images, config.num_heads, num_tokens(config, size), config.head_width)

    def projection(self, config: ViTConfig, images: int, size: int) -> None:
        """What follows attention."""
        self.product(images * num_tokens(config, size), config.width, config.width)

    def mlp(self, config: ViTConfig, images: int, size: int) -> None:
        """The products of an MLP."""
        rows = images * num_tokens(config, size)
        for _ in range(2 if config.mlp in GATED else 1):
            self.product(rows, config.width, config.mlp_hidden)
        self.product(rows, config.mlp_hidden, config.width)

    def network(self, config: ViTConfig, images: int, size: int) -> None:
        """A whole network."""
        self.patch_embed(config, images, size)
        for _ in range(config.num_layers):
            for part in (self.qkv, self.mixing, self.projection, self.mlp):
                part(config, images, size)

    def head(self, head: PrototypeHeadConfig, width: int, rows: int) -> None:
        """A `PrototypeHead` on `rows` tokens."""
        layers = (width, head.hidden, head.hidden, head.bottleneck, head.prototypes)
        for inputs, outputs in pairwise(layers):
            self.product(rows, inputs, outputs)
