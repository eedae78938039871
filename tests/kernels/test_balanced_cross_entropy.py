"""Sinkhorn's potential and the cross-entropies by kernels, against fp64 and the plain objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dinox_model.kernels.architecture import ARCHITECTURES
from dinox_model.kernels.tiles import Tiles
from dinox_train.kernels import balanced_cross_entropy as entropy
from dinox_train.kernels import prototype_potential as potential
from dinox_train.kernels.balanced_cross_entropy import balanced_cross_entropy, balanced_cross_entropy_reference
from dinox_train.kernels.fused_losses import fused_dino_loss, fused_ibot_loss, view_pairs
from dinox_train.objectives import sinkhorn
from dinox_train.objectives.dino import dino_loss
from dinox_train.objectives.dinov3 import DINOv3, DINOv3Settings, IBOTSettings
from dinox_train.objectives.ibot import ibot_loss
from tests.train.small_step import batch_of, gradient, networks, optimizer_of, step

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WARM, COLD = 0.1, 0.05
FEW = settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.generate))  # shrinking takes minutes here
TEMPERATURES = {"student_temperature": WARM, "teacher_temperature": COLD}


def logits_of(rows: int, prototypes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def no_worse(ours: Tensor, torchs: Tensor, exact: Tensor, factor: float) -> None:
    """FlashAttention's rule, of the largest error. Besides, one rounding in fp32 of the exponents, logits / 0.05: that
    is what both sides' errors are made of, and torch's may happen to be 0."""
    allowed = factor * (torchs.double() - exact).abs().max() + 100 * 2**-24 * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed


@FEW
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(lambda sizes: sum(sizes) > 0),
    prototypes=st.integers(1, 300),
    iterations=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_potential_equals_the_reference(
    sizes: list[int], prototypes: int, iterations: int, dtype: torch.dtype, seed: int
) -> None:
    logits = logits_of(sum(sizes), prototypes, dtype, seed)
    ours = potential.prototype_potential(logits.split(sizes), COLD, iterations)
    torchs = sinkhorn.prototype_potential(logits, COLD, iterations)
    assert ours.dtype == torch.float32
    no_worse(ours, torchs, sinkhorn.prototype_potential(logits.double(), COLD, iterations), 2)


def test_groups_of_rows_and_tiles_beyond_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(potential, "GROUP", 7)
    small = {"prototype_columns": {"BLOCK_N": 4, "BLOCK_K": 64}}
    monkeypatch.setattr(potential, "tiles_for", lambda name, **_: Tiles(sizes=small.get(name, {"BLOCK_K": 64})))
    logits = logits_of(15, 150)
    assert potential.prototype_log_sums(logits, None, COLD).shape == (3, 150)
    u = sinkhorn.prototype_potential(logits, COLD)
    torch.testing.assert_close(potential.prototype_potential(logits, COLD), u, rtol=2e-6, atol=2e-5)
    given = logits_of(2, 150, seed=1).requires_grad_(), logits, u, torch.tensor([[0, 14], [-1, 5]])
    found = [
        function(*given, **TEMPERATURES) for function in (balanced_cross_entropy, balanced_cross_entropy_reference)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-4)
    gradients = [torch.autograd.grad(losses.sum(), given[0])[0] for losses in found]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_no_row_and_logits_far_from_zero() -> None:
    assert torch.equal(potential.prototype_log_sums(logits_of(0, 5), None, COLD), torch.full((1, 5), -math.inf))
    logits = 3000 * logits_of(9, 33)  # exp(L / tau) would end at 4.4
    expected = sinkhorn.prototype_potential(logits, COLD)
    torch.testing.assert_close(potential.prototype_potential(logits, COLD), expected, rtol=1e-6, atol=1e-2)


def test_ranks_agree_on_the_potential_of_all_samples() -> None:
    logits = logits_of(6, 40)
    parts, said = logits.split((2, 4)), []

    def of_both(values: Tensor, operation: str) -> Tensor:
        """What the second rank says is played back to the first, turn by turn."""
        theirs = said.pop(0)
        return torch.maximum(values, theirs) if operation == "max" else values + theirs

    # Both ranks in one process: each turn's other half, computed from the u that the whole batch has at that turn.
    u = None
    for _ in range(3):
        both = [torch.logsumexp(potential.prototype_log_sums(part, u, COLD), dim=0) for part in parts]
        largest = torch.maximum(*both)
        said += [both[1], (both[1] - largest).exp()]
        u = torch.logsumexp(torch.stack(both), dim=0)
    found = potential.prototype_potential(parts[0], COLD, all_reduce=of_both)
    torch.testing.assert_close(found, sinkhorn.prototype_potential(logits, COLD), rtol=2e-6, atol=1e-5)


@FEW
@given(
    rows=st.integers(1, 5),
    teachers=st.integers(1, 9),
    width=st.sampled_from((1, 2, 4)),
    prototypes=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_losses_and_gradients_equal_the_reference(
    rows: int, teachers: int, width: int, prototypes: int, dtype: torch.dtype, seed: int
) -> None:
    student, teacher = logits_of(rows, prototypes, dtype, seed), logits_of(teachers, prototypes, dtype, seed + 1)
    random = torch.Generator().manual_seed(seed)
    pairs = torch.randint(-1, teachers, (rows, width), generator=random)
    weights = torch.randn(rows, generator=random)
    u = sinkhorn.prototype_potential(teacher.double(), COLD)

    def found(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        given = student.to(dtype).requires_grad_()
        losses = function(
            given, teacher.to(dtype), u.to(torch.promote_types(dtype, torch.float32)), pairs, **TEMPERATURES
        )
        return losses.detach(), torch.autograd.grad(losses, given, weights.to(losses.dtype))[0]

    exact = found(balanced_cross_entropy_reference, torch.float64)
    torchs, ours = found(balanced_cross_entropy_reference, dtype), found(balanced_cross_entropy, dtype)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    no_worse(ours[0], torchs[0], exact[0], 2)
    no_worse(ours[1], torchs[1], exact[1], 3)


def test_reference_is_the_formula_with_its_gradient() -> None:
    student, teacher = logits_of(4, 6).double().requires_grad_(), logits_of(3, 6, seed=1).double()
    pairs, u = torch.tensor([[0, -1, 2], [1, 1, 0], [-1, -1, -1], [2, 0, -1]]), torch.linspace(0, 1, 6).double()
    found = balanced_cross_entropy_reference(student, teacher, u, pairs, **TEMPERATURES)
    for row in range(4):
        total = 0.0
        for q in pairs[row].tolist():
            if q >= 0:
                weights = (teacher[q] / COLD - u).exp()
                total += float(-(weights / weights.sum() * (student[row] / WARM).log_softmax(0)).sum().detach())
        assert float(found[row].detach()) == pytest.approx(total)
    assert torch.autograd.gradcheck(
        lambda z: balanced_cross_entropy_reference(z, teacher, u, pairs, **TEMPERATURES), (student,)
    )


@pytest.mark.parametrize(("views", "teachers"), [(2, 2), (4, 2), (3, 3)])
def test_dino_equals_the_plain_loss(views: int, teachers: int) -> None:
    images = 2
    student, teacher = logits_of(views * images, 70), logits_of(teachers * images, 70, seed=1)
    u = sinkhorn.prototype_potential(teacher, COLD)
    shape = {"num_student_views": views, "num_teacher_views": teachers, "student_temperature": WARM}
    more = {"local_weight": 0.5, "total_rows": 8}
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    fused = fused_dino_loss(ours, teacher, u, teacher_temperature=COLD, **shape, **more)
    expected = dino_loss(plain, sinkhorn.balanced_targets(teacher, u, COLD), **shape, **more)
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)
    fused.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_pairs_are_those_of_other_views_of_the_image() -> None:
    pairs = view_pairs(3, 2, 2, torch.device("cpu"))
    assert pairs.tolist() == [[-1, 2], [-1, 3], [0, -1], [1, -1], [0, 2], [1, 3]]
    assert view_pairs(1, 3, 1, torch.device("cpu")).tolist() == [[-1, 1, 2, -1]]


def test_ibot_equals_the_plain_loss_and_micro_batches_add_up() -> None:
    student, teacher = logits_of(11, 90), logits_of(11, 90, seed=1)
    weights, u = torch.rand(11) + 0.1, sinkhorn.prototype_potential(teacher, COLD)
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = ibot_loss(
        plain, sinkhorn.balanced_targets(teacher, u, COLD), weights, student_temperature=WARM, total_crops=6
    )
    expected.backward()
    total = torch.zeros(())
    for part in (slice(0, 4), slice(4, 4), slice(4, 11)):
        loss = fused_ibot_loss(ours[part], teacher[part], u, weights[part], total_crops=6, **TEMPERATURES)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-6)


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    teacher = logits_of(4, 20, dtype, seed=1)
    pairs = torch.tensor([[0, 2], [-1, 3], [1, -1]])
    return logits_of(3, 20, dtype).requires_grad_(), teacher, sinkhorn.prototype_potential(teacher, COLD), pairs


def test_operators_are_well_formed() -> None:
    student, teacher, u, pairs = arguments()
    torch.library.opcheck(entropy.cross_entropy_of_rows, (student, teacher, u, pairs, WARM, COLD))
    sums = entropy.cross_entropy_of_rows(student.detach(), teacher, u, pairs, WARM, COLD)
    given = (student.detach(), teacher, u, pairs, *sums[1:], torch.ones(3), WARM, COLD)
    for operator, taken in (
        (entropy.cross_entropy_gradient, given),
        (potential.prototype_log_sums, (teacher, u, COLD)),
    ):
        torch.library.opcheck(operator, taken, test_utils=("test_schema", "test_faketensor"))  # no gradient of theirs


def loss_of(*given: Tensor) -> Tensor:
    return balanced_cross_entropy(*given, **TEMPERATURES).sum()


@pytest.mark.parametrize("how", ["compiled", "checkpointed", "autocast", "strided"])
def test_the_same_however_it_is_run(how: str) -> None:
    student, teacher, u, pairs = arguments(torch.bfloat16)
    expected = loss_of(student, teacher, u, pairs)
    (gradient_expected,) = torch.autograd.grad(expected, student)
    if how == "compiled":
        found = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(student, teacher, u, pairs)
    elif how == "checkpointed":
        found = checkpoint(loss_of, student, teacher, u, pairs, use_reentrant=False)
    elif how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss_of(student, teacher, u, pairs)
    else:
        found = loss_of(student.T.contiguous().T, teacher.T.contiguous().T, u, pairs.T.contiguous().T)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, student)[0], gradient_expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    student, teacher, u, pairs = arguments()
    student = student.detach()
    assert not loss_of(broken_row(student, value), teacher, u, pairs).isfinite()
    assert not loss_of(student, broken_row(teacher, value), u, pairs).isfinite()
    assert not potential.prototype_potential(broken_row(teacher, value), COLD).isfinite().all()


def broken_row(logits: Tensor, value: float) -> Tensor:
    broken = logits.clone()
    broken[1, 7] = value
    return broken


SMALL = DINOv3Settings(prototypes=48, head_hidden=32, head_bottleneck=16, teacher_temperature=COLD)


@pytest.mark.parametrize(
    "settings",
    [SMALL, replace(SMALL, balance="centering", ibot=IBOTSettings(head="shared"))],
    ids=["sinkhorn", "centering, one head"],
)
def test_a_step_equals_one_without_kernels(settings: DINOv3Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for fused in (False, True):
        objective = DINOv3(settings, fused=fused)
        of = networks(objective, 1, 2)
        state = {name: value + 0.1 for name, value in objective.first_state().items()}
        result = step(of, optimizer_of(of), objective, batch_of(objective, 2, 2), state=state)
        assert float(result.applied) == 1.0
        found.append((result.loss, gradient(of), *result.terms.values(), *state.values()))
        for name in ("dino_loss", "ibot_loss", "prototype_potential"):  # the fused step calls none of them
            monkeypatch.setattr(f"dinox_train.objectives.comparison.{name}", None)
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-6)


def test_every_architecture_has_its_launches() -> None:
    for arch in ARCHITECTURES:
        found = [*potential.launches(arch), *entropy.launches(arch)]
        assert len(found) == 6 + 12
        for launch in found:
            given = {*launch.signature, *launch.constants, *launch.tiles.sizes}
            assert given == set(launch.function.arg_names), launch.kernel


def test_counted_bytes() -> None:
    rows, prototypes = 2048, 4096
    size = rows * prototypes
    assert potential.traffic(rows, prototypes).bytes == pytest.approx(5 * 2 * size, rel=0.02)
    assert entropy.traffic(rows, rows, prototypes).bytes == pytest.approx((4 + 4 + 2) * size, rel=0.01)
    ours = potential.traffic(rows, prototypes) + entropy.traffic(rows, rows, prototypes)
    eager = potential.traffic_reference(rows, prototypes) + entropy.traffic_reference(rows, rows, prototypes)
    assert eager.bytes > 8 * ours.bytes


def pieces_that_do_not_fit() -> Sequence[Tensor]:
    return [logits_of(2, 5), logits_of(2, 6)]


def test_what_does_not_fit_is_refused() -> None:
    student, teacher, u, pairs = arguments()
    with pytest.raises(ValueError, match="power of two"):
        loss_of(student, teacher, u, torch.cat([pairs, pairs[:, :1]], dim=1))
    for wrong in (
        (student, teacher, u[:-1], pairs),
        (student, teacher.half(), u, pairs),
        (student, teacher, u, pairs[:2]),
        (student, teacher, u, pairs.int()),
    ):
        with pytest.raises(ValueError, match="needed"):
            loss_of(*wrong)
    with pytest.raises(ValueError, match="fp32, fp16 and bf16"):
        loss_of(student.double(), teacher.double(), u, pairs)
    with pytest.raises(ValueError, match="iterations"):
        potential.prototype_potential(teacher, COLD, 0)
    with pytest.raises(ValueError, match="K the same"):
        potential.prototype_potential(pieces_that_do_not_fit(), COLD)
    with pytest.raises(ValueError, match="no pairs"):
        fused_dino_loss(student, teacher, u, total_rows=1, num_student_views=1, num_teacher_views=1, **TEMPERATURES)
    with pytest.raises(ValueError, match="crops"):
        fused_ibot_loss(student, student.detach(), u, torch.ones(3), total_crops=0, **TEMPERATURES)


def test_without_triton_there_is_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(potential, "can_run_on", lambda device: False)
    with pytest.raises(RuntimeError, match="kernels=reference"):
        loss_of(*arguments())
