"""Small facts from the host to where they are used, without the host waiting for the device.

Invariant: the values may be thrown away at once; the copy is of the moment of the call.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """`values`, which lie on the host, on `device`; on a CPU the same memory, where an array is contiguous.

    From plain memory a copy to a GPU would make the host wait for what the GPU does before it.
    """
    told = torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else values
    if torch.device(device).type == "cuda":
        told = told.pin_memory()
    return told.to(device, non_blocking=True)
