"""Which tensors of ours are which tensors of theirs: renamed, reshaped, joined or cut, never computed with.

Invariant: the numbers of both sides of a `Pair` are the same, in the same order, when each side's tensors are flattened
and joined; so reading after writing gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ZEROS = ""
"""Stands among our names for numbers that only they have: written as 0, and not looked at when read."""


@dataclass(frozen=True)
class Pair:
    """`ours`, joined, are `theirs`, joined; all of theirs have the same shape."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    """Of each tensor of theirs."""

    @property
    def names(self) -> tuple[str, ...]:
        """Our names, without `ZEROS`."""
        return tuple(name for name in self.ours if name != ZEROS)

    def read(self, theirs: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Our tensors, fp32, of our `shapes`, from theirs, which have `self.shape`."""
        joined = torch.cat([theirs[name].reshape(-1) for name in self.theirs]).float()
        parts = joined.split(self._counts({name: math.prod(shapes[name]) for name in self.names}))
        return {
            name: part.reshape(shapes[name]).clone()
            for name, part in zip(self.ours, parts, strict=True)
            if name != ZEROS
        }

    def write(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors from ours."""
        counts = self._counts({name: ours[name].numel() for name in self.names})
        one = ours[self.names[0]]
        parts = [
            one.new_zeros(count) if name == ZEROS else ours[name].reshape(-1)
            for name, count in zip(self.ours, counts, strict=True)
        ]
        pieces = torch.cat(parts).chunk(len(self.theirs))
        return {name: piece.reshape(self.shape) for name, piece in zip(self.theirs, pieces, strict=True)}

    def _counts(self, known: Mapping[str, int]) -> list[int]:
        """How many numbers each of ours has; `ZEROS` (at most one) has the rest of theirs."""
        rest = len(self.theirs) * math.prod(self.shape) - sum(known.values())
        return [rest if name == ZEROS else known[name] for name in self.ours]


def same_linear(ours: str, theirs: str, rows: int, columns: int) -> list[Pair]:
    """Weight and bias of a linear that both have."""
    return [
        Pair((f"{ours}.weight",), (f"{theirs}.weight",), (rows, columns)),
        Pair((f"{ours}.bias",), (f"{theirs}.bias",), (rows,)),
    ]


def same_norm(ours: str, theirs: str, width: int) -> list[Pair]:
    """Weight and bias of a LayerNorm that both have."""
    return [Pair((f"{ours}.{part}",), (f"{theirs}.{part}",), (width,)) for part in ("weight", "bias")]
