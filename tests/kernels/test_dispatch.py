"""Choosing kernels: a form that is wrong or does not run is never taken; of the right ones the fastest is."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor

import dinox_model
from dinox_model.execution import Execution, prepare, use
from dinox_model.kernels import choice, dispatch
from dinox_model.kernels.choice import (
    AttentionShape,
    FusedTrial,
    choose_attention,
    choose_fused,
    choose_network_kernels,
)
from dinox_model.kernels.dispatch import ATTENTION, REFERENCE, Kernels, attend, attend_packed, is_product
from dinox_model.kernels.language import can_run_on
from dinox_model.kernels.probe import clock_timer, fastest, try_forms

NEEDS_INTERPRETER = False
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = AttentionShape(images=2, tokens=9, heads=2, head_dim=64, dtype=torch.float32)
ON_CPU = ("reference", "sdpa-flash", "math")
SMALL = dinox_model.ViTConfig(width=64, num_layers=1, num_heads=2, mlp_hidden=64)


def packed(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((2, 9, 3, 2, 16), generator=torch.Generator().manual_seed(0)).to(dtype)


def fake_timer(seconds: Mapping[str, float]) -> Callable[..., Mapping[str, float]]:
    return lambda calls, device: {name: seconds[name] for name in calls}


# --- backends


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_are_softmax_of_products(backend: str, dtype: torch.dtype) -> None:
    qkv = packed(dtype)
    query, key, value = qkv.transpose(1, 3).unbind(2)
    expected = (query @ key.transpose(-1, -2) / math.sqrt(16)).softmax(-1) @ value
    torch.testing.assert_close(attend(query, key, value, backend), expected)
    torch.testing.assert_close(attend_packed(qkv, backend), expected.transpose(1, 2))


def test_a_backend_that_cannot_run_raises_instead_of_falling_back() -> None:
    with pytest.raises(RuntimeError):
        attend_packed(packed(), "sdpa-cudnn")


def test_flash_attn_is_found_and_called_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dispatch.has_flash_attn()
    with pytest.raises(RuntimeError, match="flash-attn is not installed"):
        attend_packed(packed(), "flash-attn")
    monkeypatch.setattr(dispatch, "_flash_attn", lambda: lambda qkv: attend_packed(qkv, "math"))
    assert torch.equal(attend_packed(packed(), "flash-attn"), attend_packed(packed(), "math"))


def test_kernels_know_their_names_and_lengths() -> None:
    kernels = Kernels(attention="math", attention_by_length=((9, "triton"), (4, "reference")))
    assert [kernels.attention_of(length) for length in (9, 4, 5)] == ["triton", "reference", "math"]
    assert [kernels.wants_packed(length) for length in (9, 4, 5)] == [True, False, False]
    assert Kernels(rotate="triton").wants_packed(4)
    with pytest.raises(ValueError, match="did you mean 'sdpa-flash'"):
        Kernels(attention="sdpa-flsh")
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        Kernels(attention_by_length=((9, "tritn"),))
    with pytest.raises(ValueError, match=r"kernels\.rotate"):
        Kernels(rotate="math")


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("aten::mm", True),
        ("aten::addmm.out", True),
        ("aten::_scaled_dot_product_flash_attention", True),
        ("dinox::attention", True),
        ("dinox::attention_backward", True),
        ("dinox::linear", True),
        ("dinox::rotate", False),
        ("aten::add.Tensor", False),
        ("aten::mm_of_mine", False),
    ],
)
def test_products_are_known_by_their_operators(operator: str, expected: bool) -> None:
    assert is_product(operator) is expected


# --- the trial


def plain(x: Tensor) -> Tensor:
    return x.square()


class Wrong(torch.autograd.Function):
    """Right outputs, wrong gradients."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0] * 0.5


def raises(x: Tensor) -> Tensor:
    raise RuntimeError("no such device\nand more")


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        (plain, None),
        (lambda x: x.double().square().float(), None),
        (lambda x: x.square() * 1.001, "wrong: error of the outputs"),
        (lambda x: x.bfloat16().square().float(), "wrong: error of the outputs"),
        (Wrong.apply, "wrong: error of the gradients"),
        (lambda x: x.square() * float("nan"), "wrong: error of the outputs"),
        (raises, "does not run: no such device"),
    ],
)
def test_a_wrong_form_is_found(form: Callable[[Tensor], Tensor], fault: str | None) -> None:
    (trial,) = try_forms({"form": form}, [torch.randn(100)], plain=plain)
    assert trial.fault is None if fault is None else (trial.fault or "").startswith(fault)
    assert (fastest([trial]) is None) is (fault is not None)


def test_forms_that_read_integers_are_compared_with_the_plain_one() -> None:
    forms = {"near": lambda x: x.float() + 1e-5, "far": lambda x: x.float() + 1e-2}
    near, far = try_forms(forms, [torch.arange(5)], plain=lambda x: x.float(), tolerance=1e-3)
    assert near.fault is None
    assert (far.fault or "").startswith("wrong")


def test_the_fastest_right_form_is_taken_and_a_tie_goes_to_the_earlier() -> None:
    forms = {"slow": plain, "fast": plain, "equal": plain, "wrong": lambda x: x}
    x = [torch.randn(10)]
    timer = fake_timer({"slow": 3.0, "fast": 1.0, "equal": 0.99})
    trials = try_forms(forms, x, plain=plain, full=x, timer=timer)
    best = fastest(trials)
    assert best is not None
    assert best.form == "fast"
    assert [trial.words() for trial in trials][:2] == ["slow: 3e+03 ms", "fast: 1e+03 ms"]
    assert "wrong" in trials[3].words()


def test_times_are_of_forward_and_backward() -> None:
    ran: list[str] = []
    x = torch.randn(4)
    x.requires_grad_().register_hook(lambda gradient: ran.append("backward"))
    seconds = clock_timer({"one": lambda: x.square().sum().backward()}, CPU)
    assert seconds["one"] > 0
    assert len(ran) == 17


# --- choices


def test_on_a_cpu_auto_is_torchs_own_without_any_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "try_forms", None)
    found = choose_attention("auto", SHAPE, CPU)
    assert (found.backend, found.warning) == ("reference", None)
    assert found.words() == (
        "kernels: attention 9 tokens: reference (auto: on a CPU nothing is faster; torch takes sdpa-flash)"
    )
    assert choose_fused("rotate", "auto", CPU, None).backend == "reference"


@pytest.mark.parametrize("backend", ["math", "sdpa-flash", "triton"])
def test_asked_for_by_name_a_backend_is_tried_and_taken(backend: str) -> None:
    if backend == "triton" and not can_run_on(CPU):
        pytest.skip("Triton is not installed, or does not interpret in this process")
    found = choose_attention(backend, SHAPE, CPU)
    assert found.backend == backend
    assert "as asked; right: errors" in found.reason


@pytest.mark.parametrize("backend", ["sdpa-cudnn", "flash-attn"])
def test_asked_for_by_name_a_backend_that_cannot_run_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"kernels\.attention={backend} \(attention 9 tokens\)|does not run"):
        choose_attention(backend, SHAPE, CPU)


def test_a_wrong_backend_is_refused_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "attend_packed", lambda qkv, backend: attend_packed(qkv, "math") * _off(backend))
    with pytest.raises(ValueError, match="wrong: error of the outputs"):
        choose_attention("triton", SHAPE, CPU)


def _off(backend: str) -> float:
    return 1.01 if backend == "triton" else 1.0


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        choose_attention("trition", SHAPE, CPU)
    with pytest.raises(ValueError, match="did you mean 'auto'"):
        choose_fused("rotate", "aut", CPU, None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose backends all run, as its torch would pick math; forms run on the CPU."""
    monkeypatch.setattr(choice, "attend_packed", lambda qkv, backend: attend_packed(qkv, "math"))
    monkeypatch.setattr(choice, "_attention_inputs", lambda shape, device: ([packed()], [packed()]))
    monkeypatch.setattr(choice, "_torchs_own", lambda shape, device: "math")
    monkeypatch.setattr(choice, "architecture", lambda device: "gfx1151")
    monkeypatch.setattr(choice, "can_run_on", lambda device: True)


TIMES = {"reference": 9.0, "sdpa-flash": 2.0, "sdpa-efficient": 3.0, "sdpa-cudnn": 4.0, "triton": 1.0}


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_auto_takes_the_fastest_and_says_all_times() -> None:
    found = choose_attention("auto", SHAPE, GPU, timer=fake_timer(TIMES))
    assert (found.backend, found.warning) == ("triton", None)
    assert all(f"{name}: {seconds * 1e3:.3g} ms" in found.reason for name, seconds in TIMES.items())
    slower = choose_attention("auto", SHAPE, GPU, timer=fake_timer(TIMES | {"triton": 1.99}))
    assert slower.backend == "sdpa-flash"


@pytest.mark.usefixtures("gpu")
def test_a_fall_to_math_is_a_warning_with_the_setting_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = fake_timer(TIMES | {"reference": 0.5})
    monkeypatch.delenv(choice.AOTRITON, raising=False)
    found = choose_attention("auto", SHAPE, GPU, timer=timer)
    assert "falls to the math path on gfx1151" in (found.warning or "")
    assert f"start with {choice.AOTRITON}=1" in (found.warning or "")
    monkeypatch.setenv(choice.AOTRITON, "1")
    assert "set precision=bf16" in (choose_attention("reference", SHAPE, GPU).warning or "")
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert "enable_flash_sdp(True)" in (choose_attention("reference", SHAPE, GPU).warning or "")
    monkeypatch.undo()


@pytest.mark.usefixtures("gpu")
def test_fused_kernels_are_taken_where_they_are_faster() -> None:
    trial = FusedTrial(forms={"reference": plain, "triton": plain}, small=[torch.randn(4)])
    fast, slow = (fake_timer({"reference": 1.0, "triton": seconds}) for seconds in (0.5, 1.0))
    assert choose_fused("rotate", "auto", GPU, trial, timer=fast).backend == "triton"
    assert choose_fused("rotate", "auto", GPU, trial, timer=slow).backend == "reference"
    wrong = FusedTrial(forms={"reference": plain, "triton": lambda x: x}, small=[torch.randn(4)])
    assert choose_fused("rotate", "auto", GPU, wrong, timer=fast).backend == "reference"
    with pytest.raises(ValueError, match=r"kernels\.rotate=triton"):
        choose_fused("rotate", "triton", GPU, wrong)
    assert choose_fused("rotate", "auto", GPU, None).reason == "this run has no use for the kernel"


def test_a_network_gets_a_backend_for_each_length() -> None:
    shapes = [SHAPE, AttentionShape(images=4, tokens=6, heads=2, head_dim=64, dtype=torch.float32)]
    wanted = {"attention": "math", "rotate": "reference", "residual_norm": "auto"}
    kernels, choices = choose_network_kernels(wanted, shapes, CPU)
    assert kernels == Kernels(attention="math", attention_by_length=((9, "math"), (6, "math")))
    assert [one.kernel for one in choices] == ["attention", "attention", "rotate", "residual_norm"]


# --- on a network


def gradients(model: dinox_model.VisionTransformer) -> list[Tensor]:
    model.zero_grad()
    out = model(torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))).patches
    out.square().sum().backward()
    return [out.detach(), *(part.grad for part in model.parameters() if part.grad is not None)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "execution",
    [Execution(), Execution(checkpointing="selective"), Execution(compile="blocks")],
    ids=["plain", "selective", "compiled"],
)
def test_a_chosen_backend_runs_however_the_network_runs(execution: Execution, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    model = dinox_model.build(SMALL)
    expected = gradients(model)
    assert use(model, Kernels(attention="math")) == 2
    prepare(model, execution)
    for found, plain_one in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, plain_one, rtol=1e-4, atol=1e-5)
    assert use(model, REFERENCE) == 2


def test_every_backend_has_a_way_to_be_called() -> None:
    assert set(ATTENTION) == {"reference", "triton", "flash-attn", *dispatch.SDPA}
