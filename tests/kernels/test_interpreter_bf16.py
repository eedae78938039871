"""The patched interpreter's bfloat16 against torch's, bit for bit."""

from __future__ import annotations

import pytest
import torch

from dinox_model.kernels.language import kernel, tl

SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0039062, 1.0117188, 3.3961775e38, 1e-40, 65504.0]


@kernel
def _elementwise(x, y, narrow, product, quotient, exponential, chosen, less, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(x + at)
    b = tl.load(y + at)
    tl.store(narrow + at, a.to(tl.float32) * 1.0)
    tl.store(product + at, a * b + 0.5)
    tl.store(quotient + at, a - b)
    tl.store(exponential + at, tl.exp2(a.to(tl.float32)).to(tl.bfloat16))
    tl.store(chosen + at, tl.where(a < b, a, b))
    tl.store(less + at, (a < b) & (a > -1.0))


@kernel
def _product(x, y, out, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    at = rows * SIZE + columns
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@kernel
def _total(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), axis=0))


@kernel
def _cast(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


def test_operations_equal_torch_bit_for_bit() -> None:
    x, y = (torch.randn(64, generator=torch.Generator().manual_seed(seed)).bfloat16() * 3 for seed in (0, 1))
    narrow, product, quotient, exponential, chosen = (torch.empty_like(x) for _ in range(5))
    less = torch.empty(64, dtype=torch.bool)
    _elementwise[(1,)](x, y, narrow, product, quotient, exponential, chosen, less, BLOCK=64)
    assert torch.equal(narrow, x)
    assert torch.equal(product, x * y + 0.5)
    assert torch.equal(quotient, x - y)
    assert torch.equal(exponential, x.float().exp2().bfloat16())
    assert torch.equal(chosen, torch.where(x < y, x, y))
    assert torch.equal(less, (x < y) & (x > -1))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32])
def test_casts_round_to_nearest_even(source: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat((torch.tensor(SPECIAL), torch.randn(4096 - len(SPECIAL), generator=generator) * 1000))
    x = (values.nan_to_num(0, 0, 0) if source == torch.int32 else values).to(source)
    there = torch.empty(4096, dtype=torch.bfloat16)
    _cast[(1,)](x, there, BLOCK=4096)
    assert torch.equal(there.isnan(), x.isnan())  # which of the NaN patterns is free
    number = ~there.isnan()
    assert torch.equal(there.view(torch.int16)[number], x.bfloat16().view(torch.int16)[number])
    back = torch.empty(4096)
    _cast[(1,)](there, back, BLOCK=4096)
    assert torch.equal(back.view(torch.int32)[number], there.float().view(torch.int32)[number])


def test_products_accumulate_in_fp32() -> None:
    x, y = (torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    out = torch.empty(32, 32)
    _product[(1,)](x, y, out, SIZE=32)
    assert torch.allclose(out.double(), x.double() @ y.double(), atol=1e-5)


def test_sums_of_bf16_are_refused() -> None:
    x = torch.ones(256, dtype=torch.bfloat16)
    out = torch.empty(1)
    with pytest.raises(Exception, match="convert to float32 first"):
        _total[(1,)](x, out, BLOCK=256)
