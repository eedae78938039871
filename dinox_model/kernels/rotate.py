"""Rotary positions of queries and keys where the GEMM of queries, keys and values left them, in one pass over memory.

Legend: b images, t tokens, a heads, e features of a head; packed QKV is (b, t, 3, a, e), a view of the GEMM's (b, t,
3·a·e).
Invariant: what a token is turned by is in the tables of `Rotations` alone; values, and tokens whose angles are 0 (CLS,
registers), come out as they went in. Arithmetic is fp32 (fp64 for fp64 data), whatever autocast says.

Source of the rotation: dinox_model/positions.py. Backward is the inverse rotation of the gradient.

In place or not: a tensor that autograd, or selective checkpointing, still holds may not be written to, and the GEMM's
output is kept by the latter; so the forward that is differentiated writes a new packed tensor (reads and writes all of
it), and only a forward without gradients, and the gradient in backward, are rotated where they lie (two thirds read and
written), if the caller says that nobody else holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dinox_model.kernels.architecture import ARCHITECTURES, architecture
from dinox_model.kernels.language import can_run_on, kernel, tl
from dinox_model.kernels.tiles import Launch, tiles_for
from dinox_model.kernels.traffic import Traffic
from dinox_model.positions import Rotations, rotate

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
"""Of the data. fp64 is for tests of gradients; it is shipped for no architecture."""


def rotate_packed_reference(qkv: Tensor, by: Rotations) -> Tensor:
    """Queries and keys of packed (b, t, 3, a, e) rotated, values as they are: a new tensor of the same shape and dtype.

    by: fp32 (t, e) each for all images, or (b, 1, t, e). ValueError: other shapes.
    """
    _check(qkv, by)
    # A token's heads share its angles: (t, 1, 1, e) or (b, t, 1, 1, e) meets (b, t, 2, a, e).
    cos, sin = (table.movedim(-3, -2)[..., None, :] if table.ndim == 4 else table[:, None, None] for table in by)
    return torch.cat((rotate(qkv[:, :, :2], Rotations(cos, sin)), qkv[:, :, 2:]), dim=2)


def rotate_packed(qkv: Tensor, by: Rotations, *, owned: bool = False) -> Tensor:
    """`rotate_packed_reference` in one pass, by Triton; fp32, fp16 or bf16, each rounded once from fp32.

    owned: the caller alone holds `qkv`, uses it no more, and hands what is returned to one operation whose backward
    makes a gradient that nobody else holds. Then memory is reused: without gradients `qkv` itself is rotated and
    returned, and backward rotates the gradient in place. ValueError: other shapes or dtypes, tensors that are not
    contiguous or not where Triton runs.
    """
    _check(qkv, by)
    if qkv.dtype not in DTYPES:
        raise ValueError(f"rotate_packed: qkv is {qkv.dtype}; the kernel reads {', '.join(map(str, DTYPES))}")
    if not can_run_on(qkv.device):
        raise ValueError(f"rotate_packed: no Triton kernel runs on {qkv.device} here; use rotate_packed_reference")
    if not qkv.is_contiguous():
        raise ValueError(f"rotate_packed: qkv {tuple(qkv.shape)} has strides {qkv.stride()}; it must be contiguous")
    cos, sin = (table.detach().contiguous() for table in by)
    if owned and not (torch.is_grad_enabled() and qkv.requires_grad):
        _rotate_in_place(qkv, cos, sin, False)
        return qkv
    return _rotate(qkv, cos, sin, owned)


def _check(qkv: Tensor, by: Rotations) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[4] % 2:
        raise ValueError(f"rotate_packed: qkv must be (b, t, 3, a, e) with an even e, not {tuple(qkv.shape)}")
    images, tokens, _, _, width = qkv.shape
    for name, table in (("cos", by.cos), ("sin", by.sin)):
        if table.dtype != torch.float32 or tuple(table.shape) not in ((tokens, width), (images, 1, tokens, width)):
            wanted = f"float32 ({tokens}, {width}) or ({images}, 1, {tokens}, {width})"
            raise ValueError(f"rotate_packed: {name} must be {wanted}, not {table.dtype} {tuple(table.shape)}")
    if by.cos.shape != by.sin.shape:
        raise ValueError(f"rotate_packed: cos {tuple(by.cos.shape)} and sin {tuple(by.sin.shape)} differ in shape")


@kernel
def rotate_kernel(
    source,
    target,
    cos,
    sin,
    tokens,
    heads,
    rotated,
    token_stride,
    image_stride,
    direction,
    HALF: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One token's heads, a block of them. The first `rotated` heads (queries, keys) are turned, the rest to `heads`
    (values) copied. Tables: `image_stride` apart for two images, 0 where they share one.
    `direction`: 1, or -1 for the inverse."""
    token = tl.program_id(0)
    head_H = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    feature_E = tl.arange(0, BLOCK_HALF)
    in_half_E = feature_E < HALF
    # The first half's cosines, and the second's sines: the first's are their negatives.
    place = (token // tokens).to(tl.int64) * image_stride + (token % tokens) * (2 * HALF)
    cos_E = tl.load(cos + place + feature_E, mask=in_half_E, other=1.0)
    sin_E = tl.load(sin + place + HALF + feature_E, mask=in_half_E, other=0.0) * direction
    at_HE = token.to(tl.int64) * token_stride + head_H[:, None] * (2 * HALF) + feature_E[None, :]
    inside_HE = (head_H < heads)[:, None] & in_half_E[None, :]
    first_HE = tl.load(source + at_HE, mask=inside_HE, other=0.0)
    second_HE = tl.load(source + at_HE + HALF, mask=inside_HE, other=0.0)
    wide = tl.float64 if DOUBLE else tl.float32
    x_HE, y_HE = first_HE.to(wide), second_HE.to(wide)
    turned_x_HE = (x_HE * cos_E[None, :] - y_HE * sin_E[None, :]).to(first_HE.dtype)
    turned_y_HE = (y_HE * cos_E[None, :] + x_HE * sin_E[None, :]).to(first_HE.dtype)
    is_value_HE = (head_H >= rotated)[:, None] & in_half_E[None, :]
    tl.store(target + at_HE, tl.where(is_value_HE, first_HE, turned_x_HE), mask=inside_HE)
    tl.store(target + at_HE + HALF, tl.where(is_value_HE, second_HE, turned_y_HE), mask=inside_HE)


def _launch(source: Tensor, target: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    images, tokens, _, num_heads, width = source.shape
    if source.numel() == 0:
        return
    arch, dtype = architecture(source.device), DTYPES[source.dtype]
    tiles = tiles_for("rotate", arch=arch, dtype=dtype, head_dim=width)
    if tiles is None:
        raise ValueError(f"rotate_packed: no tiles for {arch}, {dtype}, head_dim {width}; use rotate_packed_reference")
    heads = 2 * num_heads if target is source else 3 * num_heads
    grid = (images * tokens, -(-heads // tiles.sizes["BLOCK_HEADS"]))
    image_stride = tokens * width if cos.ndim == 4 else 0
    rotate_kernel[grid](
        source,
        target,
        cos,
        sin,
        tokens,
        heads,
        2 * num_heads,
        3 * num_heads * width,
        image_stride,
        -1.0 if inverse else 1.0,
        **_constants(width, source.dtype),
        **tiles.arguments(),
    )


def _constants(width: int, dtype: torch.dtype) -> dict[str, Any]:
    half = width // 2
    double = dtype == torch.float64
    return {"HALF": half, "DOUBLE": double, "BLOCK_HALF": 1 << (half - 1).bit_length()}


@torch.library.custom_op("dinox::rotate_packed", mutates_args=())
def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor, owned: bool) -> Tensor:
    out = torch.empty_like(qkv)
    _launch(qkv, out, cos, sin, inverse=False)
    return out


@torch.library.custom_op("dinox::rotate_packed_back", mutates_args=())
def _rotate_back(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(gradient)
    _launch(gradient, out, cos, sin, inverse=True)
    return out


@torch.library.custom_op("dinox::rotate_packed_in_place", mutates_args=("qkv",))
def _rotate_in_place(qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    _launch(qkv, qkv, cos, sin, inverse=inverse)


@_rotate.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, owned: bool) -> Tensor:
    return torch.empty_like(qkv)


@_rotate_back.register_fake
def _(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    _, cos, sin, ctx.owned = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    cos, sin = ctx.saved_tensors
    if not ctx.owned:
        return _rotate_back(gradient.contiguous(), cos, sin), None, None, None
    gradient = gradient.contiguous()
    _rotate_in_place(gradient, cos, sin, True)
    return gradient, None, None, None


_rotate.register_autograd(_backward, setup_context=_keep)


def launches(arch: str) -> Iterator[Launch]:
    """The ways it is shipped for `arch`: bf16 of all head widths that attention has, and fp32 and fp16 of 64."""
    ARCHITECTURES[arch]  # KeyError: no such architecture
    numbers = ("tokens", "heads", "rotated", "token_stride", "image_stride")
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for width, dtype in ((64, bf16), (80, bf16), (96, bf16), (128, bf16), (64, fp16), (64, fp32)):
        tiles = tiles_for("rotate", arch=arch, dtype=DTYPES[dtype], head_dim=width)
        if tiles is None:
            continue
        pointers = dict.fromkeys(("source", "target"), f"*{DTYPES[dtype]}") | dict.fromkeys(("cos", "sin"), "*fp32")
        yield Launch(
            kernel="rotate",
            function=rotate_kernel,
            signature=pointers | dict.fromkeys(numbers, "i32") | {"direction": "fp32"},
            constants=_constants(width, dtype),
            aligned=(*pointers, "token_stride", "image_stride"),
            tiles=tiles,
            dtype=DTYPES[dtype],
            head_dim=width,
        )


def traffic(images: int, tokens: int, num_heads: int, width: int, *, element_bytes: int = 2, in_place: bool) -> Traffic:
    """Of one pass (forward or backward) of the kernel over (b, t, 3, a, e). The tables count once: all images share
    them, and caches hold them."""
    parts = 2 if in_place else 3
    data = images * tokens * parts * num_heads * width * element_bytes
    turned = images * tokens * 2 * num_heads * width
    return Traffic(data + 4 * tokens * width, data, 3 * turned)


def traffic_reference(images: int, tokens: int, num_heads: int, width: int, *, element_bytes: int = 2) -> Traffic:
    """Of `positions.rotate` on queries and keys in eager torch, forward: widen, times the cosines, roll, add the other
    half times the sines, narrow; each a pass. Values are not touched. What attention does to make its inputs
    contiguous is not counted."""
    turned = images * tokens * 2 * num_heads * width
    widened = 0 if element_bytes == 4 else turned
    read = widened * (element_bytes + 4) + turned * (4 + 4 + 4 + 4)  # widen, narrow; product, roll, sum of two
    written = widened * (4 + element_bytes) + turned * (4 + 4 + 4)
    return Traffic(read, written, 3 * turned)
