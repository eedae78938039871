"""The teacher's moving average: its closed form, small changes, and nothing at all where an update is masked."""

import pytest
import torch
from torch import Tensor

from dinox_train import teacher as teacher_module
from dinox_train.teacher import update_teacher

APPLIED, MASKED = torch.tensor(1.0), torch.tensor(0.0)


def parameters(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (2, 2, 2), ())]


def test_one_update_is_the_average() -> None:
    teacher, student = parameters(0), parameters(1)
    expected = [0.9 * t.double() + 0.1 * s.double() for t, s in zip(teacher, student, strict=True)]
    update_teacher(teacher, student, 0.9, APPLIED)
    for got, wanted in zip(teacher, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.9996, 1.0])
def test_a_teacher_that_equals_the_student_stays_there(momentum: float) -> None:
    teacher, student = parameters(0), parameters(0)
    for _ in range(100):
        update_teacher(teacher, student, momentum, APPLIED)
    assert all(torch.equal(t, s) for t, s in zip(teacher, student, strict=True))


@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_a_masked_update_changes_nothing(scale: float) -> None:
    teacher, student = parameters(0), [scale * tensor for tensor in parameters(1)]
    before = [tensor.clone() for tensor in teacher]
    update_teacher(teacher, student, 0.9, MASKED)
    assert all(torch.equal(t.view(torch.int32), b.view(torch.int32)) for t, b in zip(teacher, before, strict=True))


def test_momentum_one_changes_nothing() -> None:
    teacher = parameters(0)
    update_teacher(teacher, parameters(1), 1.0, APPLIED)
    assert all(torch.equal(t, b) for t, b in zip(teacher, parameters(0), strict=True))


def test_small_changes_do_not_vanish() -> None:
    """A student one part in a thousand away is approached by its closed form, over a thousand updates of 1e-6 each."""
    teacher, student = [torch.ones(1000)], [torch.full((1000,), 1.001)]
    for update in range(1, 1001):
        update_teacher(teacher, student, 0.999, APPLIED)
        if update in (1, 100, 1000):
            moved, expected = float(teacher[0].double().mean()) - 1, 1e-3 * (1 - 0.999**update)
            assert moved == pytest.approx(expected, rel=0.06)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = parameters(0), parameters(0)
    update_teacher(whole, parameters(1), 0.9, APPLIED)
    monkeypatch.setattr(teacher_module, "CHUNK_BYTES", 30)
    update_teacher(cut, parameters(1), 0.9, APPLIED)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_the_student_is_left_alone_and_no_gradient_flows() -> None:
    teacher, student = parameters(0), [tensor.requires_grad_() for tensor in parameters(1)]
    update_teacher(teacher, student, 0.9, APPLIED)
    assert all(torch.equal(a, b) for a, b in zip(student, parameters(1), strict=True))
    assert not any(tensor.requires_grad for tensor in teacher)


def test_the_host_never_reads_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read by the host")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    update_teacher(parameters(0), parameters(1), 0.9, APPLIED)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="same shapes"):
        update_teacher(parameters(0), parameters(1)[:-1], 0.9, APPLIED)
    with pytest.raises(ValueError, match="fp32"):
        update_teacher([tensor.bfloat16() for tensor in parameters(0)], parameters(1), 0.9, APPLIED)
