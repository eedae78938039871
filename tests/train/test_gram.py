"""Gram anchoring against loops over pairs of patches, in all of its forms, and its rounding where both sides agree."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinox_train.objectives import gram as module
from dinox_train.objectives.gram import NEGATIVES, gram_loss, resize_features, take_patches


def random_patches(*shape: int, seed: int = 0, shared: float = 0.5) -> Tensor:
    """Patches with something in common, as an image's have."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random) + shared * torch.randn(shape[-1], generator=random)).double()


def loop_over_pairs(student: Tensor, teacher: Tensor, negatives: str, tokens: Tensor | None = None) -> Tensor:
    total = torch.zeros((), dtype=student.dtype)
    for crop in range(len(student)):
        chosen = [j for j in range(student.shape[1]) if tokens is None or tokens[crop, j]]
        for i in chosen:
            for j in chosen:
                ours = torch.cosine_similarity(student[crop, i], student[crop, j], dim=0)
                theirs = torch.cosine_similarity(teacher[crop, i], teacher[crop, j], dim=0)
                if negatives != "keep":
                    theirs = theirs.clamp(min=0)
                if negatives == "clamp_both":
                    ours = ours.clamp(min=0)
                total = total + (ours - theirs) ** 2 / len(chosen) ** 2
    return total / len(student)


@settings(max_examples=40, deadline=None)
@given(
    crops=st.integers(1, 3),
    n=st.integers(1, 9),
    d=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    negatives=st.sampled_from(NEGATIVES),
    subset=st.booleans(),
)
def test_equals_the_loop_with_its_gradient(
    crops: int, n: int, d: int, seed: int, negatives: module.Negatives, subset: bool
) -> None:
    student = random_patches(crops, n, d, seed=seed).requires_grad_()
    teacher = random_patches(crops, n, d, seed=seed + 1)
    tokens = torch.rand(crops, n, generator=torch.Generator().manual_seed(seed)) < 0.6 if subset else None
    ours = gram_loss(student, teacher, negatives=negatives, tokens=tokens)
    slow = loop_over_pairs(student, teacher, negatives, tokens)
    torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-13)
    if slow.requires_grad:
        gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, slow)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("n", "d"), [(4, 5), (16, 3)])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_gradcheck(n: int, d: int, negatives: module.Negatives) -> None:
    student, teacher = random_patches(2, n, d).requires_grad_(), random_patches(2, n, d, seed=1)
    assert torch.autograd.gradcheck(lambda patches: gram_loss(patches, teacher, negatives=negatives), (student,))


def both_forms(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    s, g = (module.directions(patches) for patches in (student, teacher))
    n = student.shape[1]
    return (
        module._of_similarities(s - g, s + g).sum() / n**2,
        module._of_features(s - g, s + g).sum() / n**2,
    )


@pytest.mark.parametrize(("n", "d"), [(4, 7), (7, 7), (64, 8), (100, 33)])
def test_feature_space_and_patch_space_are_one_loss(n: int, d: int) -> None:
    student, teacher = random_patches(3, n, d).requires_grad_(), random_patches(3, n, d, seed=1)
    of_similarities, of_features = both_forms(student, teacher)
    torch.testing.assert_close(of_similarities, of_features, rtol=1e-11, atol=0)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (of_similarities, of_features)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("n", "d", "form"), [(256, 32, "_of_features"), (64, 32, "_of_similarities")])
def test_the_cheaper_form_runs(n: int, d: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = getattr(module, form)
    monkeypatch.setattr(module, form, lambda *parts: called.append(form) or original(*parts))
    gram_loss(random_patches(1, n, d), random_patches(1, n, d, seed=1))
    assert called == [form]


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-3, 1e-4])
def test_no_cancellation_where_student_and_teacher_nearly_agree(distance: float) -> None:
    teacher = random_patches(2, 256, 32).float()
    student = (teacher + distance * random_patches(2, 256, 32, seed=1, shared=0).float()).requires_grad_()
    exact = student.detach().double().requires_grad_()
    reference = both_forms(exact, teacher.double())[0]
    reference.backward()
    loss = gram_loss(student, teacher, total_crops=1)  # the form in feature space
    loss.backward()
    # fp32 rounds directions by 1e-7, so e = s - g by 1e-7 / distance of itself.
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=2e-6 + 1e-6 / distance)
    assert (student.grad - exact.grad).norm() / exact.grad.norm() < 1e-5 + 1e-6 / distance
    s, g = module.directions(student.detach()), module.directions(teacher)
    expanded = sum(
        factor * (a.transpose(1, 2) @ b).square().sum() for factor, a, b in ((1, s, s), (-2, s, g), (1, g, g))
    )
    if distance < 1e-2:
        wrong = abs(float(expanded) / 256**2 - float(reference.detach()))
        assert wrong > 20 * abs(float(loss.detach()) - float(reference.detach()))


def test_the_same_similarities_are_no_loss() -> None:
    teacher = random_patches(2, 64, 8)
    assert float(gram_loss(teacher, teacher)) == 0.0
    assert float(gram_loss(3 * teacher, teacher)) < 1e-25
    turn, _ = torch.linalg.qr(random_patches(8, 8, seed=3))
    for patches in (teacher, teacher.float()):
        rotated = gram_loss(patches @ turn.to(patches.dtype), patches)
        assert 0 <= float(rotated) < (1e-6 if patches.dtype == torch.float32 else 1e-15)


def test_negatives_by_hand() -> None:
    student = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])  # similarity -1
    opposed = torch.tensor([[[1.0, 0.0], [-0.5, math.sqrt(0.75)]]])  # similarity -0.5
    assert float(gram_loss(student, opposed)) == pytest.approx(0.5**2 / 2)
    assert float(gram_loss(student, opposed, negatives="clamp_teacher")) == pytest.approx(1.0 / 2)
    assert float(gram_loss(student, opposed, negatives="clamp_both")) == 0.0


def test_a_subset_counts_as_if_the_others_were_not_there() -> None:
    student, teacher = random_patches(2, 12, 5), random_patches(2, 12, 5, seed=1)
    indices = torch.tensor([[0, 3, 7, 11], [2, 3, 4, 9]])
    tokens = torch.zeros(2, 12, dtype=torch.bool).scatter(1, indices, True)
    taken = [take_patches(patches, indices) for patches in (student, teacher)]
    assert taken[0].shape == (2, 4, 5)
    assert torch.equal(taken[0][1, 3], student[1, 9])
    for negatives in NEGATIVES:
        masked = gram_loss(student, teacher, negatives=negatives, tokens=tokens)
        torch.testing.assert_close(gram_loss(*taken, negatives=negatives), masked)


def test_a_crop_without_a_chosen_patch_adds_nothing() -> None:
    student, teacher = random_patches(2, 6, 4).requires_grad_(), random_patches(2, 6, 4, seed=1)
    tokens = torch.zeros(2, 6, dtype=torch.bool)
    nothing = gram_loss(student, teacher, tokens=tokens)
    nothing.backward()
    assert float(nothing.detach()) == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))
    tokens[0] = True
    first = gram_loss(student, teacher, tokens=tokens, total_crops=1)
    torch.testing.assert_close(first, gram_loss(student[:1], teacher[:1]))


def test_micro_batches_add_up_to_the_batch_and_none_is_no_loss() -> None:
    student, teacher = random_patches(6, 8, 4).requires_grad_(), random_patches(6, 8, 4, seed=1)
    whole = gram_loss(student, teacher)
    (expected,) = torch.autograd.grad(whole, student)
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 1), slice(1, 1), slice(1, 6)):
        loss = gram_loss(student[part], teacher[part], total_crops=6)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(student.grad, expected)


def test_autocast_does_not_reach_the_products_and_the_teacher_gets_no_gradient() -> None:
    student = random_patches(2, 96, 16).float().requires_grad_()
    teacher = random_patches(2, 96, 16, seed=1).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gram_loss(student, teacher)
    assert torch.equal(inside, gram_loss(student, teacher))
    inside.backward()
    assert teacher.grad is None
    assert gram_loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def cubic_weight(distance: float) -> float:
    """Keys' kernel (IEEE ASSP 29, 1981), a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resize_one_axis(values: list[Tensor], size: int) -> list[Tensor]:
    scale, last = len(values) / size, len(values) - 1
    resized = []
    for place in range(size):
        centre = (place + 0.5) * scale - 0.5
        first = math.floor(centre) - 1
        weighted = [
            cubic_weight(centre - source) * values[min(max(source, 0), last)] for source in range(first, first + 4)
        ]
        resized.append(torch.stack(weighted).sum(dim=0))
    return resized


@pytest.mark.parametrize(("grid", "new_grid"), [((8, 8), (4, 4)), ((6, 4), (3, 5)), ((2, 3), (5, 7)), ((1, 1), (2, 2))])
def test_resizing_equals_the_cubic_kernel_without_antialiasing(
    grid: tuple[int, int], new_grid: tuple[int, int]
) -> None:
    patches = random_patches(2, grid[0] * grid[1], 3)
    resized = resize_features(patches, grid, new_grid)
    assert resized.shape == (2, new_grid[0] * new_grid[1], 3)
    for crop in range(2):
        rows = list(patches[crop].view(*grid, 3))
        rows = resize_one_axis(rows, new_grid[0])
        slow = torch.stack([torch.stack(resize_one_axis(list(row), new_grid[1])) for row in rows])
        torch.testing.assert_close(resized[crop].view(*new_grid, 3), slow)


def test_resizing_is_fp32_and_keeps_a_grid_that_fits() -> None:
    patches = random_patches(1, 6, 4).bfloat16()
    assert torch.equal(resize_features(patches, (2, 3), (2, 3)), patches.float())
    assert resize_features(patches, (2, 3), (4, 6)).dtype == torch.float32


def test_features_are_resized_before_they_get_length_one() -> None:
    """The other order is another target: an average of directions forgets which patch was the stronger."""
    teacher = random_patches(1, 16, 4) * torch.linspace(0.1, 3, 16, dtype=torch.float64)[:, None]
    student = resize_features(teacher, (4, 4), (2, 2))
    assert float(gram_loss(student, resize_features(teacher, (4, 4), (2, 2)))) < 1e-25
    assert float(gram_loss(student, resize_features(module.directions(teacher), (4, 4), (2, 2)))) > 1e-3


def test_what_does_not_fit_is_refused() -> None:
    patches = torch.ones(2, 6, 4)
    with pytest.raises(ValueError, match="resize"):
        gram_loss(patches, torch.ones(2, 24, 4))
    with pytest.raises(ValueError, match="negatives"):
        gram_loss(patches, patches, negatives="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens"):
        gram_loss(patches, patches, tokens=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="tokens"):
        gram_loss(patches, patches, tokens=torch.ones(2, 6))
    with pytest.raises(ValueError, match="not \\(c"):
        resize_features(patches, (2, 2), (4, 4))
