"""How many prototypes a batch can feed.

Sinkhorn gives each of K prototypes the same share of N samples. The mean of the targets is then uniform, with entropy
ln K, and N targets can tell at most ln N nats apart: the mean entropy of a target is at least

    ln K - ln N

whatever the teacher thinks. With N = 32 and K = 16384 that is 6.2 of 9.7 nats: targets that say next to nothing, and a
DINO loss that stays near ln K. So K must follow N. For CLS, where samples are few, the count below lets balance force
about a quarter of ln K on the targets, K = N^(4/3): 65536 for N = 4096 and 131072 for N = 6144, as DINOv3's
ViT-L and DINOv2's recipes have it. Masked patches are many: there half as many prototypes as samples, again as those
recipes do (65536 for 120,000, 131072 for 237,000).
"""

from __future__ import annotations

import math
from typing import NamedTuple

FEWEST = 16
MOST = 131072


class Prototypes(NamedTuple):
    """Numbers of prototypes."""

    dino: int
    """Of the head on CLS."""
    ibot: int
    """Of the head on masked patches."""
    shared: int
    """Of one head for both: the smaller one, since both must be fed."""


def suggested_prototypes(batch_size: int, masked_patches: int, num_global: int = 2) -> Prototypes:
    """Powers of two that fit an update of `batch_size` images with `masked_patches` masked patches in all of its crops.

    batch_size: images of an update, over all micro-batches and ranks: N is num_global * batch_size. At least 16 and at
    most 131072 of each. Raises ValueError for a batch without an image or a negative number of patches.
    """
    if batch_size < 1 or num_global < 1 or masked_patches < 0:
        raise ValueError(f"{batch_size} images, {num_global} global views, {masked_patches} masked patches: no batch")
    dino = _power_of_two((num_global * batch_size) ** (4 / 3))
    ibot = _power_of_two(masked_patches / 2)
    return Prototypes(dino=dino, ibot=ibot, shared=min(dino, ibot))


def least_entropy(prototypes: int, samples: int) -> float:
    """The mean entropy in nats that balance alone forces on the targets of `samples` samples; 0 if it forces none."""
    return max(0.0, math.log(prototypes / samples))


def _power_of_two(count: float) -> int:
    """The nearest, by ratio."""
    return min(MOST, max(FEWEST, 2 ** round(math.log2(max(count, 1.0)))))
