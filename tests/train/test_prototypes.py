"""The number of prototypes follows the batch: the bound it is made of, and the published recipes it agrees with."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_train.masking import MaskSettings, masked_counts
from dinox_train.objectives.prototypes import FEWEST, MOST, least_entropy, suggested_prototypes
from dinox_train.objectives.sinkhorn import sinkhorn


def masked_patches(batch: int, patches: int) -> int:
    return int(masked_counts(MaskSettings(), num_crops=2 * batch, num_patches=patches).sum())


def mean_entropy(samples: int, prototypes: int, iterations: int) -> float:
    logits = torch.randn(samples, prototypes, generator=torch.Generator().manual_seed(0))
    targets = sinkhorn(logits, 0.02, iterations)  # a teacher that is very sure of itself
    return float(torch.special.entr(targets).sum(dim=1).mean())


@pytest.mark.parametrize(("samples", "prototypes"), [(8, 256), (32, 256), (64, 64), (256, 64)])
def test_balance_forces_this_entropy_on_targets(samples: int, prototypes: int) -> None:
    assert mean_entropy(samples, prototypes, iterations=200) >= least_entropy(prototypes, samples) - 1e-3
    assert least_entropy(prototypes, samples) == pytest.approx(max(0.0, math.log(prototypes) - math.log(samples)))


def test_a_batch_far_too_small_gets_targets_that_say_nothing_and_the_suggestion_mends_it() -> None:
    samples = 32
    suggested = suggested_prototypes(samples // 2, 0).dino
    assert mean_entropy(samples, 4096, 3) > 0.55 * math.log(4096)
    assert mean_entropy(samples, suggested, 3) < 0.5 * math.log(suggested)


def test_published_recipes() -> None:
    vit_l = suggested_prototypes(2048, masked_patches(2048, 196))  # DINOv3, ViT-L on ImageNet
    assert (vit_l.dino, vit_l.ibot) == (65536, 65536)
    dinov2 = suggested_prototypes(3072, masked_patches(3072, 256))
    assert (dinov2.dino, dinov2.ibot) == (131072, 131072)


@settings(max_examples=100, deadline=None)
@given(batch=st.integers(1, 10_000), patches=st.integers(0, 5_000_000))
def test_powers_of_two_that_grow_with_the_batch(batch: int, patches: int) -> None:
    found = suggested_prototypes(batch, patches)
    for count in found:
        assert FEWEST <= count <= MOST
        assert count & (count - 1) == 0
    larger = suggested_prototypes(2 * batch, 2 * patches)
    assert all(more >= less for more, less in zip(larger, found, strict=True))
    assert found.shared == min(found.dino, found.ibot)
    if found.dino > FEWEST:  # rounded to the nearest power of two
        assert least_entropy(found.dino, 2 * batch) <= 0.25 * math.log(found.dino) + 0.5 * math.log(2)


def test_no_batch_is_refused() -> None:
    with pytest.raises(ValueError):
        suggested_prototypes(0, 10)
