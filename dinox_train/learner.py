"""What learns: the networks, the objective and the optimizer of a run, their values at an update, and their way into a
checkpoint and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dinox_model
from dinox_model import PRESETS, Preprocess, ViTConfig, build
from dinox_model.execution import Execution
from dinox_model.linear import OFF, Routes
from dinox_model.weights import PREPROCESS, read_preprocess
from dinox_train import schedule
from dinox_train.checkpoint import Checkpoint, checkpoint_digest, optimizer_tensors, restore_optimizer
from dinox_train.config import Config, ConfigError
from dinox_train.kernel_choice import RunKernels
from dinox_train.micro_batch import Recipe
from dinox_train.network import Network, Networks
from dinox_train.objectives.classification import Classification, ClassificationSettings
from dinox_train.objectives.dinov3 import DINOv3, DINOv3Settings
from dinox_train.objectives.masked_autoencoder import MAESettings, MaskedAutoencoder
from dinox_train.objectives.objective import LOCAL_NORM, Objective
from dinox_train.optimizer import make_optimizer, set_group_values
from dinox_train.parallel import Parallel
from dinox_train.part import Held
from dinox_train.prototype_counts import with_prototypes
from dinox_train.ranks import ALONE, Ranks
from dinox_train.stage_timers import Timed, untimed
from dinox_train.stages import Stage, stage_of, stages_of
from dinox_train.step import StepResult, StepSettings, train_step
from dinox_train.view_batch import NUM_GLOBAL, ViewBatch
from dinox_train.view_statistics import statistics_under_policy
from dinox_train.views import ViewSettings
from dinox_train.warm_start import load_backbone
from dinox_train.working_weights import MasterWeights


@dataclass(frozen=True)
class Values:
    """What the schedules say for one update."""

    learning_rate: float
    weight_decay: float
    teacher_momentum: float
    backbone_scale: float
    """Of the backbone's learning rate: 0 while it is frozen."""
    objective: Mapping[str, float]
    """The objective's own: temperatures, weights of terms."""

    def line(self) -> dict[str, float]:
        """What the line of an update says of them."""
        return {
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "teacher_momentum": self.teacher_momentum,
            "backbone_scale": self.backbone_scale,
            **self.objective,
        }


def values_at(config: Config, objective: Objective, update: int) -> Values:
    """The scheduled values of update `update` (from 1) under the configuration of its stage: a pure function."""
    optimizer, teacher, lengths = config.optimizer, config.teacher, config.schedule
    total, index = lengths.updates or config.train.updates, update - 1
    peak = optimizer.peak_learning_rate(config.train.batch_size)
    return Values(
        learning_rate=schedule.learning_rate(
            index,
            total,
            peak=peak,
            final=optimizer.last_learning_rate,
            warmup=lengths.warmup_updates,
            shape=lengths.shape,
        ),
        weight_decay=schedule.cosine(index, total, start=optimizer.weight_decay, final=optimizer.final_weight_decay),
        teacher_momentum=schedule.cosine(index, total, start=teacher.momentum, final=teacher.final_momentum),
        backbone_scale=schedule.frozen_then_ramp(
            index, frozen=optimizer.backbone_frozen_updates, ramp=optimizer.backbone_ramp_updates
        ),
        objective=objective.values(update),
    )


class Learner:
    """Networks, objective and optimizer on a device. Student and teacher start equal, as a function of the seed alone.

    `enter` says which update comes next: `config`, `views`, `objective` and `settings` are those of its stage.
    """

    def __init__(
        self,
        config: Config,
        preprocess: Preprocess,
        device: torch.device,
        kernels: RunKernels | None = None,
        routes: Routes = OFF,
        parallel: Parallel | None = None,
    ) -> None:
        """kernels, routes: what was chosen for the device; None: torch's operators. parallel: the processes that train
        together; None: this one does alone."""
        self.kernels = kernels or RunKernels()
        self.parallel = parallel or Parallel(device)
        self.run_config = with_prototypes(config)
        self.stages = stages_of(self.run_config)
        self._objectives = [make_objective(stage.config, self.kernels, self.parallel.ranks) for stage in self.stages]
        self._alone = [make_objective(stage.config, self.kernels) for stage in self.stages]
        self.vit = vit_config(config)
        whole = make_objective(self.run_config)
        shards = self.parallel.shards
        student, teacher = (build_network(self.vit, preprocess, whole, config.seed) for _ in range(2))
        if shards is None:  # else each block goes there by itself: the whole need not fit
            student, teacher = student.to(device), teacher.to(device)
        self.networks = Networks(student, teacher, config.precision, shards)
        self.networks.run_with(self.kernels.network, routes)
        self.named = self.networks.student_weights.named
        self.optimizer = self._make_optimizer()
        self.state = {name: value.to(device) for name, value in whole.first_state().items()}
        self.began_with: dict[str, str | None] | None = None
        """The digest of the checkpoint of `run.init_from`, None for weights without one; None where it began afresh."""
        self.parallel.prepare(self.networks, self.unread)
        self.enter(1)

    def _make_optimizer(self) -> torch.optim.AdamW:
        student, teacher = self.networks.student_weights, self.networks.teacher_weights
        # Its one pass goes over buffers, which weights that are shared out do not lie in.
        if self.kernels.fused_optimizer and isinstance(student, MasterWeights) and isinstance(teacher, MasterWeights):
            from dinox_train.kernels.adamw_average import OnePassAdamW

            return OnePassAdamW(student, teacher, self.run_config.optimizer)
        return make_optimizer(self.named, self.run_config.optimizer)

    def enter(self, update: int) -> None:
        """Update number `update` (from 1) is next."""
        self.stage: Stage = stage_of(self.stages, update)
        self.config = self.stage.config
        self.objective: Objective = self._objectives[self.stage.number - 1]
        """Of all ranks together."""
        self.objective_alone: Objective = self._alone[self.stage.number - 1]
        """Of a batch that a process has as a whole: validation's, which each rank computes for itself."""
        self.views = view_settings(self.config)
        optimizer = self.config.optimizer
        self.settings = StepSettings(
            precision=self.config.precision, clip_norm=optimizer.clip_norm, clip_by_part=optimizer.clip == "parts"
        )
        # Also where it stays the same: graphs of another stage's views are forgotten.
        self.networks.run_as(execution_of(self.config))

    @property
    def student(self) -> Network:
        return self.networks.student

    @property
    def teacher(self) -> Network:
        return self.networks.teacher

    @property
    def preprocess(self) -> Preprocess:
        return self.teacher.backbone.preprocess

    @property
    def unread(self) -> tuple[str, ...]:
        """The beginnings of the names of parameters that get no gradient in some stage."""
        local = all(stage.config.views.num_local for stage in self.stages)
        parts = [objective.unread for objective in self._objectives]
        return tuple(dict.fromkeys((*(() if local else (LOCAL_NORM,)), *(name for part in parts for name in part))))

    def recipe(self, batch_size: int) -> Recipe:
        """How a global batch of so many windows is made at this stage."""
        return Recipe(
            seed=self.config.seed,
            views=self.views,
            needs=self.objective.needs,
            vit=self.vit,
            preprocess=self.preprocess,
            batch_size=batch_size,
            unknown_scale=self.config.model.unknown_scale,
            crop=self.kernels.crop,
        )

    def counted(self, update: int) -> dict[str, int]:
        """`images`, `views` and `tokens` (patches, CLS and registers of the student's views) of the first updates."""
        counts = {"images": 0, "views": 0, "tokens": 0}
        for stage in self.stages:
            images = stage.updates_until(update) * stage.config.train.batch_size
            views = view_settings(stage.config)
            sides = (views.global_size,) * NUM_GLOBAL + (views.local_size,) * views.num_local
            tokens = sum((side // self.vit.patch_size) ** 2 + self.vit.num_prefix_tokens for side in sides)
            for name, each in (("images", 1), ("views", len(sides)), ("tokens", tokens)):
                counts[name] += images * each
        return counts

    def wants_gram_views(self, update: int) -> bool:
        """Whether Gram anchoring is on in update `update`."""
        return self.objective.values(update).get("weight_gram", 0.0) > 0

    def step(
        self, micro_batches: Sequence[ViewBatch], update: int, timed: Timed = untimed
    ) -> tuple[StepResult, Values]:
        """Do update number `update` (from 1). timed: told of each stage."""
        values = values_at(self.config, self.objective, update)
        frozen = update <= self.config.optimizer.last_layer_frozen_updates
        set_group_values(
            self.optimizer,
            values.learning_rate,
            values.weight_decay,
            last_layer_frozen=frozen,
            backbone_scale=values.backbone_scale,
        )
        self._take_gram_teacher(update)
        result = train_step(
            self.networks,
            self.optimizer,
            self.objective,
            self.state,
            micro_batches,
            self.settings,
            values=values.objective,
            teacher_momentum=values.teacher_momentum,
            ranks=self.parallel.ranks,
            timed=timed,
        )
        self.parallel.check_gradients(self.named, self.unread)
        return result, values

    def _take_gram_teacher(self, update: int) -> None:
        """Between updates, from a teacher that is finite whatever the update before was."""
        if not isinstance(self.objective, DINOv3):
            return
        missing = self.networks.gram is None and self.wants_gram_views(update)
        if missing or self.objective.settings.gram.taken_before(update):
            self.networks.take_gram_teacher()

    def start_from(self, folder: Path) -> list[str]:
        """Take backbone weights and preprocessing from `folder`; sentences that say what became of them.

        Raises ValueError where they are not there, or of another shape.
        """
        self.began_with = {"digest": checkpoint_digest(folder)}
        source, said = load_backbone(folder, self.vit, self.preprocess, seed=self.config.seed)
        for weights in (self.networks.student_weights, self.networks.teacher_weights):
            weights.load_part({f"backbone.{name}": value for name, value in source.state_dict().items()})
        self._set_preprocess(source.preprocess)
        return said

    def tensors(self) -> dict[str, dict[str, Held]]:
        """What a checkpoint holds of this beside the teacher's backbone; under fsdp, this rank's part of it."""
        student, teacher = self.networks.student_weights, self.networks.teacher_weights.state_dict()
        named: dict[str, dict[str, Held]] = {
            "student": {**student.state_dict()},
            "teacher_heads": {name: value for name, value in teacher.items() if name.startswith("heads.")},
            "optimizer": {**student.moments(optimizer_tensors(self.optimizer, self.named))},
        }
        if self.state:
            named["objective"] = {**self.state}
        if self.networks.gram is not None:
            named["gram_teacher"] = {**self.networks.gram_weights.state_dict()}
        return named

    def restore(self, checkpoint: Checkpoint) -> None:
        """Be what the checkpoint holds, bit for bit, whatever this was before."""
        self.began_with = checkpoint.state.get("began_with")
        # What a run that goes back had meanwhile, and the checkpoint has not: moments, a Gram teacher.
        del self.optimizer
        self.optimizer = self._make_optimizer()
        self.networks.forget_gram_teacher()
        for name, value in checkpoint.tensors("objective").items() if self.state else ():
            self.state[name].copy_(value)
        if self.networks.shards is None:
            self._restore_whole(checkpoint)
        else:
            from dinox_train.sharded_restore import restore_shards

            restore_shards(self.networks, self.optimizer, checkpoint)
        self._set_preprocess(read_preprocess(checkpoint.folder / PREPROCESS, self.vit.in_channels))

    def _restore_whole(self, checkpoint: Checkpoint) -> None:
        networks = self.networks
        backbone = {
            f"backbone.{name}": value for name, value in dinox_model.load(checkpoint.folder).state_dict().items()
        }
        networks.student_weights.load_state_dict(checkpoint.tensors("student"))
        networks.teacher_weights.load_state_dict(backbone | checkpoint.tensors("teacher_heads"))
        restore_optimizer(self.optimizer, self.named, checkpoint.tensors("optimizer"))
        if checkpoint.has("gram_teacher"):
            networks.gram_weights.load_state_dict(checkpoint.tensors("gram_teacher"))

    def _set_preprocess(self, preprocess: Preprocess) -> None:
        self.student.backbone.preprocess = self.teacher.backbone.preprocess = preprocess


def make_objective(config: Config, kernels: RunKernels | None = None, ranks: Ranks = ALONE) -> Objective:
    """The objective that the configuration names, over a batch that is spread over `ranks`. `objective.prototypes` must
    be a number by now."""
    section = config.objective
    if section.name == "mae":
        return MaskedAutoencoder(MAESettings(**section.mae.model_dump()))
    if section.name == "classification":
        return Classification(ClassificationSettings(**section.classification.model_dump()))
    fused = kernels is not None and kernels.fused_losses
    return DINOv3(_settings(DINOv3Settings, section.model_dump()), fused=fused, ranks=ranks)


def _settings(kind: type, values: Mapping[str, Any]) -> Any:
    """A settings dataclass of the values that it has a field for, with those within it."""
    default = kind()
    given = {}
    for field in fields(kind):
        inner = getattr(default, field.name)
        value = values[field.name]
        given[field.name] = _settings(type(inner), value) if is_dataclass(inner) else value
    return kind(**given)


def build_network(vit: ViTConfig, preprocess: Preprocess, objective: Objective, seed: int) -> Network:
    """A network whose weights are a function of its shape and `seed`; student and teacher of one seed are equal."""
    backbone = build(vit, seed=seed)
    backbone.preprocess = preprocess
    return Network(backbone, objective.heads(vit, seed + 1))


def vit_config(config: Config) -> ViTConfig:
    """The network's shape: the preset's, with what the `model` section says. Raises ConfigError where it is none."""
    given = config.model.model_dump(exclude={"preset", "layer_scale", "unknown_scale"}, exclude_none=True)
    if given.get("positions") == "learned":
        side = config.views.global_size // given.get("patch_size", PRESETS[config.model.preset].patch_size)
        given.setdefault("learned_grid", (side, side))
    try:
        return replace(
            PRESETS[config.model.preset], in_channels=config.data.depth, layer_scale=config.model.layer_scale, **given
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def execution_of(config: Config) -> Execution:
    """The `execution` section in the form that dinox_model.execution takes."""
    section = config.execution
    return Execution(compile=section.compile, checkpointing=section.activation_checkpointing)


def view_settings(config: Config) -> ViewSettings:
    """The `views` section in the form that dinox_train.views takes."""
    return ViewSettings(**config.views.model_dump())


def preprocess_of(config: Config, hu_histogram: np.ndarray) -> Preprocess:
    """How the network sees a whole slice: the middle of the views' windows, and the statistics of what views show; with
    what the windows of slices were.

    hu_histogram: int64 (4096,), bins of 16 HU from -32768, of the whole set. Raises ConfigError where nothing is to be
    seen through those windows.
    """
    views = view_settings(config)
    level_hu, width_hu = views.hu_policy.mean_window()
    try:
        mean, std = statistics_under_policy(hu_histogram, views)
    except ValueError as error:
        raise ConfigError(f"views: {error}") from None
    data = config.data
    return Preprocess(
        level_hu=level_hu,
        width_hu=width_hu,
        mean=mean,
        std=std,
        depth=data.depth,
        step=data.step if data.step_mm is None else None,
        step_mm=data.step_mm,
        edge=None if data.edge == "error" else data.edge,
    )
