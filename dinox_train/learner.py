"""What learns: student, teacher and optimizer of a run, their values at an update, and their way into a checkpoint and
back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dinox_model
from dinox_model import PRESETS, Preprocess
from dinox_train import schedule
from dinox_train.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer
from dinox_train.config import Config, ConfigError
from dinox_train.optimizer import make_optimizer, set_group_values
from dinox_train.step import NUM_GLOBAL, Network, StepResult, StepSettings, ViewBatch, build_network, train_step
from dinox_train.views import ViewSettings


@dataclass(frozen=True)
class Values:
    """What the schedules say for one update."""

    learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float


def values_at(config: Config, update: int) -> Values:
    """The scheduled values of update `update` (from 1): a pure function of the configuration."""
    optimizer, objective, teacher = config.optimizer, config.objective, config.teacher
    total, warmup = config.schedule.updates or config.train.updates, config.schedule.warmup_updates
    return Values(
        learning_rate=schedule.warmup_cosine(
            update - 1, total, peak=optimizer.learning_rate, final=optimizer.final_learning_rate, warmup=warmup
        ),
        weight_decay=schedule.cosine(
            update - 1, total, start=optimizer.weight_decay, final=optimizer.final_weight_decay
        ),
        teacher_momentum=schedule.cosine(update - 1, total, start=teacher.momentum, final=teacher.final_momentum),
        teacher_temperature=schedule.linear_ramp(
            update - 1,
            objective.teacher_temperature_warmup_updates,
            start=objective.teacher_temperature_start,
            final=objective.teacher_temperature,
        ),
    )


class Learner:
    """Student, teacher and optimizer on a device. Student and teacher start equal, as a function of the seed alone."""

    def __init__(self, config: Config, preprocess: Preprocess, device: torch.device) -> None:
        self.config = config
        self.views = view_settings(config)
        self.student = _network(config, preprocess).to(device)
        self.teacher = _network(config, preprocess).to(device).requires_grad_(False)
        self.named = list(self.student.named_parameters())
        self.optimizer = make_optimizer(self.student, config.optimizer)
        self.settings = StepSettings(
            precision=config.precision,
            student_temperature=config.objective.student_temperature,
            sinkhorn_iterations=config.objective.sinkhorn_iterations,
            clip_norm=config.optimizer.clip_norm,
        )

    @property
    def preprocess(self) -> Preprocess:
        return self.teacher.backbone.preprocess

    @property
    def tokens_per_image(self) -> int:
        """Tokens that the student sees of one image: patches, CLS and registers of all its views."""
        vit, views = self.student.backbone.config, self.views
        sizes = [views.global_size] * NUM_GLOBAL + [views.local_size] * views.num_local
        return sum((size // vit.patch_size) ** 2 + 1 + vit.num_registers for size in sizes)

    def step(self, micro_batches: Sequence[ViewBatch], update: int) -> tuple[StepResult, Values]:
        """Do update number `update` (from 1)."""
        values = values_at(self.config, update)
        frozen = update <= self.config.optimizer.last_layer_frozen_updates
        set_group_values(self.optimizer, values.learning_rate, values.weight_decay, last_layer_frozen=frozen)
        result = train_step(
            self.student,
            self.teacher,
            self.optimizer,
            micro_batches,
            self.settings,
            teacher_temperature=values.teacher_temperature,
            teacher_momentum=values.teacher_momentum,
        )
        return result, values

    def start_from(self, folder: Path) -> None:
        """Take backbone weights and preprocessing from `folder`. Raises ValueError where the shapes are other ones."""
        source = dinox_model.load(folder)
        if source.config != self.student.backbone.config:
            raise ValueError(
                f"{folder} holds {source.config}, and model.preset {self.config.model.preset} with "
                f"{self.config.data.depth} slices is {self.student.backbone.config}."
            )
        for network in (self.student, self.teacher):
            network.backbone.load_state_dict(source.state_dict())
        self._set_preprocess(source.preprocess)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds of this beside the teacher's backbone."""
        return {
            "student": self.student.state_dict(),
            "teacher_head": self.teacher.head.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.named),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Be what the checkpoint holds, bit for bit."""
        self.student.load_state_dict(checkpoint.tensors("student"))
        source = dinox_model.load(checkpoint.folder)
        self.teacher.backbone.load_state_dict(source.state_dict())
        self.teacher.head.load_state_dict(checkpoint.tensors("teacher_head"))
        restore_optimizer(self.optimizer, self.named, checkpoint.tensors("optimizer"))
        self._set_preprocess(source.preprocess)

    def _set_preprocess(self, preprocess: Preprocess) -> None:
        self.student.backbone.preprocess = self.teacher.backbone.preprocess = preprocess


def view_settings(config: Config) -> ViewSettings:
    """The `views` section in the form that dinox_train.views takes."""
    return ViewSettings(**config.views.model_dump())


def preprocess_of(config: Config, hu_histogram: np.ndarray) -> Preprocess:
    """How the network sees a whole slice: the middle of the views' HU windows, normalised by the set's own statistics.

    hu_histogram: int64 (4096,), bins of 16 HU from -32768, of the whole set. Raises ConfigError where nothing is to be
    seen through that window.
    """
    level, width = config.views.level_hu, config.views.width_hu
    try:
        return Preprocess.from_histogram(hu_histogram, (level[0] + level[1]) / 2, math.sqrt(width[0] * width[1]))
    except ValueError as error:
        raise ConfigError(f"views.level_hu, views.width_hu: {error}") from None


def _network(config: Config, preprocess: Preprocess) -> Network:
    objective = config.objective
    shape = replace(PRESETS[config.model.preset], in_channels=config.data.depth, layer_scale=config.model.layer_scale)
    return build_network(
        shape,
        preprocess,
        hidden=objective.head_hidden,
        bottleneck=objective.head_bottleneck,
        prototypes=objective.prototypes,
        seed=config.seed,
    )
