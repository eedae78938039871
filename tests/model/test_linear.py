"""A Linear whose three products are routed: the same numbers, each under its own library; off is torch's Linear."""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dinox_model
from dinox_model.execution import Execution, prepare
from dinox_model.linear import OFF, Routes, linear, product, route

ROUTES = Routes(forward="cublaslt", grad_input="cublaslt", grad_weight="cublas")
ON_CPU = Routes(forward="cublas", grad_weight="cublas")
"""A torch without CUDA has the switch for this one only; products are the same."""
SMALL = dinox_model.ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64, qkv_bias="k_masked")


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """torch's switch as a recording fake: (library, shape of the product) of each product that ran."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    state = ["default"]

    def switch(library: str | None = None) -> str:
        if library is not None:
            state[0] = library
        return state[0]

    def recording(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def called(*matrices: torch.Tensor) -> torch.Tensor:
            out = run(*matrices)
            seen.append((state[0], tuple(out.shape)))
            return out

        return called

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", switch)
    monkeypatch.setattr(torch, "mm", recording(torch.mm))
    monkeypatch.setattr(torch, "addmm", recording(torch.addmm))
    yield seen
    assert state == ["default"], "the switch was not put back"


@pytest.mark.parametrize("with_bias", [True, False])
def test_each_product_runs_under_its_own_library(preferred: list, with_bias: bool) -> None:
    x = torch.randn(5, 7, 6, requires_grad=True)
    weight, bias = torch.randn(4, 6, requires_grad=True), torch.randn(4, requires_grad=True)
    linear(x, weight, bias if with_bias else None, ROUTES).sum().backward()
    assert preferred == [("cublaslt", (35, 4)), ("cublaslt", (35, 6)), ("cublas", (4, 6))]


def test_what_needs_no_gradient_is_not_computed(preferred: list) -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    linear(torch.randn(5, 6), weight, None, ROUTES).sum().backward()
    assert [shape for _, shape in preferred] == [(5, 4), (4, 6)]


def test_the_library_is_put_back_where_a_product_fails(preferred: list) -> None:
    with pytest.raises(RuntimeError):
        product(torch.randn(2, 3), torch.randn(4, 5), None, "cublas")
    assert torch.backends.cuda.preferred_blas_library() == "default"


def test_gradients_are_those_of_fp64_differences() -> None:
    x, weight = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    leaves = [part.requires_grad_() for part in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda x, weight, bias: linear(x, weight, bias, OFF), leaves)


@pytest.mark.parametrize("autocast", [True, False])
def test_it_is_torchs_linear(autocast: bool) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 7, 32), torch.randn(16, 32), torch.randn(16)
    found = []
    for run in (lambda x, weight, bias: linear(x, weight, bias, OFF), F.linear):
        leaves = [part.clone().requires_grad_() for part in inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = run(*leaves)
        out.float().square().sum().backward()
        found.append((out, *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if autocast else 1e-5, atol=2e-1 if autocast else 1e-5)


def test_opcheck() -> None:
    a, b, bias = torch.randn(3, 5), torch.randn(5, 4), torch.randn(4)
    torch.library.opcheck(product, (a, b, bias, "default"))
    torch.library.opcheck(product, (a, b, None, "default"))


def network() -> dinox_model.VisionTransformer:
    torch.manual_seed(0)
    return dinox_model.build(SMALL)


def results(model: dinox_model.VisionTransformer, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(images).patches
    out.square().sum().backward()
    return {"out": out.detach()} | {
        name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None
    }


def test_a_routed_network_computes_the_same_and_off_is_torchs_own(preferred: list) -> None:
    model, images = network(), torch.randn(2, 3, 32, 32)
    before = results(model, images)
    assert route(model, ROUTES) == 2 * 4
    routed = results(model, images)
    assert {library for library, _ in preferred} == {"cublas", "cublaslt"}
    preferred.clear()
    assert route(model, OFF) == 0
    assert not any("forward" in vars(module) for module in model.modules())
    after = results(model, images)
    assert preferred == []
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name, value in before.items():
        torch.testing.assert_close(routed[name], value, rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_routed_network_runs_its_own_weights() -> None:
    layer = nn.Linear(4, 4)
    route(layer, ON_CPU)
    other = copy.deepcopy(layer)
    nn.init.zeros_(other.weight)
    nn.init.zeros_(other.bias)
    with torch.no_grad():
        assert other(torch.ones(2, 4)).abs().max() == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "execution",
    [Execution(checkpointing="selective"), Execution(checkpointing="block"), Execution(compile="blocks")],
    ids=lambda one: f"{one.compile}-{one.checkpointing}",
)
def test_routed_under_checkpointing_and_compile(execution: Execution, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    model, images = network(), torch.randn(3, 3, 32, 32)
    expected = results(model, images)
    assert route(model, ON_CPU) == 8
    prepare(model, execution)
    found = results(model, images)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_an_unknown_library_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="cublaslt"):
        Routes(forward="cublastl")
