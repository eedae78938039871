"""The teacher: an exponential moving average of the student's parameters, in fp32.

Invariant: the teacher moves only here. In bf16 it would not move at all: (1 - momentum) of a difference is less than
half the distance of two neighbouring bf16 numbers, and rounds to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def update_teacher(teacher: Tensor, student: Tensor, momentum: float, applied: Tensor) -> None:
    """teacher += applied x (1 - momentum) x (student - teacher), in place, in one pass over memory.

    teacher, student: fp32 tensors of one shape, as `MasterWeights.buffer` (n,) holds all parameters of a network.
    applied: 0-dim tensor on their device, 1.0 or 0.0; the host never reads it. With 0.0 the teacher keeps its values,
    provided that the student is finite (it is: a masked update leaves the student as it was). Raises ValueError where
    the two do not fit.
    """
    if teacher.shape != student.shape:
        raise ValueError(f"teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must have one shape")
    if teacher.dtype != torch.float32:
        raise ValueError(f"the teacher must be fp32, not {teacher.dtype}: (1 - momentum) of a small change vanishes")
    # lerp, and not momentum x teacher + (1 - momentum) x student: that rounds the teacher anew in every update, also
    # where it equals the student or nothing is applied. One buffer, since a kernel for each of some 200 parameters, or
    # differences in memory of their own, cost more than the average itself.
    teacher.lerp_(student, applied.to(torch.float32) * (1.0 - momentum))
