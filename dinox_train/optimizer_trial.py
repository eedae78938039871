"""The trial of AdamW and teacher's average in one pass against the plain update: a student and a teacher as small as
the comparison needs, or large enough to be timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dinox_model import ViTConfig, build
from dinox_train.network import Network
from dinox_train.optimizer import (
    OptimizerSettings,
    UpdatesInOnePass,
    clip_gradients,
    make_optimizer,
    set_group_values,
)
from dinox_train.teacher import update_teacher
from dinox_train.working_weights import MasterWeights

SMALL_WIDTH, FULL_WIDTH = 32, 1024
"""Of the trial's networks: to compare, and to time (25 million parameters)."""
TOLERANCE = 1e-6
"""Of weights, after an update that moved them by 1e-3."""
_RATE, _DECAY, _MOMENTUM, _LONGEST = 1e-3, 0.04, 0.9, 3.0


class UpdateTrial:
    """Both forms of an update on `device`, each a function of a 0-dim int tensor, the networks' width, to the fp32
    parameters of student and teacher after it. Narrow networks are made anew in each call, wide ones once."""

    def __init__(self, settings: OptimizerSettings, precision: str, device: torch.device) -> None:
        self.settings, self.precision, self.device = settings, precision, device
        self._made: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}

    def form(self, name: Literal["reference", "triton"]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The form of that name."""

        def called(width: Tensor) -> tuple[Tensor, Tensor]:
            if int(width) == SMALL_WIDTH:
                student, teacher = self._update_of(name, SMALL_WIDTH)()
                return student.clone(), teacher.clone()
            if name not in self._made:
                self._made[name] = self._update_of(name, int(width))
            return self._made[name]()

        return called

    def _update_of(self, name: str, width: int) -> Callable[[], tuple[Tensor, Tensor]]:
        student, teacher = self._weights(width, 0), self._weights(width, 1)
        for number, (_, parameter) in enumerate(student.named):
            parameter.grad = torch.full_like(parameter, 0.01).mul_(1 + number % 3).addcmul_(parameter, parameter)
        optimizer = self._optimizer(name, student, teacher)
        set_group_values(optimizer, _RATE, _DECAY)
        applied = torch.ones((), device=self.device)

        def update() -> tuple[Tensor, Tensor]:
            if isinstance(optimizer, UpdatesInOnePass):
                optimizer.clip(_LONGEST, by_part=True)
                optimizer.update(_MOMENTUM, applied)
            else:
                clip_gradients(student.named, _LONGEST, by_part=True)
                optimizer.step()
                update_teacher(teacher.buffer, student.buffer, _MOMENTUM, applied)
                for weights in (student, teacher):
                    weights.refresh()
            return student.buffer, teacher.buffer

        return update

    def _weights(self, width: int, seed: int) -> MasterWeights:
        config = ViTConfig(width=width, num_layers=2, num_heads=width // 32, mlp_hidden=4 * width)
        return MasterWeights(Network(build(config, seed=seed), {}).to(self.device), self.precision)

    def _optimizer(self, name: str, student: MasterWeights, teacher: MasterWeights) -> torch.optim.AdamW:
        if name == "reference":
            return make_optimizer(student.named, self.settings)
        from dinox_train.kernels.adamw_average import OnePassAdamW

        return OnePassAdamW(student, teacher, self.settings)
