"""One optimizer update, top to bottom: teacher, targets, student, backward, clip, optimizer, teacher's average.

Exact under accumulation: the teacher sees every micro-batch first, one Sinkhorn runs over the whole batch, then the
student's micro-batches are streamed. The accumulated gradient is the big batch's, to fp32 rounding. Nothing here waits
for the device: whether an update is finite is a tensor on the device that masks it as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from dinox_model import Preprocess, PrototypeHead, VisionTransformer, ViTConfig, build
from dinox_train import health
from dinox_train.objectives.dino import dino_loss
from dinox_train.objectives.sinkhorn import sinkhorn
from dinox_train.optimizer import clip_gradients
from dinox_train.platform import autocast
from dinox_train.teacher import update_teacher

NUM_GLOBAL = 2


@dataclass(frozen=True)
class ViewBatch:
    """The views of one micro-batch of b windows, view-major (all windows' view 0, then all windows' view 1, …).

    global_views: float32 (2b, depth, G, G); local_views: float32 (Kb, depth, L, L), K may be 0.
    """

    global_views: Tensor
    local_views: Tensor

    @property
    def num_images(self) -> int:
        return self.global_views.shape[0] // NUM_GLOBAL


class Network(nn.Module):
    """A backbone with its prototype head; the student is one, the teacher another."""

    def __init__(self, backbone: VisionTransformer, head: PrototypeHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head


def build_network(
    config: ViTConfig, preprocess: Preprocess, *, hidden: int, bottleneck: int, prototypes: int, seed: int
) -> Network:
    """A network whose weights are a function of its shape and `seed`; student and teacher of one seed are equal."""
    backbone = build(config, seed=seed)
    backbone.preprocess = preprocess
    head = PrototypeHead(config.width, hidden, bottleneck, prototypes, seed=seed + 1)
    return Network(backbone, head)


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What stays the same from update to update."""

    precision: str
    student_temperature: float
    sinkhorn_iterations: int
    clip_norm: float


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """0-dim tensors on the device; reading one on the host is what waits for it."""

    loss: Tensor
    grad_norm: Tensor
    applied: Tensor
    """1.0 where the update was applied, 0.0 where it was masked."""
    teacher_entropy: Tensor
    prototype_use: Tensor
    feature_std: Tensor
    feature_gram: Tensor
    """Of the teacher's CLS features; the effective rank is made of it on the host, since eigenvalues wait for it."""

    def to_host(self) -> dict[str, float]:
        """The figures as numbers, `effective_rank` among them. Waits for the device."""
        figures = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "feature_gram"}
        rank = health.effective_rank_of_gram(self.feature_gram.cpu())
        return {name: float(value) for name, value in figures.items()} | {"effective_rank": float(rank)}


def train_step(
    student: Network,
    teacher: Network,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[ViewBatch],
    settings: StepSettings,
    *,
    teacher_temperature: float,
    teacher_momentum: float,
) -> StepResult:
    """Do one update over `micro_batches`, together one global batch. Learning rates stand in the optimizer's groups."""
    device = micro_batches[0].global_views.device
    num_images = sum(batch.num_images for batch in micro_batches)

    # --- teacher: every micro-batch, then one Sinkhorn over the whole batch
    features, logits = teacher_outputs(teacher, micro_batches, settings.precision)
    targets = sinkhorn(logits, teacher_temperature, settings.sinkhorn_iterations)

    # --- student: one micro-batch after the other, gradients add up
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=device)
    for batch, batch_targets in zip(micro_batches, split_rows(targets, micro_batches), strict=True):
        part = student_loss(student, batch, batch_targets, settings, total_images=num_images)
        part.backward()
        loss += part.detach()

    # --- update, masked as a whole where loss or gradient is not finite
    grad_norm = clip_gradients(student.parameters(), settings.clip_norm)
    applied = (torch.isfinite(loss) & torch.isfinite(grad_norm)).float()
    optimizer.found_inf = 1.0 - applied  # type: ignore[attr-defined] # the fused optimizer's own mask
    optimizer.step()
    update_teacher(list(teacher.parameters()), list(student.parameters()), teacher_momentum, applied)

    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        applied=applied,
        teacher_entropy=health.teacher_entropy(targets),
        prototype_use=health.prototype_use(targets),
        feature_std=health.feature_std(features),
        feature_gram=health.feature_gram(features),
    )


@torch.no_grad()
def teacher_outputs(teacher: Network, micro_batches: Sequence[ViewBatch], precision: str) -> tuple[Tensor, Tensor]:
    """CLS features (2B, d) and prototype logits (2B, K), fp32, of all global views, micro-batch after micro-batch."""
    features, logits = [], []
    for batch in micro_batches:
        with autocast(batch.global_views.device, precision):
            cls = teacher.backbone(batch.global_views).cls
            logits.append(teacher.head(cls).float())
        features.append(cls.float())
    return torch.cat(features), torch.cat(logits)


def split_rows(targets: Tensor, micro_batches: Sequence[ViewBatch]) -> Iterator[Tensor]:
    """The rows of `targets` that belong to each micro-batch, in the order `teacher_outputs` made them."""
    yield from targets.split([batch.global_views.shape[0] for batch in micro_batches])


def student_loss(
    student: Network, batch: ViewBatch, targets: Tensor, settings: StepSettings, *, total_images: int
) -> Tensor:
    """This micro-batch's share of the global batch's DINO loss: shares of all micro-batches add up to it."""
    with autocast(batch.global_views.device, settings.precision):
        cls = [student.backbone(batch.global_views).cls]
        if batch.local_views.shape[0]:
            cls.append(student.backbone(batch.local_views).cls)
        logits = student.head(torch.cat(cls))
    return dino_loss(
        logits.float(),
        targets,
        num_student_views=logits.shape[0] // batch.num_images,
        num_teacher_views=NUM_GLOBAL,
        student_temperature=settings.student_temperature,
        total_rows=total_images,
    )
