"""A training update of one network in three forms, which compute the same: eager, compiled, and compiled with all our
kernels. Their losses are compared, update by update; then each is timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peak_memory import wait
from update_case import OurUpdate, UpdateCase

from dinox_model.execution import Execution
from dinox_model.kernels.dispatch import REFERENCE, Kernels
from dinox_train.objectives.dinov3 import DINOv3
from dinox_train.optimizer import set_group_values
from dinox_train.working_weights import MasterWeights

EAGER, COMPILED, OURS = "eager", "compiled", "ours"
FUSED = Kernels(attention="triton", rotate="triton", residual_norm="triton")


@dataclass(frozen=True)
class ArmResult:
    """What came out of one form."""

    losses: list[float]
    """Of each update, from the first."""
    seconds: list[float]
    """Of each update after those that compile."""
    memory_bytes: int
    """At the peak, of what torch's allocator has handed out; 0 on a CPU."""
    masked_patches: int

    def furthest_from(self, other: ArmResult) -> float:
        """Largest relative difference of a loss."""
        return max(abs(a / b - 1.0) for a, b in zip(self.losses, other.losses, strict=True))


def arms(device: torch.device) -> tuple[str, ...]:
    """Those that this device can run."""
    return (EAGER, COMPILED, OURS) if device.type == "cuda" else (EAGER,)


def run_arm(case: UpdateCase, arm: str, *, updates: int, warm_up: int) -> ArmResult:
    """`updates` updates from the same start in one form; the first `warm_up` are not timed."""
    update = _make(case, arm)
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(case.device)
    totals: list[torch.Tensor] = []
    seconds: list[float] = []
    for number in range(updates):
        begin = time.perf_counter()
        totals.append(torch.stack(list(update.run().terms.values())).sum())
        wait(case.device)
        if number >= warm_up:
            seconds.append(time.perf_counter() - begin)
    memory = torch.cuda.max_memory_allocated(case.device) if case.device.type == "cuda" else 0
    return ArmResult(_numbers(totals), seconds, memory, update.masked_patches)


def _make(case: UpdateCase, arm: str) -> OurUpdate:
    is_ours = arm == OURS
    update = OurUpdate(case, DINOv3(case.settings, fused=is_ours))
    update.networks.run_with(FUSED if is_ours else REFERENCE)
    update.networks.run_as(Execution(compile="off" if arm == EAGER else "blocks"))
    if is_ours:
        from dinox_train.kernels.adamw_average import OnePassAdamW

        student, teacher = update.networks.student_weights, update.networks.teacher_weights
        assert isinstance(student, MasterWeights)
        assert isinstance(teacher, MasterWeights)
        hyperparameters = case.hyperparameters
        update.optimizer = OnePassAdamW(student, teacher, hyperparameters)
        set_group_values(update.optimizer, hyperparameters.learning_rate, hyperparameters.weight_decay)
    return update


def _numbers(totals: Sequence[torch.Tensor]) -> list[float]:
    return torch.stack(list(totals)).float().tolist()


def product_peak(device: torch.device, side: int) -> float:
    """FLOP/s of one square matrix product in bf16, the best of some: what this device can do, measured."""
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        wait(device)
        begin = time.perf_counter()
        for _ in range(3):
            torch.mm(left, left)
        wait(device)
        best = min(best, (time.perf_counter() - begin) / 3)
    return 2.0 * side**3 / best
