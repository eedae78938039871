"""The ranks of a run as the mathematics sees them: which one this is, how many there are, and one collective.

A rank is to a global batch what a micro-batch is: it has some of the rows, and its shares of a loss add up, over all
ranks, to the whole batch's. Nothing here knows torch.distributed; dinox_train/parallel.py hands the collective in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


class AllReduce(Protocol):
    """A collective: elementwise sum or maximum of all ranks' `values`, the same on every rank, in a tensor of its own;
    without gradients."""

    def __call__(self, values: Tensor, operation: Literal["sum", "max"]) -> Tensor: ...


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `count`."""

    rank: int = 0
    count: int = 1
    all_reduce: AllReduce | None = None
    """None: there is one rank."""

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over the ranks."""
        return values if self.all_reduce is None else self.all_reduce(values, "sum")

    def mean(self, values: Tensor) -> Tensor:
        """Elementwise over the ranks, each of which counts alike."""
        return values if self.all_reduce is None else self.all_reduce(values, "sum") / self.count

    def any(self, values: Tensor) -> Tensor:
        """Elementwise over the ranks' booleans."""
        if self.all_reduce is None:
            return values
        return self.all_reduce(values.to(torch.float32), "max") > 0

    def rows(self, own: Tensor, dim: int = 0) -> Tensor:
        """The rows (along `dim`) of all ranks, rank after rank, from as many `own` of each; without gradients.

        A sum of what is zero but for one rank: features and gradients of a batch, a few megabytes.
        """
        if self.all_reduce is None:
            return own
        size = own.shape[dim]
        shape = (*own.shape[:dim], self.count * size, *own.shape[dim + 1 :])
        whole = torch.zeros(shape, dtype=own.dtype, device=own.device)
        whole.narrow(dim, self.rank * size, size).copy_(own.detach())
        return self.all_reduce(whole, "sum")

    def own_rows(self, whole: Tensor, dim: int = 0) -> Tensor:
        """This rank's rows of what `rows` gave."""
        size = whole.shape[dim] // self.count
        return whole.narrow(dim, self.rank * size, size)


ALONE = Ranks()
"""One process."""
