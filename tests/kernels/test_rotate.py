"""RoPE on packed QKV: against positions.rotate in fp64, forward and gradient, in place and not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinox_model.kernels import rotate as rotate_file
from dinox_model.kernels.rotate import rotate_packed, rotate_packed_reference
from dinox_model.positions import Rotations, rotate, rotations
from tests.kernels.eager_traffic import eager_traffic

PREFIX = 3
GRID = (2, 3)
TOKENS = PREFIX + 6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def packed(images: int, heads: int, width: int, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(images + 10 * heads + 100 * width)
    return torch.randn(images, tokens, 3, heads, width, generator=generator).to(dtype)


def tables(width: int, images: int | None = None, grid: tuple[int, int] = GRID) -> Rotations:
    """Shared by all images, or for each its own."""
    mm = None if images is None else torch.linspace(4.0, 30.0, 2 * images).view(images, 2)
    return rotations(grid, width, PREFIX, mm_per_patch=mm)


def in_fp64(qkv: Tensor, by: Rotations) -> Tensor:
    return rotate_packed_reference(qkv.double(), by)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max()) if exact.numel() else 0.0


def test_the_reference_is_rotate_on_queries_and_keys() -> None:
    for images in (None, 2):
        qkv, by = packed(2, 3, 16), tables(16, images)
        query, key, value = qkv.transpose(1, 3).unbind(2)
        expected = torch.stack((rotate(query, by), rotate(key, by), value), dim=2).transpose(1, 3)
        assert torch.equal(rotate_packed_reference(qkv, by), expected)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradient_are_as_right_as_torchs(dtype: torch.dtype, per_image: bool) -> None:
    qkv, by = packed(2, 6, 64, dtype).requires_grad_(), tables(64, 2 if per_image else None)
    gradient = packed(2, 6, 64, dtype).flip(0)
    exact = qkv.detach().double().requires_grad_()
    results = []
    for function, x in ((rotate_packed, qkv), (rotate_packed_reference, qkv), (in_fp64, exact)):
        out = function(x, by)
        results.append((out.detach(), *torch.autograd.grad(out, x, gradient.to(out.dtype))))
    (ours, ours_back), (torchs, torchs_back), (right, right_back) = results
    assert ours.dtype == ours_back.dtype == dtype
    floor = 1e-6 if dtype == torch.float32 else 0.0
    assert error(ours, right) <= 2 * error(torchs, right) + floor
    assert error(ours_back, right_back) <= 3 * error(torchs_back, right_back) + floor


@settings(max_examples=12)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 33), st.integers(1, 3), st.booleans(), st.booleans())
def test_any_shape(images: int, heads: int, quarters: int, rows: int, per_image: bool, owned: bool) -> None:
    width, tokens = 4 * quarters, PREFIX + 2 * rows
    qkv = packed(images, heads, width, tokens=tokens)
    by = tables(width, images if per_image else None, (rows, 2))
    expected = in_fp64(qkv, by)
    out = rotate_packed(qkv, by, owned=owned)
    assert (out is qkv) == owned
    assert error(out, expected) < 2e-6


@pytest.mark.parametrize("owned", [False, True])
def test_prefix_and_values_stay_bit_for_bit(owned: bool) -> None:
    qkv = packed(2, 3, 80, torch.bfloat16)
    out = rotate_packed(qkv.clone(), tables(80), owned=owned)
    assert torch.equal(out[:, :PREFIX], qkv[:, :PREFIX])
    assert torch.equal(out[:, :, 2], qkv[:, :, 2])
    assert not torch.equal(out[:, PREFIX:, :2], qkv[:, PREFIX:, :2])


def test_numerical_gradient() -> None:
    by = tables(8, 1, (1, 2))
    qkv = packed(1, 2, 8, torch.float64, PREFIX + 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate_packed(x, by), (qkv,), fast_mode=True)


def test_the_gradient_is_rotated_where_it_lies_only_if_owned() -> None:
    for owned in (False, True):
        held: list[Tensor] = []
        qkv = packed(1, 2, 16).requires_grad_()
        out = rotate_packed(qkv, tables(16), owned=owned)
        assert out is not qkv
        out.register_hook(held.append)
        (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
        # Norms are kept: the gradient of the sum of squares is that of the input's.
        torch.testing.assert_close(gradient, 2 * qkv.detach(), atol=2e-6, rtol=0)
        assert (gradient.data_ptr() == held[0].data_ptr()) == owned


def test_an_owned_tensor_that_is_differentiated_stays() -> None:
    qkv = packed(1, 2, 16).requires_grad_()
    before = qkv.detach().clone()
    rotate_packed(qkv, tables(16), owned=True)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("owned", [False, True])
def test_compiled_whole_and_under_autocast(owned: bool) -> None:
    weight, by = torch.randn(96, 96, generator=torch.Generator().manual_seed(0)) / 10, tables(16)
    x = packed(2, 2, 16).flatten(2).requires_grad_()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            qkv = torch.nn.functional.linear(x, weight).unflatten(-1, (3, 2, 16))
            query, key, value = rotate_packed(qkv, by, owned=owned).unbind(2)
            return (query * key * value).float().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    (expected,), (found,) = torch.autograd.grad(run(x), x), torch.autograd.grad(compiled(x), x)
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(compiled(x), run(x))


def test_operators_keep_torchs_rules() -> None:
    qkv, by = packed(1, 2, 16, tokens=TOKENS), tables(16)
    torch.library.opcheck(rotate_file._rotate, (qkv.clone().requires_grad_(), *by, False))
    torch.library.opcheck(rotate_file._rotate_back, (qkv, *by))
    torch.library.opcheck(rotate_file._rotate_in_place, (qkv.clone(), *by, True))


def test_no_tokens_is_no_work() -> None:
    assert rotate_packed(packed(0, 2, 16), tables(16)).shape == (0, TOKENS, 3, 2, 16)


def test_what_is_refused() -> None:
    qkv, by = packed(2, 2, 16), tables(16)
    with pytest.raises(ValueError, match=r"qkv must be \(b, t, 3, a, e\)"):
        rotate_packed(qkv[:, :, :2], by)
    with pytest.raises(ValueError, match=r"cos must be float32 \(9, 16\) or \(2, 1, 9, 16\)"):
        rotate_packed(qkv, tables(16, grid=(2, 4)))
    with pytest.raises(ValueError, match="differ in shape"):
        rotate_packed(qkv, Rotations(by.cos, tables(16, 2).sin))
    with pytest.raises(ValueError, match="must be contiguous"):
        rotate_packed(qkv.flip(4).transpose(3, 4).contiguous().transpose(3, 4), by)
    with pytest.raises(ValueError, match="int32"):
        rotate_packed(qkv.int(), by)
    with pytest.raises(ValueError, match="no Triton kernel runs on meta"):
        rotate_packed(qkv.to("meta"), by)


@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_of_eager_torch_is_counted(dtype: torch.dtype) -> None:
    qkv, by = packed(8, 2, 64, dtype, TOKENS), tables(64)
    query, key, _ = qkv.transpose(1, 3).unbind(2)
    counted = eager_traffic(lambda: (rotate(query, by), rotate(key, by)))
    stated = rotate_file.traffic_reference(8, TOKENS, 2, 64, element_bytes=qkv.element_size())
    tables_read = 4 * 2 * TOKENS * 64 * 4  # cosines and sines, of queries and of keys: caches hold them
    assert abs(counted.read_bytes - stated.read_bytes) <= tables_read
    ours = rotate_file.traffic(8, TOKENS, 2, 64, element_bytes=qkv.element_size(), in_place=False)
    assert ours.bytes == 2 * qkv.nbytes + 4 * TOKENS * 64
    assert ours.bytes < counted.bytes
