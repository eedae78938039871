"""What a network returns: tokens by name and place, never one tensor with offsets."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ViTFeatures(NamedTuple):
    """What a network says about b images; all after the final norm."""

    cls: Tensor | None
    """(b, d): one vector for each image; None for a network without CLS token."""
    registers: Tensor
    """(b, r, d): scratch tokens, of no use outside but for diagnosis."""
    patches: Tensor
    """(b, n, d): one vector for each patch, row by row."""
    grid: tuple[int, int]
    """(h, w): rows and columns of patches; n = h·w."""
    layers: tuple[ViTFeatures, ...] = ()
    """The same after earlier blocks, of those that were asked for, in that order."""

    @property
    def patches_as_grid(self) -> Tensor:
        """(b, h, w, d)."""
        return self.patches.unflatten(1, self.grid)

    @property
    def pooled(self) -> Tensor:
        """(b, d): CLS, or for a network without it the mean of the patches."""
        return self.patches.mean(dim=1) if self.cls is None else self.cls
