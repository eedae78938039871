"""The DINO loss against the loop over all pairs that defines it, gradients included, and under accumulation."""

import math

import pytest
import torch
from torch import Tensor

from dinox_train.objectives.dino import dino_loss

TAU = 0.1


def views_of(num_student: int, num_teacher: int, images: int, prototypes: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_student * 100 + num_teacher * 10 + images)
    student = torch.randn(num_student * images, prototypes, generator=generator, dtype=torch.float64)
    teacher = torch.randn(num_teacher * images, prototypes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), torch.softmax(3 * teacher, dim=1)


def loop_over_pairs(student: Tensor, targets: Tensor, num_student: int, num_teacher: int) -> Tensor:
    student_views, teacher_views = student.chunk(num_student), targets.chunk(num_teacher)
    losses = [
        -(t * torch.log_softmax(s / TAU, dim=1)).sum(dim=1).mean()
        for i, s in enumerate(student_views)
        for j, t in enumerate(teacher_views)
        if i != j
    ]
    return torch.stack(losses).mean()


def loss_of(student: Tensor, targets: Tensor, num_student: int, num_teacher: int, **more: float) -> Tensor:
    return dino_loss(
        student,
        targets,
        num_student_views=num_student,
        num_teacher_views=num_teacher,
        student_temperature=TAU,
        **more,
    )


@pytest.mark.parametrize(("num_student", "num_teacher"), [(10, 2), (2, 2), (3, 2), (3, 1), (4, 4), (1, 2)])
@pytest.mark.parametrize("images", [1, 4])
def test_equals_the_loop_over_pairs_with_its_gradient(num_student: int, num_teacher: int, images: int) -> None:
    student, targets = views_of(num_student, num_teacher, images)
    ours, slow = (
        loss_of(student, targets, num_student, num_teacher),
        loop_over_pairs(student, targets, num_student, num_teacher),
    )
    torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, slow)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("local_weight", [0.0, 0.5, 1.0])
def test_local_pairs_weigh_what_is_asked_and_are_counted_all_the_same(local_weight: float) -> None:
    student, targets = views_of(10, 2, 3)
    crops, taught = student.chunk(10), targets.chunk(2)
    slow = torch.zeros((), dtype=torch.float64)
    pairs = 0
    for i in range(10):
        for j in range(2):
            if i == j:
                continue
            pairs += 1
            for logits, target in zip(crops[i], taught[j], strict=True):
                entropy = -sum(float(t) * torch.log_softmax(logits / TAU, dim=0)[k] for k, t in enumerate(target))
                slow = slow + (local_weight if i >= 2 else 1.0) * entropy / 3
    assert pairs == 18
    ours = loss_of(student, targets, 10, 2, local_weight=local_weight)
    torch.testing.assert_close(ours, slow / 18, rtol=1e-11, atol=0)


def test_gradcheck() -> None:
    student, targets = views_of(4, 2, 2, prototypes=5)
    for local_weight in (1.0, 0.5):
        assert torch.autograd.gradcheck(
            lambda logits, weight=local_weight: loss_of(logits, targets, 4, 2, local_weight=weight), (student,)
        )


def test_a_view_is_not_taught_by_itself() -> None:
    student, targets = views_of(2, 2, 3)
    changed = targets.clone()
    changed[:3] = torch.eye(9, dtype=torch.float64)[:3]  # teacher view 0 teaches student view 1 only
    before, after = (torch.autograd.grad(loss_of(student, t, 2, 2), student)[0] for t in (targets, changed))
    torch.testing.assert_close(before[:3], after[:3], rtol=0, atol=1e-13)
    assert (before[3:] - after[3:]).abs().max() > 0.1


def test_micro_batches_add_up_to_the_batch() -> None:
    num_student, num_teacher, images = 5, 2, 6
    student, targets = views_of(num_student, num_teacher, images)
    whole = loss_of(student, targets, num_student, num_teacher)
    whole_gradient = torch.autograd.grad(whole, student)[0]

    def rows(tensor: Tensor, views: int, part: slice) -> Tensor:
        return tensor.view(views, images, -1)[:, part].flatten(0, 1)

    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):  # unequal pieces
        loss = loss_of(
            rows(student, num_student, part),
            rows(targets, num_teacher, part),
            num_student,
            num_teacher,
            total_rows=images,
        )
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, whole_gradient, rtol=1e-10, atol=1e-14)


def test_a_student_that_knows_nothing_loses_ln_k() -> None:
    targets = views_of(2, 2, 4, prototypes=64)[1]
    loss = loss_of(torch.zeros(8, 64), targets, 2, 2)
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    assert float(loss) == pytest.approx(math.log(64), rel=1e-6)


def test_bf16_logits_and_autocast_do_not_reach_the_arithmetic() -> None:
    student, targets = views_of(4, 2, 8, prototypes=128)
    logits, targets = student.detach().bfloat16(), targets.float()
    outside = loss_of(logits.float(), targets, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_of(logits, targets, 4, 2)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_extreme_logits_stay_finite() -> None:
    student, targets = views_of(3, 2, 2)
    logits = (student.detach().float() * 1e4).requires_grad_()
    loss = loss_of(logits, targets.float(), 3, 2)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_targets_get_no_gradient() -> None:
    student, targets = views_of(3, 2, 2)
    targets = targets.clone().requires_grad_()
    loss_of(student, targets, 3, 2).backward()
    assert targets.grad is None


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape", "num_student", "num_teacher"),
    [
        ((4, 9), (4, 9), 1, 1),  # no pair
        ((4, 9), (4, 9), 4, 0),
        ((8, 9), (4, 8), 4, 2),  # other prototypes
        ((8, 9), (6, 9), 4, 2),  # other images
        ((6, 9), (3, 9), 4, 2),  # no whole number of images
        ((0, 9), (0, 9), 4, 2),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    student_shape: tuple[int, int], teacher_shape: tuple[int, int], num_student: int, num_teacher: int
) -> None:
    with pytest.raises(ValueError):
        loss_of(torch.zeros(student_shape), torch.zeros(teacher_shape), num_student, num_teacher)
