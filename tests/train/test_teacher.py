"""The teacher's moving average: its closed form, small changes, and nothing at all where an update is masked."""

import pytest
import torch
from torch import Tensor

from dinox_train.teacher import update_teacher

APPLIED, MASKED = torch.tensor(1.0), torch.tensor(0.0)


def parameters(seed: int) -> Tensor:
    return torch.randn(1003, generator=torch.Generator().manual_seed(seed))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.9996])
def test_one_update_is_the_average(momentum: float) -> None:
    teacher, student = parameters(0), parameters(1)
    expected = momentum * teacher.double() + (1 - momentum) * student.double()
    update_teacher(teacher, student, momentum, APPLIED)
    torch.testing.assert_close(teacher.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.9996, 1.0])
def test_a_teacher_that_equals_the_student_stays_there(momentum: float) -> None:
    teacher = parameters(0)
    for _ in range(100):
        update_teacher(teacher, parameters(0), momentum, APPLIED)
    assert torch.equal(teacher, parameters(0))


@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_a_masked_update_changes_nothing(scale: float) -> None:
    teacher = parameters(0)
    update_teacher(teacher, scale * parameters(1), 0.9, MASKED)
    assert torch.equal(bits(teacher), bits(parameters(0)))


def test_momentum_one_changes_nothing() -> None:
    teacher = parameters(0)
    update_teacher(teacher, parameters(1), 1.0, APPLIED)
    assert torch.equal(bits(teacher), bits(parameters(0)))


def test_small_changes_do_not_vanish() -> None:
    """A student one part in a thousand away is approached by its closed form, over a thousand updates of 1e-6 each."""
    teacher, student = torch.ones(1000), torch.full((1000,), 1.001)
    for update in range(1, 1001):
        update_teacher(teacher, student, 0.999, APPLIED)
        if update in (1, 100, 1000):
            moved, expected = float(teacher.double().mean()) - 1, 1e-3 * (1 - 0.999**update)
            assert moved == pytest.approx(expected, rel=0.06)


def test_a_teacher_in_bf16_would_stand_still_for_ever() -> None:
    """The pathology that the refusal of other dtypes prevents, and that fp32 has not."""
    student = torch.full((100,), 1.05)
    ours, bf16 = torch.ones(100), torch.ones(100, dtype=torch.bfloat16)
    for _ in range(2000):
        update_teacher(ours, student, 0.994, APPLIED)
        bf16.lerp_(student.bfloat16(), 1 - 0.994)
    assert torch.equal(bf16, torch.ones_like(bf16))
    torch.testing.assert_close(ours, student, rtol=1e-4, atol=0)


def test_the_student_is_left_alone_and_no_gradient_flows() -> None:
    teacher, student = parameters(0), parameters(1).requires_grad_()
    update_teacher(teacher, student, 0.9, APPLIED)
    assert torch.equal(student, parameters(1))
    assert not teacher.requires_grad


def test_the_host_never_reads_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read by the host")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    update_teacher(parameters(0), parameters(1), 0.9, APPLIED)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        update_teacher(parameters(0), parameters(1)[:-1], 0.9, APPLIED)
    with pytest.raises(ValueError, match="must be fp32"):
        update_teacher(parameters(0).bfloat16(), parameters(1), 0.9, APPLIED)
