"""Where a patch lies: axial rotary position embedding (RoPE), always computed in fp32.

Legend: h, w grid rows and columns; t tokens (prefix, then patches row by row); e features of one attention head.
Invariant: a rotation changes no norm; the product of a rotated query and a rotated key depends on their distance only.

Source: Su et al., RoFormer (arXiv 2104.09864), in DINOv3's axial form (Siméoni et al., arXiv 2508.10104, section 3.2).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST_PERIOD = 100.0
"""Bound of the slowest rotation's period, in units of the coordinate (-1 to 1 over an axis); the fastest has 1."""


class Rotations(NamedTuple):
    """Cosines and sines of every token's angles: fp32 (t, e/2) each."""

    cos: Tensor
    sin: Tensor


def patch_coordinates(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Centres of `length` patches along an axis that reaches from -1 to 1: fp32 (length,)."""
    return (torch.arange(length, dtype=torch.float32, device=device) + 0.5) / length * 2.0 - 1.0


def rotations(grid: tuple[int, int], head_width: int, num_prefix: int, device: torch.device | str = "cpu") -> Rotations:
    """The rotations for a grid of (h, w) patches behind `num_prefix` tokens, which are not rotated (angle 0).

    Angle j of the e/4 of an axis is 2 pi c / 100^(2j / (e/2)) with c the patch's coordinate; a token has its row's
    angles, then its column's.
    """
    num_angles = head_width // 4
    exponents = torch.arange(num_angles, dtype=torch.float32, device=device) / num_angles
    frequencies = 2.0 * math.pi / LONGEST_PERIOD**exponents
    rows = patch_coordinates(grid[0], device)[:, None, None] * frequencies
    columns = patch_coordinates(grid[1], device)[None, :, None] * frequencies
    shape = (*grid, num_angles)
    angles = torch.cat((rows.expand(shape), columns.expand(shape)), dim=-1).flatten(0, 1)
    angles = torch.cat((angles.new_zeros(num_prefix, 2 * num_angles), angles))
    return Rotations(angles.cos(), angles.sin())


def rotate(x: Tensor, by: Rotations) -> Tensor:
    """Rotate queries or keys (…, t, e): features i and i + e/2 of a token form a plane, turned by the token's angle i.

    Computed in fp32 and returned in the dtype of `x`: angles rounded to bf16 are wrong by up to a patch's step.
    """
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * by.cos - second * by.sin, second * by.cos + first * by.sin), dim=-1)
    return rotated.to(x.dtype)
