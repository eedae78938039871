"""From the loader's int16 batch on the host to the training device."""

from __future__ import annotations

import torch
from torch import Tensor

from dinox_io import Batch


def to_device(batch: Batch, device: torch.device) -> Tensor:
    """The windows of `batch`, int16 HU (b, depth, Y, X), on `device`; -1024 beyond a slice's true size.

    On CPU the tensor is the loader's memory, without a copy: use it before the next batch is asked for.
    """
    return torch.from_numpy(batch.images).to(device)
