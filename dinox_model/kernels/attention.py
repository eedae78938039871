"""Attention over packed queries, keys and values: the reference in torch, and the Triton kernels as one operator.

What SDPA lacks and this has: it reads the QKV projection's output as it is and writes the gradient in the same layout,
so nothing is transposed or concatenated; and sequences of different lengths run in one launch.

Invariant: both forms take the same arguments and drop the same weights, whatever the tiles and the dtype.

Not there: an additive mask. Attention here is among all tokens of a sequence, or causal; anything else is refused by
having no argument for it, and belongs to torch's scaled_dot_product_attention.

Legend: b sequences, t tokens, a heads, e features of a head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinox_model.kernels import attention_backward as backward
from dinox_model.kernels import attention_forward as forward
from dinox_model.kernels.architecture import architecture
from dinox_model.kernels.attention_dropout import drop_below, kept_weights
from dinox_model.kernels.language import can_run_on
from dinox_model.kernels.tiles import Tiles, instead, tiles_for
from dinox_model.kernels.traffic import Traffic

HEAD_DIMS = (64, 80, 96, 128)
"""Widths of a head that the kernels are made for."""
KERNELS = ("attention_forward", "attention_queries", "attention_keys_values")
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_LOG2_E = 1.4426950408889634


def attention_reference(
    qkv: Tensor,
    *,
    lengths: Tensor | None = None,
    max_length: int | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    seed: Tensor | int = 0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q k^T) v in plain torch, in any floating dtype, on any device; arguments as `attention`.

    Holds all weights of a sequence (a · t²), and where `lengths` are given reads them on the host.
    """
    _check(qkv, lengths, max_length, dropout, seed, scale)
    if lengths is None:
        return torch.stack([_reference(one, i, causal, dropout, seed, scale) for i, one in enumerate(qkv.unbind())])
    counts = lengths.diff().tolist()
    parts = qkv.split(counts)
    return torch.cat([_reference(one, i, causal, dropout, seed, scale) for i, one in enumerate(parts)])


def _reference(
    qkv_T3AE: Tensor, sequence: int, causal: bool, dropout: float, seed: Tensor | int, scale: float | None
) -> Tensor:
    q_ATE, k_ATE, v_ATE = qkv_T3AE.permute(1, 2, 0, 3).unbind(0)
    num_heads, num_tokens, _ = q_ATE.shape
    logits_ATT = q_ATE @ k_ATE.transpose(1, 2) * _scale(qkv_T3AE, scale)
    if causal:
        seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=qkv_T3AE.device).tril()
        logits_ATT = logits_ATT.masked_fill(~seen, -math.inf)
    weights_ATT = logits_ATT.softmax(dim=-1)
    if dropout > 0:
        kept = kept_weights(seed, dropout, sequence, num_heads, num_tokens, qkv_T3AE.device)
        weights_ATT = torch.where(kept, weights_ATT / (1 - dropout), 0.0)
    return (weights_ATT @ v_ATE).transpose(0, 1)


def attention(
    qkv: Tensor,
    *,
    lengths: Tensor | None = None,
    max_length: int | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    seed: Tensor | int = 0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q k^T) v by Triton kernels; exact (not approximate), differentiable in qkv.

    qkv: (b, t, 3, a, e), or with lengths (tokens, 3, a, e), contiguous: the QKV projection's output, unflattened. e is
    one of HEAD_DIMS; fp32, fp16 or bf16, cast first where autocast is on. Returns (b, t, a, e) or (tokens, a, e).
    lengths: int32 (n + 1,) on qkv's device: sequence i is tokens lengths[i] to lengths[i + 1]; the first is 0, the last
    the number of tokens. max_length: tokens of the longest sequence; with lengths only. Both are checked on the CPU;
    on a GPU that would stop the host, and tokens that they leave out hold anything.
    dropout: share of the weights that are dropped, in [0, 1). seed: of that choice, a number or an int64 tensor of one
    element on qkv's device; the same seed drops the same weights, so give each call and layer its own.
    scale: > 0; None is 1/sqrt(e).

    ValueError: an argument that is none of these, or an architecture for which the table has no tiles. RuntimeError: no
    Triton, or tensors on a device that this process's kernels cannot run on. Its gradient has no gradient.
    """
    device = qkv.device.type
    if torch.is_autocast_enabled(device):
        qkv = qkv.to(torch.get_autocast_dtype(device))
    _check(qkv, lengths, max_length, dropout, seed, scale)
    if dropout > 0 and not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=qkv.device)
    drawn = seed if isinstance(seed, Tensor) and dropout > 0 else None
    longest = qkv.shape[1] if max_length is None else max_length
    return torch.ops.dinox.attention(qkv, lengths, longest, causal, dropout, drawn, _scale(qkv, scale))[0]


def _scale(qkv: Tensor, scale: float | None) -> float:
    return qkv.shape[-1] ** -0.5 if scale is None else scale


def _check(
    qkv: Tensor,
    lengths: Tensor | None,
    max_length: int | None,
    dropout: float,
    seed: Tensor | int,
    scale: float | None,
) -> None:
    """ValueError: shapes or numbers that neither form takes."""
    axes = "(b, t, 3, a, e)" if lengths is None else "(tokens, 3, a, e) with lengths"
    if qkv.ndim != (5 if lengths is None else 4) or qkv.shape[-3] != 3:
        raise ValueError(f"attention: qkv is {axes}, not {tuple(qkv.shape)}")
    if (lengths is None) != (max_length is None):
        raise ValueError("attention: lengths and max_length go together; give both, or neither")
    if lengths is not None and (lengths.ndim != 1 or lengths.dtype != torch.int32 or lengths.device != qkv.device):
        raise ValueError(
            f"attention: lengths is int32 (n + 1,) on {qkv.device}, not {lengths.dtype} {tuple(lengths.shape)} on "
            f"{lengths.device}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout is in [0, 1), not {dropout}")
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != qkv.device):
        raise ValueError(
            f"attention: seed is one int64 on {qkv.device}, not {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"attention: scale is above 0, not {scale}")


def _check_kernel(qkv: Tensor, lengths: Tensor | None, longest: int) -> None:
    """What the kernels cannot take, and the reference can."""
    if qkv.dtype not in DTYPES or qkv.shape[-1] not in HEAD_DIMS:
        raise ValueError(
            f"attention: no kernel for head_dim {qkv.shape[-1]} in {qkv.dtype}; head_dim is one of {HEAD_DIMS} and the "
            "dtype fp32, fp16 or bf16. Set kernels={attention: sdpa-efficient}"
        )
    if longest * 3 * qkv.shape[-2] * qkv.shape[-1] >= 2**31:
        raise ValueError(
            f"attention: a sequence of {longest} tokens has over 2^31 numbers, more than the kernels count to"
        )
    if not qkv.is_contiguous():
        raise ValueError(
            f"attention: qkv of strides {qkv.stride()} is not contiguous; hand over the projection's output "
            "unflattened, or call .contiguous(), which copies"
        )
    if not can_run_on(qkv.device):
        raise RuntimeError(
            f"attention: this process has no Triton kernels for {qkv.device} (TRITON_INTERPRET=1 interprets them on "
            "the CPU, slowly). Set kernels=reference"
        )
    if lengths is not None and qkv.device.type == "cpu":
        ends = lengths.tolist()
        counts = [after - before for before, after in itertools.pairwise(ends)]
        if ends[:1] != [0] or ends[-1] != len(qkv) or min(counts, default=0) < 0 or max(counts, default=0) > longest:
            raise ValueError(
                f"attention: lengths {ends} are to rise from 0 to {len(qkv)} tokens, by at most max_length {longest}"
            )


# The operator. Its second result, (a, tokens) fp32, is the log2 of the sums over keys of 2 to logit · log2(e).


@torch.library.custom_op("dinox::attention", mutates_args=())
def _attention(
    qkv: Tensor,
    lengths: Tensor | None,
    longest: int,
    causal: bool,
    dropout: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check_kernel(qkv, lengths, longest)
    out, per_row = _empty(qkv, lengths, longest, causal, dropout, seed, scale)
    if out.numel() > 0:
        launch = _Launching(qkv, lengths, longest, causal, dropout, seed, scale)
        launch(forward.attention_forward, "BLOCK_M", (qkv, out, per_row), ())
    return out, per_row


@_attention.register_fake
def _empty(
    qkv: Tensor,
    lengths: Tensor | None,
    longest: int,
    causal: bool,
    dropout: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    *tokens, _, num_heads, head_dim = qkv.shape
    out = torch.empty((*tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    return out, torch.empty((num_heads, math.prod(tokens)), dtype=torch.float32, device=qkv.device)


@torch.library.custom_op("dinox::attention_backward", mutates_args=())
def _attention_backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    per_row: Tensor,
    lengths: Tensor | None,
    longest: int,
    causal: bool,
    dropout: float,
    seed: Tensor | None,
    scale: float,
) -> Tensor:
    d_qkv = torch.empty_like(qkv)
    if out.numel() > 0:
        d_out = d_out.contiguous()  # a gradient that was expanded (of a sum, say) is not
        shifts = torch.empty_like(per_row)
        launch = _Launching(qkv, lengths, longest, causal, dropout, seed, scale)
        launch(backward.attention_queries, "BLOCK_M", (qkv, out, d_out, d_qkv, per_row, shifts), (scale,))
        launch(backward.attention_keys_values, "BLOCK_N", (qkv, d_out, d_qkv, per_row, shifts), (scale,))
    return d_qkv


@_attention_backward.register_fake
def _(d_out: Tensor, qkv: Tensor, *_others: Any) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, lengths, *ctx.numbers, seed, ctx.scale = inputs
    sizes = (qkv.shape[-1], ctx.numbers[0])
    if all(isinstance(size, int) for size in sizes):  # not where compiling leaves them open: then the backward says it
        for name in KERNELS[1:]:
            tiles = table_name(name, causal=ctx.numbers[1], dropout=seed is not None)
            _tiles(tiles, architecture(qkv.device), DTYPES[qkv.dtype], *sizes)
    ctx.save_for_backward(qkv, *output, lengths, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, _d_per_row: None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 7
    qkv, out, per_row, lengths, seed = ctx.saved_tensors
    arguments = (lengths, *ctx.numbers, seed, ctx.scale)
    return torch.ops.dinox.attention_backward(d_out, qkv, out, per_row, *arguments), *(None,) * 6


_attention.register_autograd(_differentiate, setup_context=_save)


class _Launching:
    """Launches kernels over one batch."""

    def __init__(
        self,
        qkv: Tensor,
        lengths: Tensor | None,
        longest: int,
        causal: bool,
        dropout: float,
        seed: Tensor | None,
        scale: float,
    ) -> None:
        *tokens, _, self.num_heads, self.head_dim = qkv.shape
        self.arch, self.dtype = architecture(qkv.device), DTYPES[qkv.dtype]
        self.longest = longest
        self.num_sequences = tokens[0] if lengths is None else len(lengths) - 1
        self.about = (lengths, seed, math.prod(tokens), longest, self.num_heads)
        self.numbers = (scale * _LOG2_E, drop_below(dropout), 1 / (1 - dropout))
        self.constants = constants(
            self.arch, self.dtype, self.head_dim, causal=causal, packed=lengths is not None, dropout=dropout > 0
        )

    def __call__(self, function: Any, own: str, tensors: Sequence[Tensor], numbers: tuple[float, ...]) -> None:
        """own: the tile's side that a program owns. numbers: those that come before `self.numbers`."""
        facts = {each.lower(): self.constants[each] for each in ("CAUSAL", "DROPOUT")}
        name = table_name(function.fn.__name__, **facts)
        tiles = _tiles(name, self.arch, self.dtype, self.head_dim, self.longest)
        programs = -(-self.longest // tiles.sizes[own]) * self.num_heads * self.num_sequences
        arguments = (*tensors, *self.about, *numbers, *self.numbers)
        function[(programs,)](*arguments, **self.constants, **tiles.arguments())


def _tiles(kernel: str, arch: str, dtype: str, head_dim: int, length: int) -> Tiles:
    tiles = tiles_for(kernel, arch=arch, dtype=dtype, head_dim=head_dim, length=length)
    if tiles is None:
        other = instead(kernel, arch=arch, dtype=dtype, head_dim=head_dim, length=length)
        why = "" if other is None else f" ({other.because})"
        name = "sdpa-efficient" if other is None else other.backend
        raise ValueError(
            f"{kernel}: no tiles for head_dim {head_dim}, {dtype} on {arch}{why}. Set kernels={{attention: {name}}}"
        )
    return tiles


def constants(arch: str, dtype: str, head_dim: int, *, causal: bool, packed: bool, dropout: bool) -> dict[str, Any]:
    """The kernels' compile-time arguments but for the tiles."""
    cheap = dtype == "bf16" and (arch.startswith("gfx11") or arch == "gfx942")  # others convert in hardware
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": 1 << (head_dim - 1).bit_length(),
        "CAUSAL": causal,
        "PACKED": packed,
        "DROPOUT": dropout,
        "CHEAP_BF16": cheap,
    }


def table_name(kernel: str, *, causal: bool, dropout: bool) -> str:
    """In the table: what takes registers has tiles of its own, the generator, and causal masks of keys and values."""
    if dropout:
        return f"{kernel}_dropout"
    return f"{kernel}_causal" if causal and kernel == "attention_keys_values" else kernel


def traffic(sequences: int, length: int, num_heads: int, head_dim: int, element_bytes: int) -> tuple[Traffic, Traffic]:
    """(forward, backward) of the kernels, over sequences of `length` tokens, not causal.

    The backward computes the weights once in each of its two kernels: 7 products where 5 would do.
    """
    tokens = sequences * length
    third, per_row = tokens * num_heads * head_dim * element_bytes, tokens * num_heads * 4
    product = 2 * tokens * length * num_heads * head_dim
    ahead = Traffic(3 * third, third + per_row, 2 * product)
    queries = Traffic(5 * third + per_row, third + per_row, 3 * product)
    keys_values = Traffic(4 * third + 2 * per_row, 2 * third, 4 * product)
    return ahead, queries + keys_values


def reference_traffic(
    sequences: int, length: int, num_heads: int, head_dim: int, element_bytes: int
) -> tuple[Traffic, Traffic]:
    """(forward, backward) of SDPA's flash kernels as `dinox_model/attention.py` calls them, in eager torch.

    The kernels' own traffic, with five products backward; and what surrounds them: each kernel reads the strided
    thirds as they are, its result is already (b, t, a, e), but the gradients of queries, keys and values are written
    apart and stacked into one buffer: three thirds read and written once more.
    """
    ahead, back = traffic(sequences, length, num_heads, head_dim, element_bytes)
    third = sequences * length * num_heads * head_dim * element_bytes
    per_row = sequences * length * num_heads * 4
    product = back.flops // 7
    delta = Traffic(2 * third, per_row)
    gradients = Traffic(4 * third + 2 * per_row, 3 * third, 5 * product)
    return ahead, delta + gradients + Traffic(3 * third, 3 * third)
