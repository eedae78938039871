"""Normal numbers on the device as a function of (key, index): a counter and a hash, no state.

    index ^ key[0] ─▶ mix ─▶ + key[1] ─▶ mix ─▶ 16 bits of radius, 16 of angle ─▶ Box-Muller: two numbers

The keys come from the host's Philox (`keyed.uniform`), so that the quality asked of the mixing is that of noise in a
picture, at a tenth of Philox's cost in tensor operations. The mixing is lowbias32 (Chris Wellons, "Prospecting for hash
functions", public domain), in int32, whose products wrap alike on every device.

Invariant: the 32 bits behind a number are the same on every device; the number is so up to the rounding of log, cos
and sin. What stands beside a row changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)


def keyed_bits(keys: Tensor, count: int) -> Tensor:
    """int32 (r, count), all 32 bits random, of int32 keys (r, 2) on their device. count < 2^31.

    The keys must be random themselves: rows of one second key and neighbouring first keys are permutations of each
    other.
    """
    index = torch.arange(count, dtype=torch.int32, device=keys.device)
    bits = index ^ keys[:, :1]
    _mix_(bits)
    bits += keys[:, 1:]
    return _mix_(bits)


def keyed_normal(keys: Tensor, count: int) -> Tensor:
    """float32 (r, count) of mean 0 and variance 1, on the device of the int32 keys (r, 2); none beyond 4.9.

    Box and Muller, 1958: sqrt(-2 ln u) (cos, sin)(2 pi v), u and v on 2^16 equal steps.
    """
    bits = keyed_bits(keys, -(-count // 2))
    radius = ((bits >> 16) & 0xFFFF).float().add_(0.5).mul_(2.0**-16).log_().mul_(-2.0).sqrt_()
    angle = (bits & 0xFFFF).float().mul_(math.tau * 2.0**-16)
    return torch.cat((radius * angle.cos(), radius.mul_(angle.sin_())), dim=1)[:, :count]


def _mix_(bits: Tensor) -> Tensor:
    bits ^= (bits >> 16) & 0xFFFF  # a shift of int32 brings the sign along
    bits *= _MULTIPLIERS[0]
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _MULTIPLIERS[1]
    bits ^= (bits >> 16) & 0xFFFF
    return bits
