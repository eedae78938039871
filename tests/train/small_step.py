"""A step small enough to be checked in full: tiny networks, made-up views, and what one micro-batch of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dinox_model import Preprocess, ViTConfig, build
from dinox_train.masking import draw_masks
from dinox_train.network import Network, Networks
from dinox_train.network_draws import draw_pass
from dinox_train.objectives.objective import Objective
from dinox_train.optimizer import make_optimizer, set_group_values
from dinox_train.step import StepResult, StepSettings, train_step
from dinox_train.view_batch import NUM_GLOBAL, Masked, ViewBatch

TINY = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64, layer_scale=0.5)
SETTINGS = StepSettings(precision="fp32", clip_norm=3.0, clip_by_part=False)
SIDE, LOCAL_SIDE = 64, 32


class AdamW:
    """Of the configuration's optimizer section, what `make_optimizer` reads."""

    beta1, beta2, layer_decay, patch_embed_scale = 0.9, 0.999, 1.0, 1.0


def network(objective: Objective, seed: int, vit: ViTConfig = TINY) -> Network:
    backbone = build(vit, seed=seed)
    backbone.preprocess = Preprocess()
    return Network(backbone, objective.heads(vit, seed + 100))


def networks(
    objective: Objective, student: int = 1, teacher: int = 1, vit: ViTConfig = TINY, precision: str = "fp32"
) -> Networks:
    """Student and teacher of these seeds."""
    return Networks(network(objective, student, vit), network(objective, teacher, vit), precision)


def optimizer_of(of: Networks, lr: float = 1e-3) -> torch.optim.AdamW:
    optimizer = make_optimizer(of.student_weights.named, AdamW())
    set_group_values(optimizer, lr, 0.0)
    return optimizer


def windows(num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Global views (2, B, 3, y, x) and local ones (2, B, 3, y, x) that share what their image is, and differ."""
    random = torch.Generator().manual_seed(seed)
    # Smooth, so that what a patch shows can be told from the patches beside it.
    coarse = torch.randn(num_images, 3, 3, 3, generator=random)
    images = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")
    noise = 0.1 * torch.randn(4, num_images, 3, SIDE, SIDE, generator=random)
    return images + noise[:2], (images + noise[2:])[..., 16:48, 16:48].contiguous()


def batch_of(
    objective: Objective,
    num_images: int,
    pieces: int = 1,
    *,
    vit: ViTConfig = TINY,
    seed: int = 0,
    position: int = 0,
) -> list[ViewBatch]:
    """One global batch in `pieces`, with the masks and draws that the objective and the network want."""
    global_views, local_views = windows(num_images, seed)
    passes = [
        draw_pass(vit, name, seed=seed, position=position, batch_size=num_images, num_views=len(views))
        for name, views in (("global", global_views), ("local", local_views))
    ]
    labels = (global_views[0, :, 0, 0, 0] > 0).float()
    found = []
    for rows in np.split(np.arange(num_images), pieces):
        needs = objective.needs
        global_draws, local_draws = (one and one.of_rows(rows) for one in passes)
        masked = None
        if needs.masks:
            grid = (SIDE // vit.patch_size,) * 2
            plan = draw_masks(
                needs.masks,
                seed=seed,
                position=position,
                rows=rows,
                batch_size=num_images,
                num_views=NUM_GLOBAL,
                grid=grid,
            )
            masked = Masked(*(torch.from_numpy(part) for part in (plan.masks, plan.indices, plan.weights)))
        theirs = global_views[:, rows].flatten(0, 1)
        found.append(
            ViewBatch(
                theirs,
                local_views[:, rows].flatten(0, 1),
                masked=masked,
                global_draws=global_draws,
                local_draws=local_draws,
                gram_views=theirs.repeat_interleave(2, 2).repeat_interleave(2, 3) if needs.gram else None,
                labels=labels[rows],
            )
        )
    return found


def step(
    of: Networks,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batches: Sequence[ViewBatch],
    *,
    state: dict[str, Tensor] | None = None,
    momentum: float = 0.9,
    update: int = 1,
    settings: StepSettings = SETTINGS,
) -> StepResult:
    return train_step(
        of,
        optimizer,
        objective,
        objective.first_state() if state is None else state,
        batches,
        settings,
        values=objective.values(update),
        teacher_momentum=momentum,
    )


def gradient(of: Networks) -> Tensor:
    """All gradients of the student in one vector; parameters without one count with zeros."""
    return torch.cat(
        [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
            for _, parameter in of.student_weights.named
        ]
    )


def without(settings: object, term: str) -> object:
    """DINOv3Settings with one term off."""
    return replace(settings, **{term: replace(getattr(settings, term), weight=0.0)})  # type: ignore[type-var]
