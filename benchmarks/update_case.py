"""What benchmarks/train_step.py measures: one update of DINOv3's objective, which its peer gets too.

    scratch/weights.npz   the backbone by transformers' names, heads as heads.NAME.…
            batch.npz     global_views, local_views, masks, indices, weights
    answers: the terms of two updates that follow each other

Invariant: both sides start from the same weights, see the same views and masks, and are compared before one of them is
timed; the second update's terms differ from the first's, so that optimizer and teacher are compared too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import parity
import torch
from torch import Tensor

import dinox_model
from dinox_model import Preprocess, ViTConfig
from dinox_model.convert.export import target_format, their_tensors
from dinox_model.flops import training_flops
from dinox_model.heads.prototype import PrototypeHeadConfig
from dinox_model.workload import Workload
from dinox_train.micro_batch import GlobalBatch, Recipe
from dinox_train.network import Network, Networks
from dinox_train.objectives.dinov3 import DINOv3, DINOv3Settings, GramSettings
from dinox_train.optimizer import make_optimizer, set_group_values
from dinox_train.step import StepResult, StepSettings, train_step
from dinox_train.view_batch import ViewBatch
from dinox_train.views import ViewSettings

TOLERANCE = 1e-3
"""Largest relative difference of a term, in fp32."""
SLICE = 512
"""Side of the slices that views are cut from, pixels."""
TERMS = ("dino", "ibot", "koleo")


class UpdateError(ValueError):
    """What is compared is not the same work."""


@dataclass(frozen=True)
class Hyperparameters:
    """What both sides train with: `make_optimizer`'s settings, and the update's values."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.04
    beta1: float = 0.9
    beta2: float = 0.999
    layer_decay: float = 1.0
    patch_embed_scale: float = 1.0
    clip_norm: float = 3.0
    teacher_momentum: float = 0.994


@dataclass(frozen=True, kw_only=True)
class UpdateCase:
    """An update: network, views, heads, batch."""

    preset: str
    batch: int
    precision: str
    device: torch.device
    threads: int
    prototypes: int
    global_size: int = 224
    local_size: int = 96
    num_local: int = 8
    hyperparameters: Hyperparameters = Hyperparameters()

    @property
    def config(self) -> ViTConfig:
        """Of the network."""
        return dinox_model.PRESETS[self.preset]

    @property
    def settings(self) -> DINOv3Settings:
        """The objective without Gram anchoring."""
        return DINOv3Settings(prototypes=self.prototypes)

    @property
    def head(self) -> PrototypeHeadConfig:
        """Of CLS, and another of the same shape for masked patches."""
        settings = self.settings
        return PrototypeHeadConfig(
            hidden=settings.head_hidden, bottleneck=settings.head_bottleneck, prototypes=settings.prototypes
        )

    @property
    def views(self) -> ViewSettings:
        """How they are cut."""
        return ViewSettings(num_local=self.num_local, global_size=self.global_size, local_size=self.local_size)

    def described(self) -> dict[str, Any]:
        """For the result's `data`."""
        return {
            "name": f"{self.preset}, 2 x {self.global_size} + {self.num_local} x {self.local_size}, {self.precision}",
            "batch": self.batch,
            "prototypes": self.prototypes,
        }

    def flops(self, masked_patches: int) -> int:
        """Of one update's networks."""
        workload = Workload(
            images=self.batch,
            global_size=self.global_size,
            num_local=self.num_local,
            local_size=self.local_size,
            masked_patches=masked_patches,
            dino_head=self.head,
            ibot_head=self.head,
        )
        return training_flops(self.config, workload).total


class OurUpdate:
    """Our update, ready to run again and again on the same views."""

    def __init__(self, case: UpdateCase, objective: DINOv3, *, gram: bool = False) -> None:
        self.case, self.objective = case, objective
        self.networks = make_networks(case, objective)
        if gram:
            self.networks.take_gram_teacher()
        hyperparameters = case.hyperparameters
        self.optimizer = make_optimizer(self.networks.student_weights.named, hyperparameters)
        set_group_values(self.optimizer, hyperparameters.learning_rate, hyperparameters.weight_decay)
        self.state = {name: value.to(case.device) for name, value in objective.first_state().items()}
        self.values = objective.values(1)
        self.windows = Windows(case, objective, gram=gram)
        self.batch: ViewBatch = self.windows.views()

    def run(self) -> StepResult:
        """One update, as dinox_train/step.py does it."""
        hyperparameters = self.case.hyperparameters
        settings = StepSettings(precision=self.case.precision, clip_norm=hyperparameters.clip_norm, clip_by_part=True)
        return train_step(
            self.networks,
            self.optimizer,
            self.objective,
            self.state,
            [self.batch],
            settings,
            values=self.values,
            teacher_momentum=hyperparameters.teacher_momentum,
        )

    @property
    def masked_patches(self) -> int:
        """Of the whole batch."""
        assert self.batch.masked is not None
        return len(self.batch.masked.indices)


class Windows:
    """int16 HU of made-up windows on the device, and the views cut from them; a phantom costs what a patient costs."""

    def __init__(self, case: UpdateCase, objective: DINOv3, *, gram: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch, case.config.in_channels, SLICE, SLICE)
        self.hu = torch.randint(-1000, 1000, shape, generator=generator, dtype=torch.int16).to(case.device)
        self.rows = np.arange(case.batch)
        self.sizes = np.full((case.batch, 2), SLICE)
        self.spacing_mm = np.tile([1.0, 0.7, 0.7], (case.batch, 1))
        self.gram = gram
        self.recipe = Recipe(
            seed=0,
            views=case.views,
            needs=objective.needs,
            vit=case.config,
            preprocess=Preprocess(),
            batch_size=case.batch,
        )

    def views(self) -> ViewBatch:
        """A whole batch: drawn, rendered, masked."""
        batch, _ = GlobalBatch(self.recipe, 0, gram=self.gram).micro_batch(
            self.hu, self.rows, self.sizes, self.spacing_mm
        )
        return batch


def with_gram(settings: DINOv3Settings, size: int) -> DINOv3Settings:
    """The objective with Gram anchoring from the first update on, its teacher looking at twice the side."""
    return replace(settings, gram=GramSettings(weight=2.0, size=2 * size))


def make_networks(case: UpdateCase, objective: DINOv3) -> Networks:
    """Student and teacher, equal, with weights at which every part of the backbone matters."""

    def network() -> Network:
        backbone = dinox_model.build(case.config)
        parity.perturb(backbone)
        return Network(backbone, objective.heads(case.config, 1)).to(case.device)

    return Networks(network(), network(), case.precision)


def write(case: UpdateCase, folder: Path, ours: OurUpdate) -> dict[str, Any]:
    """Write what the peer needs; returns the arguments of its module."""
    batch = ours.batch
    assert batch.masked is not None
    target = target_format(ours.networks.student.backbone, "hf_dinov3")
    with ours.networks.student_weights.in_network() as student:  # the fp32 ones
        assert isinstance(student, Network)
        weights = {f"backbone.{name}": tensor for name, tensor in their_tensors(student.backbone, target).items()}
        weights |= {name: tensor for name, tensor in student.state_dict().items() if name.startswith("heads.")}
    _save(folder / "weights.npz", weights)
    views = {"global_views": batch.global_views, "local_views": batch.local_views}
    _save(folder / "batch.npz", views | asdict(batch.masked))
    settings = case.settings
    numbers = {
        "student_temperature": settings.student_temperature,
        "teacher_temperature": settings.teacher_temperature,
        "iterations": settings.sinkhorn_iterations,
        "koleo_weight": settings.koleo.weight,
        **asdict(case.hyperparameters),
    }
    return {
        "folder": str(folder),
        "settings": target.settings_of(case.config),
        "numbers": numbers,
        "precision": case.precision,
        "device": str(case.device),
        "threads": case.threads,
    }


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def compare(case: UpdateCase, ours: OurUpdate, theirs: list[dict[str, float]]) -> float:
    """The largest relative difference of a term in two updates. Raises UpdateError where it is large.

    In bf16 the roundings of two programs differ, and so does what they compute: there the limit is 30 times as wide.
    """
    limit = TOLERANCE * (1 if case.precision == "fp32" else 30)
    furthest, seen = 0.0, []
    for number, their_terms in enumerate(theirs, 1):
        terms = {name: float(value) for name, value in ours.run().terms.items()}
        seen.append(terms)
        for name in TERMS:
            difference = abs(terms[name] / their_terms[name] - 1.0)
            if not difference <= limit:
                raise UpdateError(f"{name} of update {number} is {terms[name]:.6g} here, {their_terms[name]:.6g} there")
            furthest = max(furthest, difference)
    if seen[0] == seen[-1]:
        raise UpdateError("the updates change nothing: optimizer and teacher would not be compared")
    return furthest
