"""The teacher: an exponential moving average of the student's parameters, in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 256 * 2**20
"""Parameters averaged at a time: bounds the memory that the differences take."""


@torch.no_grad()
def update_teacher(teacher: list[Tensor], student: list[Tensor], momentum: float, applied: Tensor) -> None:
    """teacher += applied x (1 - momentum) x (student - teacher), in place.

    teacher: fp32 parameters; student: the same shapes, in the same order. applied: 0-dim tensor on their device, 1.0 or
    0.0; the host never reads it. With 0.0 the teacher keeps its values, provided that the student is finite (it is: a
    masked update leaves the student as it was). Raises ValueError where the two do not fit.
    """
    _check(teacher, student)
    weight = applied.to(torch.float32) * (1.0 - momentum)
    for chunk in _chunks(teacher):
        # Not momentum x teacher + (1 - momentum) x student: that rounds the teacher anew in every update, also where it
        # equals the student or nothing is applied.
        differences = torch._foreach_sub(student[chunk], teacher[chunk])
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(teacher[chunk], differences)


def _chunks(tensors: list[Tensor]) -> Iterator[slice]:
    """Slices of `tensors` of about CHUNK_BYTES each, at least one tensor."""
    begin = size = 0
    for index, tensor in enumerate(tensors):
        size += tensor.nbytes
        if size >= CHUNK_BYTES or index == len(tensors) - 1:
            yield slice(begin, index + 1)
            begin, size = index + 1, 0


def _check(teacher: list[Tensor], student: list[Tensor]) -> None:
    if [tensor.shape for tensor in teacher] != [tensor.shape for tensor in student]:
        raise ValueError("teacher and student must have parameters of the same shapes, in the same order")
    if any(tensor.dtype != torch.float32 for tensor in teacher):
        raise ValueError("the teacher must be fp32: (1 - momentum) of a small change vanishes in fewer bits")
