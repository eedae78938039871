"""What a rank holds of a tensor that is shared out by rows: its rows, and where they stand in the whole.

Rows are shared out as `torch.chunk` does it, and fully_shard with it: rank r of w has rows [r·c, (r+1)·c) of n, where
c = ceil(n / w); the last ranks have fewer, or none. Invariant: `values` is a plain tensor of this rank alone, so that
optimizers, clipping and copies work on it without knowing of other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Rows of a tensor."""

    values: Tensor
    """This rank's rows; none of them where the tensor has fewer rows than there are ranks."""
    shape: torch.Size
    """Of the whole tensor, which has at least one dimension."""
    first: int
    """The whole's number of the first row."""

    def of(self, whole: Tensor) -> Tensor:
        """These rows of a whole tensor. Raises ValueError where it has another shape."""
        if whole.shape != self.shape:
            raise ValueError(f"has shape {tuple(whole.shape)}, expected {tuple(self.shape)}")
        return whole.narrow(0, self.first, len(self.values))

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of the first element, in each dimension."""
        return (self.first, *(0 for _ in self.shape[1:]))


Held = Part | Tensor
"""A plain tensor is whole, and the same on every rank."""


def part_of_rank(values: Tensor, shape: torch.Size, rank: int, count: int) -> Part:
    """Rank `rank` of `count` holds `values` of a tensor of `shape`. Raises ValueError where they are not its rows."""
    first, rows = rows_of_rank(shape[0], rank, count)
    # Nothing at all is what fully_shard makes of rows without elements.
    if values.shape[1:] != shape[1:] or (len(values) != rows and math.prod(shape)):
        raise ValueError(f"rank {rank} of {count} holds {tuple(values.shape)} of {tuple(shape)}, not {rows} rows")
    return Part(values, shape, first)


def rows_of_rank(rows: int, rank: int, count: int) -> tuple[int, int]:
    """The first of its rows, and how many they are."""
    each = math.ceil(rows / count)
    first = min(rank * each, rows)
    return first, min(each, rows - first)


def values_of(held: Mapping[str, Held]) -> dict[str, Tensor]:
    """The tensors themselves, to be copied, say."""
    return {name: one.values if isinstance(one, Part) else one for name, one in held.items()}


def values_by_file(files: Mapping[str, Mapping[str, Held]]) -> dict[str, dict[str, Tensor]]:
    """`values_of` each."""
    return {name: values_of(held) for name, held in files.items()}


def with_values(held: Mapping[str, Held], values: Mapping[str, Tensor]) -> dict[str, Held]:
    """`held`, whose values are others now: copies, on the host."""
    return {
        name: replace(one, values=values[name]) if isinstance(one, Part) else values[name] for name, one in held.items()
    }
