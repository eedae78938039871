"""No loss waits for the device: each runs, forwards and backwards, on tensors that have a shape and no values."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dinox_train.objectives.centering import centred_targets, updated_centre
from dinox_train.objectives.dino import dino_loss
from dinox_train.objectives.gram import gram_loss, resize_features, take_patches
from dinox_train.objectives.ibot import ibot_loss
from dinox_train.objectives.koleo import koleo_gradient, koleo_loss
from dinox_train.objectives.mae import mae_loss, normalised_patches
from dinox_train.objectives.sinkhorn import balanced_targets, prototype_potential
from dinox_train.objectives.supervised import binary_cross_entropy


def of_views(x: Tensor) -> Tensor:
    potential = prototype_potential(x[:4].split(2), 0.05)
    targets = balanced_targets(x[:4], potential, 0.05)
    return dino_loss(x, targets, num_student_views=4, num_teacher_views=2, student_temperature=0.1, local_weight=0.5)


def of_masked_patches(x: Tensor) -> Tensor:
    targets = centred_targets(x, updated_centre(torch.zeros(6), x.detach(), 0.9), 0.05)
    return ibot_loss(x, targets, torch.ones(8), student_temperature=0.1, total_crops=4)


def of_similarities(x: Tensor) -> Tensor:
    teacher = resize_features(torch.ones(2, 16, 6), (4, 4), (2, 2))
    patches, tokens = x.view(2, 4, 6), torch.ones(2, 4, dtype=torch.bool)
    subset = gram_loss(*(take_patches(side, torch.zeros(2, 3, dtype=torch.int64)) for side in (patches, teacher)))
    return subset + gram_loss(patches, teacher, tokens=tokens, negatives="clamp_both")


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "dino": of_views,
    "ibot": of_masked_patches,
    "koleo": lambda x: koleo_loss(x, group_size=4) + (x * koleo_gradient(x)[1]).sum(),
    "gram": of_similarities,
    "mae": lambda x: mae_loss(x, normalised_patches(x.detach()), total_patches=8),
    "labels": lambda x: binary_cross_entropy(x[:, 0], torch.zeros(8)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_no_value_is_asked_for(name: str) -> None:
    with FakeTensorMode():
        x = torch.ones(8, 6, requires_grad=True)
        loss = LOSSES[name](x)
        loss.backward()
        assert loss.shape == ()
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("asks", [lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: x[x > 0].sum()])
def test_what_asks_for_a_value_would_be_seen(asks: Callable[[Tensor], object]) -> None:
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, RuntimeError)):
        asks(torch.ones(8, 6))
