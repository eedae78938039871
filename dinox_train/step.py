"""One optimizer update, top to bottom: teachers, targets, student, backward, clip, optimizer, teacher's average.

Exact under accumulation: the teachers see every micro-batch first, the targets are those of the whole batch (one
Sinkhorn), then the student's micro-batches are streamed. The accumulated gradient is the big batch's, to fp32 rounding.
Exact over ranks likewise: each has some of the rows, and losses and gradients are summed over them, never averaged.
Nothing here waits for the device: whether an update is finite is a tensor on the device that masks it as a whole.
What is learnt is the objective's (dinox_train/objectives/objective.py says what that is).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dinox_train import health
from dinox_train.network import Networks
from dinox_train.objectives.objective import Objective, Values
from dinox_train.optimizer import UpdatesInOnePass, clip_gradients
from dinox_train.platform import autocast
from dinox_train.ranks import ALONE, Ranks
from dinox_train.stage_timers import Timed, untimed
from dinox_train.view_batch import ViewBatch


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What stays the same from update to update."""

    precision: str
    clip_norm: float
    clip_by_part: bool
    """The backbone and each head for itself, or all of the gradient together."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """0-dim tensors on the device; reading one on the host is what waits for it."""

    loss: Tensor
    terms: Mapping[str, Tensor]
    """Each term of the objective that is on, not weighted."""
    grad_norm: Tensor
    clipped: Tensor
    """1.0 where the gradient, or a part of it, was longer than allowed, and scaled down."""
    applied: Tensor
    """1.0 where the update was applied, 0.0 where it was masked."""
    figures: Mapping[str, Tensor]
    feature_gram: Tensor | None
    """Of the teacher's CLS features; the effective rank is made of it on the host, since eigenvalues wait for it."""

    def to_host(self) -> dict[str, float]:
        """All figures as numbers, `loss_TERM` and `effective_rank` among them. Waits for the device, once or twice."""
        named = {"loss": self.loss, "grad_norm": self.grad_norm, "clipped": self.clipped, "applied": self.applied}
        named |= {f"loss_{name}": value for name, value in self.terms.items()} | dict(self.figures)
        numbers = torch.stack([value.detach().double() for value in named.values()]).tolist()
        figures = dict(zip(named, numbers, strict=True))
        if self.feature_gram is not None:
            figures["effective_rank"] = float(health.effective_rank_of_gram(self.feature_gram.cpu()))
        return figures


def train_step(
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    state: Mapping[str, Tensor],
    micro_batches: Sequence[ViewBatch],
    settings: StepSettings,
    *,
    values: Values,
    teacher_momentum: float,
    ranks: Ranks = ALONE,
    timed: Timed = untimed,
) -> StepResult:
    """Do one update over `micro_batches`, together one global batch, or this rank's equal part of it.

    state: the objective's, changed in place. Learning rates stand in the optimizer's groups; values: the objective's
    numbers of this update. timed: told of each stage. The result is the same on all ranks.
    """
    student, teacher = networks.student_weights, networks.teacher_weights
    device = micro_batches[0].global_views.device
    total_images = ranks.count * sum(batch.num_images for batch in micro_batches)

    # --- teachers: every micro-batch, then the whole batch's targets at once; what ties images together
    with torch.no_grad(), autocast(device, settings.precision), timed("teacher"):
        observed = [objective.observe(networks, batch, values) for batch in micro_batches]
        aim = objective.aim(observed, values, state)
        del observed  # logits that only the targets are made of
        targets = objective.couple(networks, micro_batches, aim.targets, values)

    # --- student: one micro-batch after the other, gradients add up
    student.zero_gradients()
    terms: dict[str, Tensor] = {}
    for number, (batch, batch_targets) in enumerate(zip(micro_batches, targets, strict=True), 1):
        share = partial(objective.losses, networks, batch, batch_targets, values, total_images=total_images)
        with autocast(device, settings.precision), timed("student"):
            losses = networks.student_pass(share, last=number == len(micro_batches))
        with timed("backward"):
            weighted_sum(losses, values).backward()
            student.gather_gradients()
        terms = {name: terms.get(name, 0.0) + part.detach() for name, part in losses.items()}
    terms = dict(zip(terms, ranks.sum(torch.stack(list(terms.values()))).unbind(), strict=True))
    loss = weighted_sum(terms, values)

    # --- update, masked as a whole where loss or gradient is not finite
    one_pass = optimizer if isinstance(optimizer, UpdatesInOnePass) else None
    with timed("optimizer"):
        if one_pass is not None:
            gradient = one_pass.clip(settings.clip_norm, by_part=settings.clip_by_part)
        else:
            sums = None if networks.shards is None else ranks.all_reduce
            gradient = clip_gradients(student.named, settings.clip_norm, by_part=settings.clip_by_part, all_reduce=sums)
        applied = (torch.isfinite(loss) & torch.isfinite(gradient.norm)).float()
        if one_pass is not None:
            one_pass.update(teacher_momentum, applied)
        else:
            optimizer.found_inf = 1.0 - applied  # type: ignore[attr-defined] # the fused optimizer's own mask
            optimizer.step()
            teacher.follow(student, teacher_momentum, applied)  # type: ignore[arg-type] # both are of one kind
            for weights in (student, teacher):
                weights.refresh()
        for name, kept in state.items():
            kept.copy_(torch.where(applied > 0, aim.state[name], kept))

    figures, features = dict(aim.figures), None
    if aim.features is not None:
        features = ranks.rows(aim.features)
        figures["feature_std"] = health.feature_std(features)
    return StepResult(
        loss=loss,
        terms=terms,
        grad_norm=gradient.norm,
        clipped=gradient.clipped,
        applied=applied,
        figures=figures,
        feature_gram=None if features is None else health.feature_gram(features),
    )


@torch.no_grad()
def batch_loss(
    networks: Networks,
    objective: Objective,
    state: Mapping[str, Tensor],
    micro_batches: Sequence[ViewBatch],
    settings: StepSettings,
    *,
    values: Values,
) -> Tensor:
    """The loss of a global batch as `train_step` would find it, 0-dim; nothing is changed."""
    total_images = sum(batch.num_images for batch in micro_batches)
    with autocast(micro_batches[0].global_views.device, settings.precision):
        observed = [objective.observe(networks, batch, values) for batch in micro_batches]
        targets = objective.couple(networks, micro_batches, objective.aim(observed, values, state).targets, values)
        shares = [
            weighted_sum(objective.losses(networks, batch, batch_targets, values, total_images=total_images), values)
            for batch, batch_targets in zip(micro_batches, targets, strict=True)
        ]
    return torch.stack(shares).sum()


def weighted_sum(losses: Mapping[str, Tensor], values: Values) -> Tensor:
    """The loss: each term times its `weight_TERM`."""
    return torch.stack([values[f"weight_{name}"] * loss for name, loss in losses.items()]).sum()
