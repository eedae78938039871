"""The kernels of a run: what the configuration asks for, tried on the run's device, chosen once, and said.

Where each takes part: `network` is put on networks (`Networks.run_with`), the others are handed to the objective, the
optimizer, the views and the feed when these are made. Invariant: a choice changes no mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinox_model import ViTConfig
from dinox_model.kernels.choice import AUTO, AttentionShape, Choice, FusedTrial, choose_fused, choose_network_kernels
from dinox_model.kernels.dispatch import REFERENCE, REFERENCE_BACKEND, Kernels
from dinox_model.kernels.probe import Timer
from dinox_model.positions import rotations
from dinox_model.workload import grid_of, num_tokens
from dinox_train.config import Config
from dinox_train.feed import Unfilter
from dinox_train.platform import product_dtype
from dinox_train.stages import Stage
from dinox_train.view_batch import NUM_GLOBAL
from dinox_train.view_plan import ViewSettings, draw_views
from dinox_train.views import Crop, render_views

HOST = "host"
_CROP_TOLERANCE = 1e-3
"""Of normalised pixels, which are of the order of 1: float32, summed in another order."""
_SMALL_ROWS, _SMALL_PROTOTYPES, _SMALL_SIDE = 32, 512, 96


@dataclass(frozen=True, kw_only=True)
class RunKernels:
    """What was chosen for a run."""

    network: Kernels = REFERENCE
    fused_losses: bool = False
    """Sinkhorn and the cross-entropies by kernels."""
    fused_optimizer: bool = False
    """AdamW and the teacher's average in one pass."""
    crop: Crop | None = None
    """What renders views; None: torch's operators."""
    unfilter: Unfilter | None = None
    """What undoes the shards' filter on the device; None: the loader's threads."""
    choices: tuple[Choice, ...] = ()

    def record(self) -> list[dict[str, Any]]:
        """For env.json."""
        return [
            {"kernel": one.kernel, "about": one.about, "backend": one.backend, "reason": one.reason}
            for one in self.choices
        ]


def choose_run_kernels(
    config: Config, vit: ViTConfig, stages: tuple[Stage, ...], device: torch.device, *, timer: Timer | None = None
) -> RunKernels:
    """The kernels of a run of these stages on `device`. timer: for tests.

    Raises ValueError where a form that was asked for by name cannot run here, or is wrong.
    """
    wanted = config.kernels.model_dump()
    dtype = product_dtype(config.precision)
    compiled = any(stage.config.execution.compile != "off" for stage in stages)
    simple = partial(choose_fused, device=device, timer=timer)
    network, choices = choose_network_kernels(
        wanted,
        attention_shapes(vit, stages, dtype),
        device,
        fused={
            "rotate": _rotate_trial(vit, stages, dtype, device, compiled),
            "residual_norm": _residual_norm_trial(vit, stages, dtype, device, compiled),
        }
        if _is_tried(wanted, ("rotate", "residual_norm"), device)
        else None,
        timer=timer,
    )
    losses = simple(
        "cross_entropy",
        wanted["cross_entropy"],
        trial=_cross_entropy_trial(config, dtype, device) if _is_tried(wanted, ("cross_entropy",), device) else None,
    )
    cropped = simple(
        "crop",
        wanted["crop"],
        trial=_crop_trial(config, device) if _is_tried(wanted, ("crop",), device) else None,
    )
    optimized = simple(
        "optimizer",
        wanted["optimizer"],
        trial=_optimizer_trial(config, device) if _is_tried(wanted, ("optimizer",), device) else None,
    )
    unfiltered, unfilter = _unfilter(wanted["unfilter"], device)
    return RunKernels(
        network=network,
        fused_losses=losses.backend != REFERENCE_BACKEND,
        fused_optimizer=optimized.backend != REFERENCE_BACKEND,
        crop=_crop() if cropped.backend != REFERENCE_BACKEND else None,
        unfilter=unfilter,
        choices=(*choices, losses, optimized, cropped, unfiltered),
    )


def product_rows(vit: ViTConfig, stages: tuple[Stage, ...], dtype: torch.dtype) -> int:
    """Rows (tokens of a micro-batch) that the networks' matrix products have in the first stage."""
    return sum(shape.images * shape.tokens for shape in attention_shapes(vit, stages[:1], dtype))


def attention_shapes(vit: ViTConfig, stages: tuple[Stage, ...], dtype: torch.dtype) -> tuple[AttentionShape, ...]:
    """The kinds of sequences that the networks of a run see, each once, with the images of a micro-batch."""
    found: dict[int, AttentionShape] = {}
    for stage in stages:
        config, views = stage.config, stage.config.views
        images = config.train.batch_size // config.train.accumulation
        sides = {views.global_size: NUM_GLOBAL, views.local_size: views.num_local}
        if config.objective.gram.weight:
            sides.setdefault(config.objective.gram.size or views.global_size, config.objective.gram.views)
        for side, count in sides.items():
            if count:
                tokens = num_tokens(vit, side)
                found[tokens] = AttentionShape(
                    images=images * count, tokens=tokens, heads=vit.num_heads, head_dim=vit.head_width, dtype=dtype
                )
    return tuple(found.values())


def _is_tried(wanted: Mapping[str, str], names: tuple[str, ...], device: torch.device) -> bool:
    """Whether a trial of one of them is needed: asked for by name, or to be found out on a GPU."""
    return any(
        wanted[name] not in (AUTO, REFERENCE_BACKEND) or (wanted[name] == AUTO and device.type != "cpu")
        for name in names
    )


def _numbers(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def _rotate_trial(
    vit: ViTConfig, stages: tuple[Stage, ...], dtype: torch.dtype, device: torch.device, compiled: bool
) -> FusedTrial | None:
    if not vit.is_rotary:
        return None
    from dinox_model.kernels.rotate import rotate_packed, rotate_packed_reference

    side = stages[0].config.views.global_size
    by = rotations(grid_of(vit, side), vit.head_width, vit.num_prefix_tokens, device)
    shape = (num_tokens(vit, side), 3, vit.num_heads, vit.head_width)
    return FusedTrial(
        forms={
            REFERENCE_BACKEND: lambda qkv: rotate_packed_reference(qkv, by),
            "triton": lambda qkv: rotate_packed(qkv, by),
        },
        small=[_numbers(device, dtype, 1, *shape)],
        full=[_numbers(device, dtype, 32, *shape)] if device.type == "cuda" else (),
        compiled=compiled,
    )


def _residual_norm_trial(
    vit: ViTConfig, stages: tuple[Stage, ...], dtype: torch.dtype, device: torch.device, compiled: bool
) -> FusedTrial:
    from dinox_model.kernels.residual_norm import residual_norm, residual_norm_reference

    tokens = num_tokens(vit, stages[0].config.views.global_size)
    wide = torch.float32

    def inputs(images: int) -> list[Tensor]:
        rows = (images, tokens if device.type == "cuda" else 16, vit.width)
        vectors = [_numbers(device, wide, vit.width) for _ in range(3)]
        return [_numbers(device, wide, *rows), _numbers(device, dtype, *rows), *vectors]

    kind = "rms" if vit.norm == "rms" else "layer"

    def form(run: Any) -> Any:
        def called(x: Tensor, residual: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            exact = x.dtype == torch.float64
            given = bias if kind == "layer" else None
            return run(
                x, residual, gamma, weight, given, eps=vit.norm_eps, kind=kind, normed_dtype=None if exact else dtype
            )

        return called

    return FusedTrial(
        forms={REFERENCE_BACKEND: form(residual_norm_reference), "triton": form(residual_norm)},
        small=inputs(1),
        full=inputs(32) if device.type == "cuda" else (),
        compiled=compiled,
    )


def _cross_entropy_trial(config: Config, dtype: torch.dtype, device: torch.device) -> FusedTrial | None:
    """Sinkhorn, then the iBOT loss, the larger of the two: forms of the two logits."""
    if config.objective.name != "dinov3":
        return None
    from dinox_train.kernels.fused_losses import fused_ibot_loss
    from dinox_train.kernels.prototype_potential import prototype_potential
    from dinox_train.objectives import sinkhorn
    from dinox_train.objectives.ibot import ibot_loss

    own = config.objective
    ours, theirs = own.student_temperature, own.teacher_temperature

    def reference(student: Tensor, teacher: Tensor) -> Tensor:
        teacher = teacher.detach()
        potential = sinkhorn.prototype_potential(teacher, theirs, own.sinkhorn_iterations)
        targets = sinkhorn.balanced_targets(teacher, potential, theirs)
        weights = torch.ones(len(student), device=device, dtype=torch.float32)
        return ibot_loss(student, targets, weights, student_temperature=ours, total_crops=len(student))

    def fused(student: Tensor, teacher: Tensor) -> Tensor:
        potential = prototype_potential(teacher.detach(), theirs, own.sinkhorn_iterations)
        weights = torch.ones(len(student), device=device, dtype=torch.float32)
        return fused_ibot_loss(
            student,
            teacher.detach(),
            potential,
            weights,
            student_temperature=ours,
            teacher_temperature=theirs,
            total_crops=len(student),
        )

    def inputs(rows: int, prototypes: int) -> list[Tensor]:
        student, teacher = _numbers(device, dtype, rows, prototypes), _numbers(device, dtype, rows + 1, prototypes)
        return [student, teacher[:rows]]

    on_gpu, prototypes = device.type == "cuda", own.prototypes or 2**14
    return FusedTrial(
        forms={REFERENCE_BACKEND: reference, "triton": fused},
        small=inputs(_SMALL_ROWS, min(prototypes, _SMALL_PROTOTYPES)),
        full=inputs(2048, prototypes) if on_gpu else (),
    )


def _optimizer_trial(config: Config, device: torch.device) -> FusedTrial:
    from dinox_train.optimizer_trial import FULL_WIDTH, SMALL_WIDTH, TOLERANCE, UpdateTrial

    trial = UpdateTrial(config.optimizer, config.precision, device)
    return FusedTrial(
        forms={REFERENCE_BACKEND: trial.form("reference"), "triton": trial.form("triton")},
        small=[torch.tensor(SMALL_WIDTH)],
        full=[torch.tensor(FULL_WIDTH)] if device.type == "cuda" else (),
        tolerance=TOLERANCE,
    )


def _crop_trial(config: Config, device: torch.device) -> FusedTrial:
    views = ViewSettings(**config.views.model_dump())

    def form(rendered_by: Crop | None) -> Any:
        def called(images: Tensor) -> tuple[Tensor, ...]:
            count, _, height, width = images.shape
            plan = draw_views(
                views,
                seed=0,
                position=0,
                rows=np.arange(count),
                sizes=np.full((count, 2), (height, width)),
                spacing_mm=np.ones((count, 3)),
            )
            rendered = render_views(images, plan, views, 0.5, 0.25, crop=rendered_by)
            return rendered if views.num_local else rendered[:1]

        return called

    def images(count: int, side: int) -> Tensor:
        return (_numbers(device, torch.float32, count, config.data.depth, side, side) * 500).to(torch.int16)

    return FusedTrial(
        forms={REFERENCE_BACKEND: form(None), "triton": form(_crop())},
        small=[images(1, _SMALL_SIDE)],
        full=[images(8, 512)] if device.type == "cuda" else (),
        tolerance=_CROP_TOLERANCE,
    )


def _crop() -> Crop:
    from dinox_train.kernels.crop import crop

    return crop


def _unfilter(wanted: str, device: torch.device) -> tuple[Choice, Unfilter | None]:
    if wanted in (AUTO, HOST):
        why = "as asked" if wanted == HOST else "auto: the loader's threads; on a GPU, triton frees them of it"
        return Choice(kernel="unfilter", backend=HOST, reason=why), None
    from dinox_model.kernels.language import can_run_on
    from dinox_model.kernels.unfilter import unfilter, unfilter_reference

    if wanted == "triton" and not can_run_on(device):
        raise ValueError(
            f"kernels.unfilter=triton: no Triton kernel runs on {device}. Set kernels.unfilter=host or =reference."
        )
    return Choice(kernel="unfilter", backend=wanted, reason="as asked; the windows are the same bits"), (
        unfilter if wanted == "triton" else unfilter_reference
    )
