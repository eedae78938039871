"""The step: exact under accumulation, masked as a whole, and able to learn."""

import copy
import math

import pytest
import torch

from dinox_model import Preprocess, ViTConfig
from dinox_train.objectives.sinkhorn import sinkhorn
from dinox_train.step import (
    Network,
    StepResult,
    StepSettings,
    ViewBatch,
    build_network,
    split_rows,
    student_loss,
    teacher_outputs,
    train_step,
)

TINY = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64, layer_scale=0.5)
SETTINGS = StepSettings(precision="fp32", student_temperature=0.1, sinkhorn_iterations=3, clip_norm=3.0)


def network(seed: int, prototypes: int = 32) -> Network:
    return build_network(TINY, Preprocess(), hidden=64, bottleneck=16, prototypes=prototypes, seed=seed)


def views(num_images: int, seed: int = 0) -> ViewBatch:
    """Views that share what their image is, and differ in the rest."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, 32, 32, generator=random)
    noise = torch.randn(4 * num_images, 3, 32, 32, generator=random)
    global_views = images.repeat(2, 1, 1, 1) + 0.3 * noise[: 2 * num_images]
    local_views = images.repeat(2, 1, 1, 1) + 0.3 * noise[2 * num_images :]
    return ViewBatch(global_views, local_views[:, :, 8:24, 8:24].contiguous())


def cut(batch: ViewBatch, pieces: int) -> list[ViewBatch]:
    """The same windows as `pieces` micro-batches (views stay view-major)."""
    images = batch.num_images // pieces

    def rows(tensor: torch.Tensor, piece: int) -> torch.Tensor:
        by_view = tensor.unflatten(0, (-1, batch.num_images))
        return by_view[:, piece * images : (piece + 1) * images].flatten(0, 1)

    return [ViewBatch(rows(batch.global_views, piece), rows(batch.local_views, piece)) for piece in range(pieces)]


def gradient(student: Network, teacher: Network, pieces: list[ViewBatch], *, one_sinkhorn: bool) -> torch.Tensor:
    total = sum(piece.num_images for piece in pieces)
    _, logits = teacher_outputs(teacher, pieces, "fp32")
    if one_sinkhorn:
        targets = list(split_rows(sinkhorn(logits, 0.05, 3), pieces))
    else:
        targets = [sinkhorn(part, 0.05, 3) for part in split_rows(logits, pieces)]
    student.zero_grad()
    for piece, rows in zip(pieces, targets, strict=True):
        student_loss(student, piece, rows, SETTINGS, total_images=total).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def test_accumulated_gradients_are_the_big_batch_s_and_the_naive_form_s_are_not() -> None:
    student, teacher = network(1).double(), network(2).double()
    with torch.no_grad():  # targets of a network that has begun to tell images apart
        teacher.head.last_layer.weight *= 100
    batch = views(8)
    batch = ViewBatch(batch.global_views.double(), batch.local_views.double())
    whole = gradient(student, teacher, [batch], one_sinkhorn=True)
    pieces = gradient(student, teacher, cut(batch, 4), one_sinkhorn=True)
    naive = gradient(student, teacher, cut(batch, 4), one_sinkhorn=False)
    # Sinkhorn and the loss compute in fp32, so that is the rounding to expect.
    assert (whole - pieces).norm() / whole.norm() < 1e-5
    assert (whole - naive).norm() / whole.norm() > 1e-2


def step(
    student: Network, teacher: Network, optimizer: torch.optim.Optimizer, batch: ViewBatch, momentum: float = 0.9
) -> StepResult:
    return train_step(
        student, teacher, optimizer, [batch], SETTINGS, teacher_temperature=0.03, teacher_momentum=momentum
    )


def optimizer_of(student: Network, lr: float = 1e-3) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, fused=True, weight_decay=0.0)
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    return optimizer


def state(*networks: Network) -> list[torch.Tensor]:
    return [parameter.detach().clone() for item in networks for parameter in item.parameters()]


@pytest.mark.parametrize("where", ["global_views", "local_views"])
def test_a_non_finite_batch_changes_nothing(where: str) -> None:
    student, teacher = network(1), network(1)
    optimizer = optimizer_of(student)
    assert step(student, teacher, optimizer, views(4)).applied == 1.0
    before = state(student, teacher)
    moments = [value.clone() for entry in optimizer.state.values() for value in entry.values()]

    poisoned = views(4, seed=1)
    getattr(poisoned, where)[0, 0, 0, 0] = math.inf
    result = step(student, teacher, optimizer, poisoned)

    assert result.applied == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, state(student, teacher), strict=True))
    after = [value for entry in optimizer.state.values() for value in entry.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert step(student, teacher, optimizer, views(4, seed=2)).applied == 1.0


def test_student_and_teacher_start_equal_and_the_teacher_follows() -> None:
    student, teacher = network(3), network(3)
    assert all(torch.equal(a, b) for a, b in zip(state(student), state(teacher), strict=True))
    start = state(teacher)
    step(student, teacher, optimizer_of(student), views(4), momentum=0.75)
    for old, new, moved in zip(start, state(student), state(teacher), strict=True):
        torch.testing.assert_close(moved, 0.75 * old + 0.25 * new)


def test_every_trainable_parameter_gets_a_gradient() -> None:
    student, teacher = network(1), network(1)
    step(student, teacher, optimizer_of(student), views(4))
    # The mask token has its turn with the masked objective.
    without = [name for name, parameter in student.named_parameters() if parameter.grad is None]
    assert without == ["backbone.mask_token"]


def test_a_few_windows_are_overfitted_and_the_loss_goes_on_after_a_restart() -> None:
    student, teacher = network(1, prototypes=8), network(1, prototypes=8)
    optimizer = optimizer_of(student)
    batch = views(8)
    losses = [float(step(student, teacher, optimizer, batch).loss) for _ in range(150)]
    assert losses[0] == pytest.approx(math.log(8), rel=0.1)
    assert losses[-1] < 0.4 * losses[0]

    again, again_teacher = network(8, prototypes=8), network(9, prototypes=8)
    again.load_state_dict(student.state_dict())
    again_teacher.load_state_dict(teacher.state_dict())
    restored = optimizer_of(again)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    went_on = [float(step(student, teacher, optimizer, batch).loss) for _ in range(3)]
    restarted = [float(step(again, again_teacher, restored, batch).loss) for _ in range(3)]
    assert went_on == restarted
    assert restarted[0] < 1.2 * losses[-1]
