"""A patch embedding for another number of slices than it was trained with.

Source: the expansion in the FINO branch of Meta's dinov3: further channels get the mean filter, and all are scaled by
old / new. Invariant: an image whose channels are all alike gives the same tokens before and after.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adapt_channels(weight: Tensor, old: int, new: int) -> Tensor:
    """A patch embedding's weight (d, old·p·p) as (d, new·p·p), fp32.

    With more channels the first `old` keep their filters; with fewer, all get the mean filter (for one: their sum).
    Raises ValueError where the weight does not have `old` channels.
    """
    if old < 1 or new < 1 or weight.ndim != 2 or weight.shape[1] % old:
        raise ValueError(
            f"a patch embedding of {old} channels cannot be {tuple(weight.shape)}, nor become one of {new}"
        )
    if old == new:
        return weight
    by_channel = weight.float().unflatten(1, (old, -1))
    mean = by_channel.mean(dim=1, keepdim=True)
    kept = by_channel if new > old else by_channel[:, :0]
    wider = torch.cat((kept, mean.expand(-1, new - kept.shape[1], -1)), dim=1)
    return (wider * (old / new)).flatten(1)
