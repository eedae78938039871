"""What one micro-batch brings to a step: views, what is masked in them, and what was drawn for the networks.

Invariant: everything random about a step stands here before it begins, so that a second pass over the same micro-batch
sees the same, and so that a micro-batch's part is that of the global batch, however that is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinox_model.draws import Draws

NUM_GLOBAL = 2


@dataclass(frozen=True)
class Masked:
    """The patches of the 2b global views that the student does not see."""

    masks: Tensor
    """bool (2b, n)."""
    indices: Tensor
    """int64 (m,): where `masks`, flattened, is true."""
    weights: Tensor
    """float32 (m,): 1 / masked patches of the view that the patch belongs to."""


@dataclass(frozen=True)
class ViewBatch:
    """The views of one micro-batch of b windows, view-major (all windows' view 0, then all windows' view 1, …).

    global_views: float32 (2b, depth, G, G); local_views: float32 (Kb, depth, L, L), K may be 0. The rest is there where
    the objective asks for it.
    """

    global_views: Tensor
    local_views: Tensor
    masked: Masked | None = None
    global_draws: Draws | None = None
    """Drop path and position augmentation of the student's forward of the global views."""
    local_draws: Draws | None = None
    teacher_mm: Tensor | None = None
    """float32 (2b, 2): mm of a pixel of each global view, along y and x."""
    global_mm: Tensor | None = None
    """The same as the student is told: NaN in views whose scale it shall do without."""
    local_mm: Tensor | None = None
    """float32 (Kb, 2), likewise the student's."""
    gram_views: Tensor | None = None
    """float32 (2b, depth, S, S): the boxes of the global views without distortion, for the Gram teacher."""
    gram_mm: Tensor | None = None
    """float32 (2b, 2)."""
    gram_patches: Tensor | None = None
    """int64 (2b, m): the patches of each global view that Gram anchoring compares; None: all."""
    labels: Tensor | None = None
    """float32 (b,): 1.0 where the window's middle slice bears a mark."""

    @property
    def num_images(self) -> int:
        return self.global_views.shape[0] // NUM_GLOBAL


def all_rows(parts: Sequence[Tensor]) -> Tensor:
    """The rows of a global batch, view by view, from those of its micro-batches: (V, b_i, …) each to (V, B, …)."""
    return torch.cat(list(parts), dim=1)
