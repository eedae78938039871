"""AdamW, the teacher's average and the copies in one pass, against the plain update of the step."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dinox_model.kernels.architecture import ARCHITECTURES
from dinox_model.kernels.tiles import Tiles
from dinox_train.checkpoint import optimizer_tensors, restore_optimizer
from dinox_train.kernels import adamw_average
from dinox_train.kernels.adamw_average import OnePassAdamW, launches, traffic, traffic_reference
from dinox_train.objectives.dinov3 import DINOv3, DINOv3Settings
from dinox_train.optimizer import UpdatesInOnePass, clip_gradients, make_optimizer, set_group_values
from dinox_train.teacher import update_teacher
from dinox_train.working_weights import MasterWeights
from tests.train.small_step import AdamW, batch_of, networks, optimizer_of, step

ONE, MASKED = torch.tensor(1.0), torch.tensor(0.0)


@dataclass(frozen=True)
class Settings:
    beta1: float = 0.9
    beta2: float = 0.999
    layer_decay: float = 0.8
    patch_embed_scale: float = 0.2


class Small(nn.Module):
    """Parameters of the names, shapes and kinds that a network has; none of a size that tiles divide."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"patch_embed": nn.Linear(5, 7), "blocks": nn.ModuleList([nn.Linear(7, 9)]), "norm": nn.LayerNorm(9)}
        )
        self.heads = nn.ModuleDict(
            {
                "dino": nn.ModuleDict({"mlp": nn.Linear(9, 170), "last_layer": nn.Linear(170, 13, bias=False)}),
                "off": nn.ModuleDict({"mlp": nn.Linear(9, 3)}),
            }
        )
        self.backbone["norm"].bias.requires_grad_(False)


class Run:
    """A student, its teacher, and an optimizer, with gradients made up."""

    def __init__(self, precision: str, *, one_pass: bool) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            student = Small()
            teacher = copy.deepcopy(student).requires_grad_(False)
            with torch.no_grad():
                for parameter in teacher.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape)
        self.student, self.teacher = MasterWeights(student, precision), MasterWeights(teacher, precision)
        make = OnePassAdamW(self.student, self.teacher, Settings()) if one_pass else None
        self.optimizer = make or make_optimizer(self.student.named, Settings())
        self.updates = 0

    def update(
        self, applied: Tensor = ONE, *, by_part: bool = True, momentum: float = 0.9, off: bool = False
    ) -> Tensor:
        """The norm. off: the head of that name has a gradient too."""
        self.updates += 1
        random = torch.Generator().manual_seed(self.updates)
        set_group_values(self.optimizer, 1e-2 / self.updates, 0.04, last_layer_frozen=self.updates == 1)
        for name, parameter in self.student.named:
            parameter.grad = None
            if parameter.requires_grad and (off or "off" not in name):
                scale = 3.0 if self.updates % 2 else 1e-3  # clipped, and not
                parameter.grad = scale * torch.randn(parameter.shape, generator=random)
        if isinstance(self.optimizer, OnePassAdamW):
            norm = self.optimizer.clip(3.0, by_part=by_part)
            self.optimizer.update(momentum, applied)
        else:
            norm = clip_gradients(self.student.named, 3.0, by_part=by_part)
            self.optimizer.found_inf = 1.0 - applied  # type: ignore[attr-defined]
            self.optimizer.step()
            update_teacher(self.teacher.buffer, self.student.buffer, momentum, applied)
            for weights in (self.student, self.teacher):
                weights.refresh()
        return torch.stack(norm)

    def everything(self) -> dict[str, Tensor]:
        tensors = {f"optimizer.{key}": value for key, value in self.state().items()}
        for name, weights in (("student", self.student), ("teacher", self.teacher)):
            tensors |= {name: weights.buffer, f"{name}.copies": weights.copies}
        return tensors

    def state(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer, self.student.named)


def same(ours: Run, plain: Run) -> None:
    """To 1e-6; copies to one rounding in bf16."""
    expected = plain.everything()
    assert ours.everything().keys() == expected.keys()
    for name, value in ours.everything().items():
        narrow = value.dtype == torch.bfloat16
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1 / 128 if narrow else 1e-6, msg=name)


@pytest.mark.parametrize(("precision", "by_part"), [("fp32", False), ("bf16_weights", True)])
def test_twenty_updates_equal_the_plain_ones(precision: str, by_part: bool) -> None:
    ours, plain = Run(precision, one_pass=True), Run(precision, one_pass=False)
    for update in range(20):
        applied = MASKED if update in (0, 7) else ONE
        momentum = 0.3 if update == 5 else 0.99  # lerp's other branch
        norms = [run.update(applied, by_part=by_part, momentum=momentum, off=update > 12) for run in (ours, plain)]
        torch.testing.assert_close(norms[0], norms[1])
    same(ours, plain)
    assert bool(len(ours.student.copies)) == (precision == "bf16_weights")
    for weights in (ours.student, ours.teacher):
        assert torch.equal(weights.copies, weights.buffer[: len(weights.copies)].bfloat16())


def test_a_masked_update_changes_nothing() -> None:
    run = Run("bf16_weights", one_pass=True)
    run.update()
    before = {name: value.clone() for name, value in run.everything().items()}
    run.student.named[0][1].grad = None
    run.update(MASKED)
    for name, value in run.everything().items():
        assert torch.equal(value, before[name]), name


def test_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_average, "tiles_of", lambda *_: Tiles(sizes={"BLOCK": 128}))
    ours, plain = Run("bf16_weights", one_pass=True), Run("bf16_weights", one_pass=False)
    for run in (ours, plain):
        run.update()
    same(ours, plain)


@pytest.mark.parametrize("from_one_pass", [True, False])
def test_checkpoints_are_those_of_the_plain_optimizer(from_one_pass: bool) -> None:
    first, whole = Run("fp32", one_pass=from_one_pass), Run("fp32", one_pass=False)
    second = Run("fp32", one_pass=not from_one_pass)
    for run in (first, whole):
        run.update()
        run.update()
    restore_optimizer(second.optimizer, second.student.named, first.state())
    for theirs, kept in ((second.student, first.student), (second.teacher, first.teacher)):
        theirs.buffer.copy_(kept.buffer)
    second.updates = 2
    for run in (second, whole):
        run.update()
    same(second, whole)


@pytest.mark.parametrize("kind", ["transposed", "shifted"])
def test_gradients_that_lie_otherwise(kind: str) -> None:
    runs = [Run("fp32", one_pass=True) for _ in range(2)]
    for run, odd in zip(runs, (True, False), strict=True):
        set_group_values(run.optimizer, 1e-2, 0.0)
        for _, parameter in run.student.named:
            if not parameter.requires_grad:
                continue
            gradient = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
            if odd and kind == "transposed" and gradient.ndim == 2:
                gradient = gradient.T.contiguous().T
            elif odd and kind == "shifted":
                gradient = torch.cat([torch.zeros(1), gradient.flatten()])[1:].view(parameter.shape)
            parameter.grad = gradient
        assert isinstance(run.optimizer, OnePassAdamW)
        run.optimizer.clip(1e9, by_part=False)
        run.optimizer.update(0.9, ONE)
    for name, value in runs[0].everything().items():
        assert torch.equal(value, runs[1].everything()[name]), name


def test_the_step_takes_it() -> None:
    found = []
    for one_pass in (False, True):
        objective = DINOv3(DINOv3Settings(prototypes=16, head_hidden=16, head_bottleneck=8, teacher_temperature=0.05))
        of = networks(objective, 1, 2)
        if one_pass:
            optimizer = OnePassAdamW(of.student_weights, of.teacher_weights, AdamW())
            assert isinstance(optimizer, UpdatesInOnePass)
            set_group_values(optimizer, 1e-3, 0.0)
        else:
            optimizer = optimizer_of(of)
            assert not isinstance(optimizer, UpdatesInOnePass)
        result = step(of, optimizer, objective, batch_of(objective, 2))
        assert float(result.applied) == 1.0
        found.append((result.grad_norm, of.student_weights.buffer, of.teacher_weights.buffer))
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)


def test_networks_that_differ_are_refused() -> None:
    student, other = (MasterWeights(Small(), precision) for precision in ("fp32", "bf16_weights"))
    with pytest.raises(ValueError, match="another order"):
        OnePassAdamW(student, other, Settings())


def test_without_triton_there_is_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_average, "can_run_on", lambda device: False)
    with pytest.raises(RuntimeError, match="kernels=reference"):
        Run("fp32", one_pass=True)


def test_every_architecture_has_its_launch_and_bytes_are_counted() -> None:
    for arch in ARCHITECTURES:
        (launch,) = launches(arch)
        assert {*launch.signature, *launch.constants, *launch.tiles.sizes} == set(launch.function.arg_names)
    assert traffic(1000, 1000).bytes == 44_000
    assert traffic_reference(1000, 1000).bytes == 64_000
