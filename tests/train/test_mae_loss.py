"""The masked autoencoder's loss, and those of labels, against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinox_train.objectives.mae import mae_loss, normalised_patches, patches_of
from dinox_train.objectives.supervised import binary_cross_entropy


def random_values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def test_patches_are_numbered_as_the_network_does() -> None:
    images = random_values(2, 3, 8, 12)
    patches = patches_of(images, 4)
    assert patches.shape == (2, 6, 48)
    for number, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        cut = images[1, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.equal(patches[1, number], cut.flatten())
    filters = random_values(5, 3, 4, 4, seed=1)
    embedded = F.conv2d(images, filters, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches @ filters.flatten(1).T, embedded)


def test_a_patch_less_its_mean_over_its_deviation() -> None:
    patches = 5 + 3 * random_values(2, 4, 48)
    normalised = normalised_patches(patches)
    for patch, result in zip(patches.flatten(0, 1), normalised.flatten(0, 1), strict=True):
        mean = sum(patch.tolist()) / 48
        variance = sum((value - mean) ** 2 for value in patch.tolist()) / 48
        assert result.tolist() == pytest.approx([(v - mean) / math.sqrt(variance + 1e-6) for v in patch.tolist()])
    air = normalised_patches(torch.zeros(1, 48))
    assert torch.equal(air, torch.zeros(1, 48))


@settings(max_examples=25, deadline=None)
@given(m=st.integers(0, 7), pixels=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_mae_equals_the_loop(m: int, pixels: int, seed: int) -> None:
    predicted, targets = random_values(m, pixels, seed=seed), random_values(m, pixels, seed=seed + 1)
    slow = sum(
        sum((float(predicted[i, p]) - float(targets[i, p])) ** 2 for p in range(pixels)) / pixels for i in range(m)
    )
    assert float(mae_loss(predicted, targets, total_patches=9)) == pytest.approx(slow / 9, rel=1e-9, abs=1e-12)


def test_mae_gradcheck_micro_batches_and_precision() -> None:
    predicted, targets = random_values(6, 4).requires_grad_(), random_values(6, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: mae_loss(p, targets.detach(), total_patches=6), (predicted,))
    whole = mae_loss(predicted, targets, total_patches=6)
    parts = [
        mae_loss(predicted[part], targets[part], total_patches=6) for part in (slice(0, 0), slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    whole.backward()
    assert targets.grad is None
    assert mae_loss(predicted.bfloat16(), targets, total_patches=6).dtype == torch.float32


def test_mae_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="pixels"):
        mae_loss(torch.zeros(2, 3), torch.zeros(2, 4), total_patches=2)
    with pytest.raises(ValueError, match="total_patches"):
        mae_loss(torch.zeros(0, 3), torch.zeros(0, 3), total_patches=0)
    with pytest.raises(ValueError, match="whole patches"):
        patches_of(torch.zeros(1, 3, 10, 12), 4)


def test_binary_cross_entropy_equals_the_loop_and_gradcheck() -> None:
    logits = (4 * random_values(5)).requires_grad_()
    labels = (random_values(5, seed=1) > 0).double()

    def surprise(z: float, label: float) -> float:
        yes = 1 / (1 + math.exp(-z))
        return -label * math.log(yes) - (1 - label) * math.log(1 - yes)

    slow = sum(surprise(z, label) for z, label in zip(logits.tolist(), labels.tolist(), strict=True)) / 5
    assert float(binary_cross_entropy(logits.detach(), labels)) == pytest.approx(slow)
    assert torch.autograd.gradcheck(lambda z: binary_cross_entropy(z, labels), (logits,))
    theirs = F.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(binary_cross_entropy(logits, labels), theirs)


def test_the_loss_of_labels_adds_up_over_micro_batches_and_stays_finite() -> None:
    logits, labels = random_values(6), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    parts = [
        binary_cross_entropy(logits[part], labels[part], total_rows=6)
        for part in (slice(0, 1), slice(1, 1), slice(1, 6))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), binary_cross_entropy(logits, labels))
    extreme = torch.tensor([1e4, -1e4])
    assert float(binary_cross_entropy(extreme, torch.tensor([1.0, 0.0]))) == 0.0
    assert float(binary_cross_entropy(extreme, torch.tensor([0.0, 1.0]))) == pytest.approx(1e4)
    assert binary_cross_entropy(logits.bfloat16(), labels).dtype == torch.float32


def test_labels_that_do_not_fit_are_refused() -> None:
    for logits, labels in ((torch.zeros(3), torch.zeros(2)), (torch.zeros(3, 1), torch.zeros(3, 1))):
        with pytest.raises(ValueError, match="labels"):
            binary_cross_entropy(logits, labels)
