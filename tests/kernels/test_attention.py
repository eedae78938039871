"""Attention's kernels in the interpreter against the reference in fp64; dropout, packing, layouts, the operator."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dinox_model.kernels import attention_dropout, tiles
from dinox_model.kernels.architecture import ARCHITECTURES
from dinox_model.kernels.attention import (
    KERNELS,
    attention,
    attention_reference,
    reference_traffic,
    traffic,
)
from dinox_model.kernels.attention_dropout import kept_weights, philox
from dinox_model.kernels.attention_launches import launches

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def own_tiles() -> Iterator[Any]:
    """Sets the tiles of all three kernels, for one test."""

    def choose(block_m: int, block_n: int) -> None:
        row = {"sizes": {"BLOCK_M": block_m, "BLOCK_N": block_n}}
        tiles.prefer({f"{name}{dropout}": [row] for name in KERNELS for dropout in ("", "_dropout")})

    yield choose
    tiles.prefer({})


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def packed_lengths(*counts: int) -> dict[str, Any]:
    ends = [0, *itertools.accumulate(counts)]
    return {"lengths": torch.tensor(ends, dtype=torch.int32), "max_length": max(counts)}


def run(function: Any, qkv: Tensor, d_out: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The result and qkv's gradient, both in fp64."""
    leaf = qkv.clone().requires_grad_()
    out = function(leaf, **options)
    out.backward(torch.ones_like(out) if d_out is None else d_out.to(out.dtype))
    assert leaf.grad is not None
    return out.detach().double(), leaf.grad.double()


def assert_as_exact_as_torch(qkv: Tensor, **options: Any) -> None:
    """FlashAttention's rule: at most 2 times (forward), 3 times (backward) the error of torch in the same dtype.

    A floor of one rounding of the largest number in it keeps small cases, where torch may hit by luck, from failing.
    """
    d_out = normal(*qkv.shape[:-3], *qkv.shape[-2:], seed=1, dtype=qkv.dtype)
    exact = run(attention_reference, qkv.double(), d_out, **options)
    plain = run(attention_reference, qkv, d_out, **options)
    ours = run(attention, qkv, d_out, **options)
    for times, right, theirs, mine in zip((2, 3), exact, plain, ours, strict=True):
        least = torch.finfo(qkv.dtype).eps * right.abs().max()
        assert (mine - right).abs().max() <= times * max((theirs - right).abs().max(), least)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "options"), [(64, {}), (80, {"causal": True}), (96, {"dropout": 0.2}), (128, {})])
def test_forward_and_gradient(dtype: torch.dtype, head_dim: int, options: dict[str, Any]) -> None:
    assert_as_exact_as_torch(normal(1, 77, 3, 2, head_dim, dtype=dtype), **options)


@settings(max_examples=8)
@given(
    counts=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    packed=st.booleans(),
    heads=st.integers(1, 2),
    causal=st.booleans(),
    dropout=st.sampled_from((0.0, 0.5)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    counts: list[int], packed: bool, heads: int, causal: bool, dropout: float, dtype: torch.dtype
) -> None:
    shape = (sum(counts),) if packed else (1, counts[0])
    how = packed_lengths(*counts) if packed else {}
    qkv = normal(*shape, 3, heads, 64, seed=sum(counts), dtype=dtype)
    assert_as_exact_as_torch(qkv, causal=causal, dropout=dropout, seed=3, scale=0.3, **how)


def test_packed_equals_dense_bit_for_bit() -> None:
    counts = (40, 0, 9, 40)
    qkv = normal(sum(counts), 3, 2, 64)
    out, gradient = run(attention, qkv, None, **packed_lengths(*counts))
    parts = [run(attention, part[None], None) for part in qkv.split(counts) if len(part)]
    assert torch.equal(out, torch.cat([part[0] for part, _ in parts]))
    assert torch.equal(gradient, torch.cat([part[0] for _, part in parts]))


def test_tiles_change_roundings_alone(own_tiles: Any) -> None:
    """Also what dropout drops: two different masks would differ by far more."""
    qkv, results = normal(1, 70, 3, 1, 64), []
    for block_m, block_n in ((64, 64), (32, 128), (128, 16)):
        own_tiles(block_m, block_n)
        for causal in (False, True):
            results.append((causal, *run(attention, qkv, None, dropout=0.4, seed=2**40 + 7, causal=causal)))
    for causal, out, gradient in results[2:]:
        assert torch.allclose(out, results[causal][1], atol=2e-6)
        assert torch.allclose(gradient, results[causal][2], atol=1e-5)


def test_the_mask_of_forward_and_backward_is_the_references() -> None:
    """Values are unit vectors, so `out` shows the weights, and the values' gradient of a sum their columns' sums."""
    num_tokens, dropout = 50, 0.3
    qkv = normal(2, num_tokens, 3, 2, 64)
    qkv[:, :, 2] = torch.eye(num_tokens, 64)[:, None]
    out, gradient = run(attention, qkv, None, dropout=dropout, seed=torch.tensor([11]))
    kept = torch.stack([kept_weights(11, dropout, i, 2, num_tokens, qkv.device) for i in range(2)])
    assert torch.equal(out[..., :num_tokens].transpose(1, 2) > 0, kept)
    assert torch.allclose(out[..., :num_tokens].sum(1), gradient[:, :, 2, :, 0].transpose(1, 2), atol=1e-5)
    assert abs(kept.float().mean().item() - 0.7) < 0.02


def test_seeds_heads_and_sequences_drop_differently() -> None:
    masks = [
        kept_weights(seed, 0.5, sequence, 2, 30, torch.device("cpu")) for seed, sequence in ((0, 0), (1, 0), (0, 1))
    ]
    heads = [head for mask in masks for head in mask]
    for one, other in itertools.combinations(heads, 2):
        assert 0.4 < (one == other).float().mean() < 0.6


@pytest.mark.parametrize(
    ("rounds", "words"),
    [(7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)), (10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))],
)
def test_philox_gives_the_known_answers(rounds: int, words: tuple[int, ...]) -> None:
    """Of Random123's table of known answers, for a counter and a key of zeros."""
    zero = torch.zeros((), dtype=torch.int64)
    assert tuple(word.item() for word in philox(zero, (zero, zero, zero, zero), rounds)) == words


def test_no_dropout_keeps_all_and_much_drops_nearly_all() -> None:
    assert attention_dropout.drop_below(0.0) == 0
    assert kept_weights(0, 0.0, 0, 1, 20, torch.device("cpu")).all()
    assert kept_weights(0, 0.9999, 0, 1, 20, torch.device("cpu")).float().mean() < 0.01


def test_large_logits_stay_finite() -> None:
    qkv = normal(1, 40, 3, 1, 64) * 30
    for result in run(attention, qkv, None):
        assert result.isfinite().all()


def test_what_is_not_finite_stays_so() -> None:
    qkv = normal(2, 20, 3, 1, 64, dtype=torch.bfloat16)
    qkv[0, 3, 2, 0, 5] = float("nan")
    out, _ = run(attention, qkv, None)
    assert out[0, :, 0, 5].isnan().all()
    assert out[1].isfinite().all()


def test_the_reference_is_softmax_attention() -> None:
    qkv = normal(2, 9, 3, 2, 8).double()
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    for causal in (False, True):
        there = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        assert torch.allclose(attention_reference(qkv, causal=causal), there.transpose(1, 2), atol=1e-12)


def test_the_references_gradient() -> None:
    qkv = normal(6, 3, 1, 4).double().requires_grad_()
    how = packed_lengths(4, 2)
    assert torch.autograd.gradcheck(
        lambda x: attention_reference(x, dropout=0.3, scale=0.7, causal=True, **how), (qkv,)
    )


def test_the_operator_is_whole() -> None:
    qkv = normal(1, 20, 3, 1, 64).requires_grad_()
    torch.library.opcheck(torch.ops.dinox.attention.default, (qkv, None, 20, False, 0.0, None, 0.1))
    how = packed_lengths(5, 15)
    packed = normal(20, 3, 1, 64).requires_grad_()
    arguments = (packed, how["lengths"], 15, True, 0.1, torch.tensor([4]), 0.1)
    torch.library.opcheck(torch.ops.dinox.attention.default, arguments)


def test_compiled_and_checkpointed() -> None:
    qkv, d_out = normal(2, 20, 3, 1, 64), normal(2, 20, 1, 64, seed=1)

    def doubled(x: Tensor) -> Tensor:
        return attention(x * 2, dropout=0.1, seed=5)

    def checkpointed(x: Tensor) -> Tensor:
        result = checkpoint(doubled, x, use_reentrant=False)
        assert isinstance(result, Tensor)
        return result

    eager = run(doubled, qkv, d_out)
    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    for other in (compiled, checkpointed):
        for one, two in zip(run(other, qkv, d_out), eager, strict=True):
            assert torch.equal(one, two)


def test_autocast_casts() -> None:
    qkv = normal(1, 20, 3, 1, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(qkv)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(qkv.bfloat16()))


def test_an_expanded_gradient_and_an_empty_batch() -> None:
    qkv = normal(1, 20, 3, 1, 64).requires_grad_()
    attention(qkv).sum().backward()
    assert qkv.grad is not None
    assert torch.equal(qkv.grad.double(), run(attention, qkv.detach(), None)[1])
    assert attention(normal(0, 20, 3, 1, 64)).shape == (0, 20, 1, 64)


@pytest.mark.parametrize(
    ("qkv", "options", "message"),
    [
        (normal(1, 8, 2, 1, 64), {}, "qkv is"),
        (normal(1, 8, 3, 1, 72), {}, "no kernel for head_dim 72"),
        (normal(1, 8, 3, 1, 64).double(), {}, "no kernel for head_dim 64 in torch.float64"),
        (normal(1, 3, 8, 1, 64).transpose(1, 2), {}, "not contiguous"),
        (normal(1, 8, 3, 1, 64), {"dropout": 1.0}, "dropout is in"),
        (normal(1, 8, 3, 1, 64), {"scale": 0.0}, "scale is above 0"),
        (normal(1, 8, 3, 1, 64), {"dropout": 0.1, "seed": torch.tensor([1.0])}, "seed is one int64"),
        (normal(1, 1, 3, 1, 64).expand(1, 2**24, 3, 1, 64), {}, "more than the kernels count to"),
        (normal(1, 8, 3, 1, 64), {"max_length": 8}, "go together"),
        (normal(8, 3, 1, 64), {"lengths": torch.tensor([0, 8]), "max_length": 8}, "lengths is int32"),
        (normal(8, 3, 1, 64), {**packed_lengths(3, 4)}, "are to rise from 0 to 8"),
        (normal(8, 3, 1, 64), {**packed_lengths(3, 5), "max_length": 4}, "at most max_length 4"),
    ],
)
def test_what_is_refused(qkv: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(qkv, **options)


def test_where_the_table_has_no_tiles_it_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinox_model.kernels.attention.architecture", lambda _device: "gfx1151")
    with pytest.raises(ValueError, match=r"no tiles for head_dim 64, fp32 on gfx1151.*kernels=\{attention: sdpa"):
        attention(normal(1, 8, 3, 1, 64))


def test_a_missing_backward_is_said_in_the_forward(own_tiles: Any) -> None:
    none = {"arch": ["interpreter"], "instead": "sdpa-flash", "because": "of this test"}
    tiles.prefer({"attention_keys_values": [none]})
    qkv = normal(1, 8, 3, 1, 64)
    assert attention(qkv).isfinite().all()
    with pytest.raises(ValueError, match=r"attention_keys_values: no tiles .*of this test.*attention: sdpa-flash"):
        attention(qkv.requires_grad_())


def test_launches_name_every_argument() -> None:
    for arch in ARCHITECTURES:
        shipped = list(launches(arch))
        assert {launch.kernel for launch in shipped} >= set(KERNELS)
        for launch in shipped:
            assert {*launch.signature, *launch.constants, *launch.tiles.sizes} == set(launch.function.arg_names)
            assert launch.dtype != "fp32" or not arch.startswith("gfx1")


def test_traffic_is_counted() -> None:
    ahead, back = traffic(2, 10, 3, 64, 2)
    assert (ahead.read_bytes, ahead.written_bytes) == (2 * 10 * 3 * 3 * 64 * 2, 2 * 10 * 3 * 64 * 2 + 2 * 10 * 3 * 4)
    assert ahead.flops == 2 * 3 * 10 * 10 * 64 * 4
    theirs = reference_traffic(2, 10, 3, 64, 2)
    assert theirs[0] == ahead
    assert theirs[1].flops * 7 == back.flops * 5
