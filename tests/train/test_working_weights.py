"""Working weights: bf16_weights computes what bf16 does, bit for bit; masters are fp32, also masked, saved, resumed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dinox_model
from dinox_train.optimizer import clip_gradients, make_optimizer, set_group_values
from dinox_train.platform import autocast
from dinox_train.teacher import update_teacher
from dinox_train.working_weights import ALIGNMENT, MasterWeights

SETTINGS = SimpleNamespace(beta1=0.9, beta2=0.999, layer_decay=0.9, patch_embed_scale=0.2)
CONFIG = dinox_model.ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64, layer_scale=0.5)
CPU = torch.device("cpu")
PRECISIONS = ["fp32", "bf16", "bf16_weights"]


class Small(nn.Module):
    """Names as in a run: backbone.…, heads.NAME.…"""

    def __init__(self, seed: int, config: dinox_model.ViTConfig = CONFIG) -> None:
        super().__init__()
        self.backbone = dinox_model.build(config, seed=seed)
        self.heads = nn.ModuleDict({"dino": dinox_model.PrototypeHead(32, 48, 16, 24, seed=seed + 1)})

    def forward(self, images: Tensor) -> Tensor:
        return self.heads["dino"](self.backbone(images).cls)


def images(seed: int, side: int = 32) -> Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(seed))


class Run:
    """Student, teacher and optimizer at a precision; `update` is a step in small."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.student = MasterWeights(Small(0), precision)
        self.teacher = MasterWeights(Small(0).requires_grad_(False), precision)
        self.optimizer = make_optimizer(self.student.named, SETTINGS)
        set_group_values(self.optimizer, 1e-2, 0.1)

    def gradients(self, number: int, micro_batches: int = 3) -> None:
        self.student.zero_gradients()
        for part in range(micro_batches):
            with autocast(CPU, self.precision):
                aim = self.teacher.network(images(100 * number + part))
                seen = self.student.network(images(100 * number + part + 50))
                seen = seen + self.student.network(images(number + part, side=16))  # two forwards, one backward
            (seen.float() - aim.float()).square().mean().backward()
            self.student.gather_gradients()

    def update(self, number: int, applied: float = 1.0) -> None:
        self.gradients(number)
        clip_gradients(self.student.named, 3.0, by_part=True)
        self.optimizer.found_inf = 1.0 - torch.tensor(applied)  # type: ignore[attr-defined]
        self.optimizer.step()
        update_teacher(self.teacher.buffer, self.student.buffer, 0.9, torch.tensor(applied))
        self.student.refresh()
        self.teacher.refresh()

    def everything(self) -> dict[str, Tensor]:
        tensors = {f"student.{name}": value.clone() for name, value in self.student.state_dict().items()}
        tensors |= {f"teacher.{name}": value.clone() for name, value in self.teacher.state_dict().items()}
        for name, parameter in self.student.named:
            tensors |= {f"{kind}.{name}": value.clone() for kind, value in self.optimizer.state[parameter].items()}
        return tensors


def equal(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def copies_of(weights: MasterWeights) -> dict[str, nn.Parameter]:
    return {name: value for name, value in weights.network.named_parameters() if value.dtype == torch.bfloat16}


def test_bf16_weights_are_bf16_without_its_casts_bit_for_bit() -> None:
    plain, copied = Run("bf16"), Run("bf16_weights")
    for number in range(3):
        plain.update(number)
        copied.update(number)
        assert equal(plain.everything(), copied.everything())
    assert not equal(plain.everything(), Run("bf16").everything())


def test_what_products_read_is_bf16_and_nothing_else() -> None:
    weights = MasterWeights(Small(0), "bf16_weights")
    linears = {
        f"{path}.{name}"
        for path, module in weights.network.named_modules()
        if isinstance(module, nn.Linear)
        for name, _ in module.named_parameters(recurse=False)
    }
    assert set(copies_of(weights)) == linears
    assert "backbone.patch_embed.weight" in linears
    assert "heads.dino.last_layer.weight" in linears
    others = {name: value for name, value in weights.network.named_parameters() if name not in linears}
    assert {value.dtype for value in others.values()} == {torch.float32}
    assert any(".norm1." in name for name in others)


def test_the_physical_scale_has_copies_too_and_computes_what_bf16_does() -> None:
    config = dinox_model.ViTConfig(width=32, num_layers=1, num_heads=2, mlp_hidden=64, scale_conditioning=True)
    found = []
    for precision in ("bf16", "bf16_weights"):
        weights = MasterWeights(Small(0, config), precision)
        with torch.no_grad():
            for name, parameter in weights.named:
                if ".scale.down." in name:
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        weights.refresh()
        assert bool([name for name in copies_of(weights) if ".scale." in name]) == (precision == "bf16_weights")
        with autocast(CPU, precision):
            found.append(weights.network.backbone(images(0), mm_per_pixel=torch.full((3, 2), 0.7)).cls)
    assert torch.equal(*found)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_masters_are_the_networks_parameters_in_one_buffer(precision: str) -> None:
    plain, network = Small(0), Small(0)
    before = {name: id(parameter) for name, parameter in network.named_parameters()}
    weights = MasterWeights(network, precision)
    assert {name: id(parameter) for name, parameter in weights.named} == before
    start, end = weights.buffer.data_ptr(), weights.buffer.data_ptr() + weights.buffer.nbytes
    total = 0
    for (name, parameter), wanted in zip(weights.named, plain.parameters(), strict=True):
        assert torch.equal(parameter, wanted), name
        assert start <= parameter.data_ptr() < end
        assert (parameter.data_ptr() - start) % (4 * ALIGNMENT) == 0
        total += parameter.numel()
    assert total <= len(weights.buffer) < total + ALIGNMENT * len(weights.named)
    weights.buffer.zero_()
    weights.refresh()
    assert all(not parameter.any() for parameter in network.parameters())


def test_copies_follow_their_masters() -> None:
    weights = MasterWeights(Small(0), "bf16_weights")
    masters, copies = dict(weights.named), copies_of(weights)
    with torch.no_grad():
        weights.buffer.add_(0.001)
    assert not torch.equal(copies["heads.dino.mlp.0.weight"], masters["heads.dino.mlp.0.weight"].bfloat16())
    weights.refresh()
    assert all(torch.equal(copy, masters[name].bfloat16()) for name, copy in copies.items())


def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    """The pathology: a thousand gradients of one size, added in bf16, stand still long before the end."""
    weights = MasterWeights(Small(0), "bf16_weights")
    name, copy = next(iter(copies_of(weights).items()))
    in_bf16 = torch.zeros_like(copy)
    weights.zero_gradients()
    for _ in range(1000):
        copy.grad = torch.full_like(copy, 0.01)
        in_bf16 += copy.grad
        weights.gather_gradients()
    gradient = dict(weights.named)[name].grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1000 * float(torch.tensor(0.01).bfloat16())))
    assert float(in_bf16.float().mean()) < 0.6 * float(gradient.mean())
    assert copy.grad is None
    weights.zero_gradients()
    assert all(parameter.grad is None for parameter in (*dict(weights.named).values(), *weights.network.parameters()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_masked_update_leaves_masters_copies_and_moments(precision: str) -> None:
    run = Run(precision)
    for number in range(2):
        run.update(number)
    before = run.everything()
    copies = [parameter.clone() for parameter in run.student.network.parameters()]
    run.gradients(7)
    for _, parameter in run.student.named:
        if parameter.grad is not None:
            parameter.grad.fill_(torch.nan)
    assert not clip_gradients(run.student.named, 3.0, by_part=True).norm.isfinite()
    run.optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    run.optimizer.step()
    update_teacher(run.teacher.buffer, run.student.buffer, 0.9, torch.tensor(0.0))
    run.student.refresh()
    assert equal(before, run.everything())
    assert all(torch.equal(a, b) for a, b in zip(copies, run.student.network.parameters(), strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(precision: str) -> None:
    whole, first, second = Run(precision), Run(precision), Run(precision)
    for number in range(4):
        whole.update(number)
        if number < 2:
            first.update(number)
    kept = first.everything()
    assert {value.dtype for value in kept.values()} == {torch.float32}
    for weights, name in ((second.student, "student."), (second.teacher, "teacher.")):
        weights.load_state_dict({key.removeprefix(name): kept[key] for key in kept if key.startswith(name)})
    for name, parameter in second.student.named:
        state = {kind: kept[f"{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq") if f"{kind}.{name}" in kept}
        if state:
            second.optimizer.state[parameter] = {kind: value.clone() for kind, value in state.items()}
    for number in range(2, 4):
        second.update(number)
    assert equal(whole.everything(), second.everything())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_networks_are_saved_in_fp32_and_read_back(precision: str, tmp_path: Path) -> None:
    weights = MasterWeights(Small(3), precision)
    with weights.in_network() as network:
        assert {value.dtype for value in weights.state_dict().values()} == {torch.float32}  # enters it again
        dinox_model.save(network.backbone, tmp_path / "saved")
    assert bool(copies_of(weights)) == (precision == "bf16_weights")
    source = dinox_model.load(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), Small(3).backbone.parameters(), strict=True))
    other = MasterWeights(Small(4), precision)
    with other.in_network() as network:
        network.backbone.load_state_dict(source.state_dict())
    masters = dict(other.named)
    assert all(torch.equal(masters[f"backbone.{name}"], value) for name, value in source.named_parameters())
    for name, parameter in other.network.named_parameters():
        assert torch.equal(parameter, masters[name].to(parameter.dtype)), name  # copies too


def test_a_frozen_teacher_has_no_gradients() -> None:
    weights = MasterWeights(Small(0).requires_grad_(False), "bf16_weights")
    assert not any(parameter.requires_grad for parameter in weights.network.parameters())
    with autocast(CPU, "bf16_weights"):
        assert not weights.network(images(0)).requires_grad


def test_masters_must_be_fp32() -> None:
    with pytest.raises(ValueError, match=r"backbone\.cls_token is torch\.float64"):
        MasterWeights(Small(0).double(), "fp32")


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    weights = MasterWeights(Small(0).cuda(), "bf16_weights")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            for copy in copies_of(weights).values():
                copy.grad = torch.ones_like(copy)
            weights.gather_gradients()
        weights.refresh()
        update_teacher(weights.buffer, weights.buffer, 0.9, torch.ones((), device="cuda"))
        clip_gradients(weights.named, 3.0, by_part=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_whole_runs_a_heads_first_start_among_them(train: Callable[..., int], tmp_path: Path) -> None:
    """Checkpoints of bf16 and bf16_weights are the same bytes; a frozen backbone stays, but for its patch embedding."""
    short = ("train.updates=1", "train.accumulation=2", "evaluate.windows=4")
    for precision in ("bf16", "bf16_weights"):
        assert train(tmp_path / precision, f"precision={precision}", *short) == 0
    checkpoint = "checkpoints/step-00000001"
    files = ("model", "train/student", "train/optimizer", "train/teacher_heads")
    for file in files:
        plain, copied = ((tmp_path / name / checkpoint / f"{file}.safetensors") for name in ("bf16", "bf16_weights"))
        assert plain.read_bytes() == copied.read_bytes(), file

    start = tmp_path / "bf16" / checkpoint
    frozen = (f"run.init_from={start}", "optimizer.backbone_frozen_updates=1")
    assert train(tmp_path / "warm", *frozen, *short) == 0
    before = load_file(start / "model.safetensors")
    after = load_file(tmp_path / "warm" / checkpoint / "train" / "student.safetensors")
    moved = {name for name, value in before.items() if not torch.equal(value, after[f"backbone.{name}"])}
    assert moved == {"patch_embed.weight", "patch_embed.bias"}
