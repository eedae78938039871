"""The iBOT loss against the loop over crops and masked patches that defines it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinox_train.masking import MaskSettings, draw_masks
from dinox_train.objectives.ibot import ibot_loss

TAU = 0.1


def random_rows(rows: int, prototypes: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, prototypes, generator=random, dtype=torch.float64)
    return student.requires_grad_(), torch.softmax(3 * teacher, dim=1)


def loop_over_crops(student: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
    """student, targets: (crops, P, K), all patches."""
    loss = torch.zeros((), dtype=torch.float64)
    for crop in range(len(masks)):
        of_crop = [
            -(targets[crop, patch] * torch.log_softmax(student[crop, patch] / TAU, dim=0)).sum()
            for patch in range(masks.shape[1])
            if masks[crop, patch]
        ]
        if of_crop:
            loss = loss + torch.stack(of_crop).mean()
    return loss / len(masks)


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 5), height=st.integers(1, 4), width=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_equals_the_loop_with_its_gradient(batch: int, height: int, width: int, seed: int) -> None:
    plan = draw_masks(
        MaskSettings(), seed=seed, position=0, rows=range(batch), batch_size=batch, num_views=2, grid=(height, width)
    )  # type: ignore[arg-type]
    student, targets = random_rows(2 * batch * height * width, 6, seed)
    indices = torch.from_numpy(plan.indices)
    ours = ibot_loss(
        student[indices],
        targets[indices],
        torch.from_numpy(plan.weights),
        student_temperature=TAU,
        total_crops=2 * batch,
    )
    masks = torch.from_numpy(plan.masks)
    slow = loop_over_crops(student.view(*masks.shape, 6), targets.view(*masks.shape, 6), masks)
    if plan.indices.size:
        fast_gradient, slow_gradient = (torch.autograd.grad(loss, student)[0] for loss in (ours, slow))
        torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(ours, slow, rtol=1e-6, atol=1e-12)  # the weights are fp32


def loss_of(student: Tensor, targets: Tensor, weights: Tensor, total_crops: int = 4) -> Tensor:
    return ibot_loss(student, targets, weights, student_temperature=TAU, total_crops=total_crops)


def test_gradcheck() -> None:
    student, targets = random_rows(5, 4, 0)
    weights = torch.tensor([0.5, 0.5, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: loss_of(logits, targets, weights), (student,))


def test_micro_batches_add_up_to_the_batch() -> None:
    student, targets = random_rows(9, 8, 1)
    weights = torch.rand(9, dtype=torch.float64)
    whole = loss_of(student, targets, weights)
    whole_gradient = torch.autograd.grad(whole, student)[0]
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 2), slice(2, 2), slice(2, 9)):  # one without a masked patch
        loss = loss_of(student[part], targets[part], weights[part])
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, whole_gradient, rtol=1e-12, atol=0)


def test_no_masked_patch_is_no_loss_and_no_error() -> None:
    student = torch.zeros(0, 8, requires_grad=True)
    loss = loss_of(student, torch.zeros(0, 8), torch.zeros(0))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert student.grad is not None


def test_a_student_that_knows_nothing_loses_ln_k_for_each_masked_crop() -> None:
    targets = random_rows(6, 64, 2)[1]
    weights = torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.25])  # two of four crops are masked
    assert float(loss_of(torch.zeros(6, 64), targets, weights)) == pytest.approx(math.log(64) / 2, rel=1e-6)


def test_bf16_logits_are_computed_in_fp32_and_targets_get_no_gradient() -> None:
    student, targets = random_rows(6, 32, 3)
    logits, targets = student.detach().bfloat16(), targets.float().requires_grad_()
    weights = torch.full((6,), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_of(logits.requires_grad_(), targets, weights)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss_of(logits.float(), targets, weights))
    inside.backward()
    assert targets.grad is None


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="not \\(m, K\\)"):
        loss_of(torch.zeros(4, 8), torch.zeros(4, 9), torch.zeros(4))
    with pytest.raises(ValueError, match="not \\(m, K\\)"):
        loss_of(torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(3))
    with pytest.raises(ValueError, match="total_crops"):
        loss_of(torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(4), total_crops=0)
