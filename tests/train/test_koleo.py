"""KoLeo against its loop, at duplicates, at near duplicates in fp32, and cut into micro-batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinox_train.objectives.koleo import koleo_gradient, koleo_loss


def random_features(rows: int, width: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """float64, around a common direction where the spread is small."""
    random = torch.Generator().manual_seed(seed)
    common, own = torch.randn(1, width, generator=random), torch.randn(rows, width, generator=random)
    return common.double() * (spread < 1) + spread * own.double()


def loop_over_rows(features: Tensor, group_size: int | None = None) -> Tensor:
    x = features / features.norm(dim=1, keepdim=True)
    rows, losses = group_size or len(x), []
    for i in range(len(x)):
        group = range(i // rows * rows, i // rows * rows + rows)
        near = max((float((x[i] @ x[j]).detach()), -j) for j in group if j != i)[1]
        losses.append(-torch.log((x[i] - x[-near]).norm() + 1e-8))
    return torch.stack(losses).mean()


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    rows=st.integers(2, 6),
    width=st.integers(2, 6),
    seed=st.integers(0, 2**31),
    grouped=st.booleans(),
)
def test_equals_the_loop_with_its_gradient(groups: int, rows: int, width: int, seed: int, grouped: bool) -> None:
    features = random_features(groups * rows, width, seed).requires_grad_()
    size = rows if grouped else None
    ours, slow = koleo_loss(features, group_size=size), loop_over_rows(features, size)
    torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-12)
    fast_gradient, slow_gradient = (torch.autograd.grad(loss, features)[0] for loss in (ours, slow))
    torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-7, atol=1e-8)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(koleo_loss, (random_features(6, 5).requires_grad_(),))
    assert torch.autograd.gradcheck(
        lambda features: koleo_loss(features, group_size=3), (random_features(6, 5, 1).requires_grad_(),)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0, 0.0, 1e-20])
def test_identical_images_give_a_finite_loss_and_a_finite_gradient(dtype: torch.dtype, value: float) -> None:
    features = torch.full((4, 8), value, dtype=dtype, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-math.log(1e-8))
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_one_duplicate_leaves_the_gradient_of_the_others() -> None:
    features = random_features(6, 5).float()
    features[4] = features[1]
    features.requires_grad_()
    koleo_loss(features).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    # The pair of duplicates has no direction to part in; the others still part from their neighbours.
    assert features.grad[[0, 2, 3, 5]].norm(dim=1).min() > 1e-3
    assert features.grad.norm() < 10


@pytest.mark.parametrize("distance", [1e-7, 1e-9])
def test_what_rounding_parts_is_no_gradient(distance: float) -> None:
    features = random_features(4, 16).float()
    features[1] = features[0] + distance * random_features(1, 16, seed=1).float()[0]
    features.requires_grad_()
    loss = koleo_loss(features)
    loss.backward()
    assert loss.isfinite()
    assert features.grad.norm() < 10  # 1 / distance would be more than 1e6


@pytest.mark.parametrize(("spread", "tolerance"), [(1e-1, 1e-6), (1e-3, 1e-5), (1e-4, 1e-3)])
def test_fp32_finds_the_neighbours_of_rows_that_are_nearly_equal(spread: float, tolerance: float) -> None:
    features = random_features(64, 128, spread=spread).float()
    exact = loop_over_rows(features.double())
    assert float(koleo_loss(features)) == pytest.approx(float(exact), rel=tolerance)
    x = features / features.norm(dim=1, keepdim=True)
    cosines = (x @ x.T).fill_diagonal_(-1)  # the usual way
    plain = -(x - x[cosines.argmax(dim=1)]).norm(dim=1).log().mean()
    if spread < 1e-3:
        assert abs(float(plain) - float(exact)) > 10 * abs(float(koleo_loss(features)) - float(exact))


def test_autocast_does_not_reach_the_arithmetic() -> None:
    features = random_features(32, 64, spread=1e-2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = koleo_loss(features)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, koleo_loss(features))
    assert abs(float(koleo_loss(features.bfloat16())) - float(inside)) > 1e-3  # what bf16 features would have cost


def test_both_ends_of_a_pair_are_pushed() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.2]], requires_grad=True)  # row 1 is the neighbour of both
    koleo_loss(features).backward()
    alone = features.detach().clone().requires_grad_()
    x = alone / alone.norm(dim=1, keepdim=True)
    (-(x - x[[1, 0, 1]].detach()).norm(dim=1).log().mean()).backward()
    assert (features.grad - alone.grad).abs().max() > 0.1


def test_the_gradient_of_the_whole_update_is_streamed_over_micro_batches() -> None:
    weights = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    inputs = random_features(12, 5)

    def network(x: Tensor) -> Tensor:
        return torch.tanh(x @ weights)

    whole = koleo_loss(network(inputs))
    (expected,) = torch.autograd.grad(whole, weights)
    loss, gradient = koleo_gradient(network(inputs).detach())
    assert not gradient.requires_grad
    torch.testing.assert_close(loss, whole.detach())
    for rows in (slice(0, 3), slice(3, 5), slice(5, 12)):
        (network(inputs[rows]) * gradient[rows]).sum().backward()
    torch.testing.assert_close(weights.grad, expected, rtol=1e-10, atol=1e-13)

    naive = torch.zeros_like(expected)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        naive += torch.autograd.grad(koleo_loss(network(inputs[rows]), total_rows=12), weights)[0]
    assert (naive - expected).norm() / expected.norm() > 0.1  # neighbours within micro-batches are another loss


def test_the_gradient_function_equals_autograd_also_inside_no_grad_and_in_groups() -> None:
    features = random_features(8, 6).requires_grad_()
    (expected,) = torch.autograd.grad(koleo_loss(features, group_size=4), features)
    with torch.no_grad():
        loss, gradient = koleo_gradient(features, group_size=4)
    assert not loss.requires_grad
    assert torch.equal(gradient, expected)
    assert koleo_gradient(features.detach().bfloat16())[1].dtype == torch.float32


def test_groups_within_micro_batches_add_up_without_a_second_pass() -> None:
    features = random_features(12, 6).requires_grad_()
    whole = koleo_loss(features, group_size=2)
    (expected,) = torch.autograd.grad(whole, features)
    total = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 4), slice(4, 6), slice(6, 12)):
        part = koleo_loss(features[rows], group_size=2, total_rows=12)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(features.grad, expected)


def test_what_is_not_finite_stays_visible() -> None:
    features = random_features(4, 4).float()
    features[1, 2] = torch.nan
    assert not koleo_loss(features).isfinite()


@pytest.mark.parametrize(
    ("shape", "group_size"), [((1, 4), None), ((0, 4), None), ((4, 4), 1), ((6, 4), 4), ((4,), None)]
)
def test_rows_that_cannot_be_compared_are_refused(shape: tuple[int, ...], group_size: int | None) -> None:
    with pytest.raises(ValueError):
        koleo_loss(torch.ones(shape), group_size=group_size)
