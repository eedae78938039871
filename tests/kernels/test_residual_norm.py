"""Residual, LayerScale and norm in one pass: against the formula in fp64, forward and every gradient, in all dtypes."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinox_model.kernels import residual_norm as file
from dinox_model.kernels import residual_norm_kernels
from dinox_model.kernels.residual_norm import norm, norm_reference, residual_norm, residual_norm_reference
from tests.kernels.eager_traffic import eager_traffic

EPS = 1e-5
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """Inputs of one call, all random."""

    rows: int = 5
    width: int = 48
    kind: Literal["layer", "rms"] = "layer"
    gamma: bool = True
    bias: bool = True
    stream: torch.dtype = FP32
    data: torch.dtype = FP32
    """Of the residual and of y."""
    parameters: torch.dtype = FP32

    def tensors(self) -> list[Any]:
        """x, residual, gamma, weight, bias."""
        generator = torch.Generator().manual_seed(self.rows + self.width)

        def random(*shape: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
            return (torch.randn(shape, generator=generator) + mean).to(dtype).requires_grad_()

        vectors = [random(self.width, dtype=self.parameters) for _ in range(3)]
        x = random(self.rows, self.width, dtype=self.stream, mean=0.5)
        residual = random(self.rows, self.width, dtype=self.data)
        return [x, residual, vectors[0] if self.gamma else None, vectors[1], vectors[2] if self.bias else None]

    def results(self, function, *, exact: bool = False) -> list[Tensor]:
        """x', y, and the gradients of what there is, for fixed random gradients of x' and y."""
        tensors = self.tensors()
        if exact:
            tensors = [None if one is None else one.detach().double().requires_grad_() for one in tensors]
        dtype = FP64 if exact else self.data
        outputs = function(*tensors, eps=EPS, kind=self.kind, normed_dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        incoming = [torch.randn(out.shape, generator=generator).to(self.data).to(out.dtype) for out in outputs]
        inputs = [one for one in tensors if one is not None]
        return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, inputs, incoming)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((one.double() - right).abs().max()) for one, right in zip(found, exact, strict=True)]


def check(case: Case) -> None:
    """At most twice (forward) or three times (gradients) the error of the same in torch, each against fp64."""
    ours, torchs = case.results(residual_norm), case.results(residual_norm_reference)
    exact = case.results(residual_norm_reference, exact=True)
    assert [one.dtype for one in ours] == [one.dtype for one in torchs]
    pairs = list(zip(ours, exact, strict=True))
    # In fp32 either may be exact by chance: a few roundings of the largest number are allowed.
    floors = [(4e-7 if one.dtype == FP32 else 0.0) * float(right.abs().max()) for one, right in pairs]
    for number, (one, other, floor) in enumerate(zip(errors(ours, exact), errors(torchs, exact), floors, strict=True)):
        assert one <= (2 if number < 2 else 3) * other + floor, (case, number, one, other)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(
    ("stream", "data", "parameters"),
    [(FP32, FP32, FP32), (FP16, FP16, FP16), (BF16, BF16, BF16), (FP32, BF16, FP32), (BF16, BF16, FP32)],
)
def test_dtypes(stream: torch.dtype, data: torch.dtype, parameters: torch.dtype, kind: Literal["layer", "rms"]) -> None:
    check(Case(kind=kind, bias=kind == "layer", stream=stream, data=data, parameters=parameters))


@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 1200), st.booleans(), st.booleans(), st.sampled_from(["layer", "rms"]))
def test_any_shape_and_parts(rows: int, width: int, gamma: bool, bias: bool, kind: Literal["layer", "rms"]) -> None:
    check(Case(rows, width, kind, gamma, bias))


@pytest.mark.parametrize("width", [1536, 4096, 8192])
def test_wide_rows(width: int) -> None:
    check(Case(rows=3, width=width, data=BF16))


def test_one_dtype_rule_for_the_stream() -> None:
    x, residual, gamma, weight, bias = Case(stream=BF16, data=BF16).tensors()
    added, normed = residual_norm(x, residual, gamma, weight, bias, eps=EPS)
    assert added.dtype == normed.dtype == FP32, "gamma is fp32: torch's own sum would be fp32 too"
    added, normed = residual_norm(x, residual, None, weight, bias, eps=EPS)
    assert added.dtype == normed.dtype == BF16
    assert norm(x, weight, bias, eps=EPS, normed_dtype=FP32).dtype == FP32


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_alone(kind: Literal["layer", "rms"]) -> None:
    x, _, _, weight, bias = Case(rows=7, width=100).tensors()
    incoming = torch.randn(7, 100, generator=torch.Generator().manual_seed(2))
    found = norm(x, weight, bias, eps=EPS, kind=kind)
    wide = [one.detach().double().requires_grad_() for one in (x, weight, bias)]
    right = norm_reference(*wide, eps=EPS, kind=kind)
    assert max(errors([found.detach()], [right.detach()])) < 3e-6
    ours = torch.autograd.grad(found, (x, weight, bias), incoming)
    theirs = torch.autograd.grad(right, wide, incoming.double())
    assert max(errors(list(ours), list(theirs))) < 1e-5


def test_the_reference_is_torchs_norm() -> None:
    x, residual, gamma, weight, bias = Case().tensors()
    added, normed = residual_norm_reference(x, residual, gamma, weight, bias, eps=EPS)
    assert torch.equal(added, torch.addcmul(x, gamma, residual))
    assert torch.equal(normed, F.layer_norm(added, (48,), weight, bias, EPS))
    _, normed = residual_norm_reference(x, residual, None, weight, None, eps=EPS, kind="rms")
    assert torch.equal(normed, F.rms_norm(x + residual, (48,), weight, EPS))


@pytest.mark.parametrize("used", [0, 1])
def test_a_result_that_nobody_uses_has_no_gradient(used: int) -> None:
    tensors = [one for one in Case().tensors() if one is not None]
    found, right = (
        function(*tensors, eps=EPS)[used].square().sum() for function in (residual_norm, residual_norm_reference)
    )
    for ours, theirs in zip(
        torch.autograd.grad(found, tensors, allow_unused=True),
        torch.autograd.grad(right, tensors, allow_unused=True),
        strict=True,
    ):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            assert ours is not None
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_sums_over_rows_do_not_depend_on_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(rows=61, width=130)
    first, again = case.results(residual_norm), case.results(residual_norm)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    monkeypatch.setattr(residual_norm_kernels, "PROGRAMS", 3)  # several blocks of rows in each program
    exact = case.results(residual_norm_reference, exact=True)
    assert max(errors(case.results(residual_norm), exact)) < 2e-5


def test_rows_far_from_zero_keep_their_digits() -> None:
    x, _, _, weight, _ = Case(rows=4, width=256).tensors()
    far = x.detach() + 1000.0
    weight = weight.detach()
    right = norm_reference(far.double(), weight.double(), None, eps=EPS)
    assert max(errors([norm(far, weight, None, eps=EPS)], [right])) < 1e-3


def test_numerical_gradient() -> None:
    tensors = [one.detach().double().requires_grad_() for one in Case(3, 6).tensors()]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return residual_norm(*tensors, eps=EPS)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


def test_compiled_whole_and_under_autocast() -> None:
    weights = torch.randn(2, 48, 48, generator=torch.Generator().manual_seed(0)) / 7
    x, _, gamma, weight, bias = Case().tensors()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            residual = F.linear(norm(x, weight, bias, eps=EPS, normed_dtype=BF16), weights[0])
            x, normed = residual_norm(x, residual, gamma, weight, bias, eps=EPS, normed_dtype=BF16)
            assert (x.dtype, normed.dtype, residual.dtype) == (FP32, BF16, BF16)
            return (x + F.linear(normed, weights[1])).square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    (expected,), (found,) = torch.autograd.grad(run(x), x), torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", [Case(2, 8, data=BF16), Case(2, 8, "rms", gamma=False, bias=False)])
def test_operators_keep_torchs_rules(case: Case) -> None:
    x, residual, gamma, weight, bias = case.tensors()
    centred = case.kind == "layer"
    torch.library.opcheck(file._residual_norm, (x, residual, gamma, weight, bias, EPS, centred, case.data))
    torch.library.opcheck(file._norm, (x, weight, bias, EPS, centred, case.data))


def test_rows_anywhere_and_none() -> None:
    x, residual, gamma, weight, bias = Case(width=16).tensors()
    found = residual_norm(
        x.t().contiguous().t(), residual[:, None].expand(5, 2, 16)[:, 0], gamma, weight, bias, eps=EPS
    )
    expected = residual_norm(x, residual, gamma, weight, bias, eps=EPS)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    added, _ = residual_norm(x[:0], residual[:0], gamma, weight, bias, eps=EPS)
    (gradient,) = torch.autograd.grad(added.sum(), weight)
    assert added.shape == (0, 16)
    assert not gradient.any()


def test_what_is_refused() -> None:
    x, residual, gamma, weight, bias = Case(width=16).tensors()
    with pytest.raises(ValueError, match=r"residual \(5, 15\) must have x's shape, \(5, 16\)"):
        residual_norm(x, residual[:, 1:], gamma, weight, bias, eps=EPS)
    with pytest.raises(ValueError, match=r"weight must be \(16,\), not \(15,\)"):
        residual_norm(x, residual, gamma, weight[1:], bias, eps=EPS)
    with pytest.raises(ValueError, match="unknown kind 'layers'; did you mean 'layer'"):
        norm(x, weight, bias, eps=EPS, kind="layers")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int64"):
        norm(x.long(), weight, bias, eps=EPS)
    with pytest.raises(ValueError, match="no Triton kernel runs on meta"):
        norm(x.to("meta"), weight, bias, eps=EPS)
    with pytest.raises(ValueError, match=r"no tiles for .*, width 8193"):
        norm(torch.zeros(1, 8193), torch.ones(8193), None, eps=EPS)


@pytest.mark.parametrize("data", [FP32, BF16])
@pytest.mark.parametrize("backward", [False, True])
def test_traffic_of_eager_torch_is_counted(data: torch.dtype, backward: bool) -> None:
    """A block's residual and norm as it runs without kernels, under autocast where the data are narrower."""
    rows, width, size = 400, 64, data.itemsize
    x, residual, gamma, weight, bias = replace(Case(rows, width), data=data).tensors()

    def run() -> list[Tensor]:
        added = torch.addcmul(x, gamma, residual.to(x.dtype))
        return [added, F.layer_norm(added, (width,), weight, bias, EPS).to(data)]

    outputs = run()
    inputs = [one for one in (x, residual, gamma, weight, bias) if one is not None]
    incoming = [torch.ones_like(one) for one in outputs]
    counted = eager_traffic(lambda: torch.autograd.grad(outputs, inputs, incoming) if backward else run())
    stated = file.traffic_reference(rows, width, data_bytes=size, backward=backward)
    # The counter takes an operator for one pass; a norm's backward needs two (for dx, and for the parameters).
    second_pass = 2 * 4 * rows * width * backward
    assert abs(counted.bytes + second_pass - stated.bytes) < 0.02 * stated.bytes
    assert file.traffic(rows, width, data_bytes=size, backward=backward).bytes < counted.bytes
