"""What losses compute in: float32 or better whatever autocast says, and directions that are always finite."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(values: Tensor) -> Tensor:
    """`values` in float32; float64 stays what it is. Gradients come back in the dtype that was given."""
    return values if values.dtype == torch.float64 else values.float()


def without_autocast(values: Tensor) -> torch.autocast:
    """A context on the device of `values` in which matrix products keep the dtype of what they multiply."""
    return torch.autocast(values.device.type, enabled=False)


def directions(vectors: Tensor) -> Tensor:
    """Each vector (…, d) divided by its length. A vector of zeros stays zeros, with a finite gradient."""
    squares = vectors.square().sum(dim=-1, keepdim=True)
    return vectors / torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt()
