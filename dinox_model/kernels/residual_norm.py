"""A residual added to the tokens, scaled by LayerScale, and the norm of the sum: one pass over memory each way.

    x' = x + gamma · residual        y = norm(x') · weight + bias        (or y = norm(x) · weight + bias alone)

Legend: d width, r rows (all other dimensions flattened), p programs of the backward.
Invariant: statistics and arithmetic are fp32 (fp64 for fp64 data), whatever the data's dtypes and autocast; the norm is
of x' as it is stored, so that both results agree. Gradients of parameters are sums in a fixed order, without atomics:
each of at most `PROGRAMS` programs adds up its rows, then the partial sums are added; equal for equal inputs.

Dtypes: x, residual and gamma may differ. x' has the widest of them, as torch's own sum has: a stream in fp32 stays so
under autocast where the residual is bf16. y has `normed_dtype`: by default that of x' (or of x), as norms have it.
Gradients have the dtype of what they belong to.

Sources: LayerNorm, Ba et al. (arXiv 1607.06450); RMSNorm, Zhang and Sennrich (arXiv 1910.07467); LayerScale, Touvron et
al. (arXiv 2103.17239). With n = (x' - mean) / deviation and u = dy · weight, the norm's gradient is
(u - mean(u) - n · mean(u · n)) / deviation; RMSNorm has no mean(u), and n = x' / deviation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinox_model.fields import nearest
from dinox_model.kernels.language import can_run_on
from dinox_model.kernels.residual_norm_kernels import DTYPES, PROGRAMS, launches, run_backward, run_forward
from dinox_model.kernels.traffic import Traffic

__all__ = ["launches", "norm", "norm_reference", "residual_norm", "residual_norm_reference"]

Kind = Literal["layer", "rms"]


def residual_norm_reference(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    kind: Kind = "layer",
    normed_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', y) of the file's formula, each of the shape of x, (…, d), in torch's own operators.

    residual: as x. gamma, weight, bias: (d,); gamma None: no LayerScale; bias None: no bias. ValueError: other shapes,
    or a kind that is neither `layer` nor `rms`.
    """
    _check(x, residual, gamma, weight, bias, kind)
    dtype = _widest(x, residual, gamma)
    with torch.autocast(x.device.type, enabled=False):
        wide, scaled = x.to(dtype), residual.to(dtype)
        added = wide + scaled if gamma is None else torch.addcmul(wide, gamma.to(dtype), scaled)
    return added, norm_reference(added, weight, bias, eps=eps, kind=kind, normed_dtype=normed_dtype)


def norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    kind: Kind = "layer",
    normed_dtype: torch.dtype | None = None,
) -> Tensor:
    """y of the file's formula for x itself; arguments and errors as in `residual_norm_reference`."""
    _check(x, None, None, weight, bias, kind)
    compute = torch.promote_types(x.dtype, torch.float32)
    shape, wide = x.shape[-1:], x.to(compute)
    scale, shift = weight.to(compute), None if bias is None else bias.to(compute)
    with torch.autocast(x.device.type, enabled=False):
        if kind == "layer":
            normed = F.layer_norm(wide, shape, scale, shift, eps)
        else:
            normed = F.rms_norm(wide, shape, scale, eps)
            normed = normed if shift is None else normed + shift
    return normed.to(normed_dtype or x.dtype)


def residual_norm(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    kind: Kind = "layer",
    normed_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`residual_norm_reference` by Triton, fp32, fp16 or bf16 each. Tensors that are not contiguous are copied.

    ValueError: as the reference; also other dtypes, a width without tiles, tensors not where Triton runs.
    """
    _check(x, residual, gamma, weight, bias, kind)
    _check_runs(x, residual, gamma, weight, bias)
    tensors = _contiguous(x, residual, gamma, weight, bias)
    dtype = normed_dtype or _widest(x, residual, gamma)
    added, normed, _ = _residual_norm(*tensors, eps, kind == "layer", dtype)
    return added, normed


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    kind: Kind = "layer",
    normed_dtype: torch.dtype | None = None,
) -> Tensor:
    """`norm_reference` by Triton; arguments and errors as in `residual_norm`."""
    _check(x, None, None, weight, bias, kind)
    _check_runs(x, weight, bias)
    return _norm(*_contiguous(x, weight, bias), eps, kind == "layer", normed_dtype or x.dtype)[0]


def _check(
    x: Tensor, residual: Tensor | None, gamma: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str
) -> None:
    if kind not in ("layer", "rms"):
        raise ValueError(f"residual_norm: unknown kind {kind!r}{nearest(kind, ('layer', 'rms'))}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual_norm: residual {tuple(residual.shape)} must have x's shape, {tuple(x.shape)}")
    for name, vector in (("gamma", gamma), ("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"residual_norm: {name} must be {tuple(x.shape[-1:])}, not {tuple(vector.shape)}")


def _check_runs(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"residual_norm: {tensor.dtype}; the kernel reads {', '.join(map(str, DTYPES))}")
        if tensor is not None and not can_run_on(tensor.device):
            raise ValueError(f"residual_norm: no Triton kernel runs on {tensor.device} here; use the reference")


def _contiguous(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    return (None if tensor is None else tensor.contiguous() for tensor in tensors)


def _widest(*tensors: Tensor | None) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor is not None))


@torch.library.custom_op("dinox::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x', y, and the rows' statistics for the backward."""
    added, normed, statistics = _empty_residual_norm(x, residual, gamma, centred, normed_dtype)
    run_forward(x, residual, gamma, weight, bias, added, normed, statistics, eps=eps, centred=centred)
    return added, normed, statistics


@torch.library.custom_op("dinox::norm", mutates_args=())
def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, normed_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    normed, statistics = _empty_norm(x, centred, normed_dtype)
    run_forward(x, None, None, weight, bias, None, normed, statistics, eps=eps, centred=centred)
    return normed, statistics


@torch.library.custom_op("dinox::residual_norm_backward", mutates_args=())
def _residual_norm_backward(
    added: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    d_added: Tensor | None,
    d_normed: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    has_bias: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the residual, and of weight, bias and gamma (as many as there are) as (k, d)."""
    d_x, d_residual = torch.empty_like(added, dtype=x_dtype), torch.empty_like(added, dtype=residual_dtype)
    inputs = (added, residual, gamma, weight, statistics, d_added, d_normed)
    of_parameters = run_backward(*inputs, d_x, d_residual, has_bias=has_bias, centred=centred)
    return d_x, d_residual, of_parameters


@torch.library.custom_op("dinox::norm_backward", mutates_args=())
def _norm_backward(
    x: Tensor, weight: Tensor, statistics: Tensor, d_normed: Tensor, has_bias: bool, centred: bool
) -> tuple[Tensor, Tensor]:
    d_x = torch.empty_like(x)
    inputs = (x, None, None, weight, statistics, None, d_normed)
    return d_x, run_backward(*inputs, d_x, None, has_bias=has_bias, centred=centred)


def _empty_residual_norm(
    x: Tensor, residual: Tensor, gamma: Tensor | None, centred: bool, normed_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    added = torch.empty_like(x, dtype=_widest(x, residual, gamma))
    return added, *_empty_norm(added, centred, normed_dtype)


def _empty_norm(x: Tensor, centred: bool, normed_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    statistics = x.new_empty((1 + centred, x.numel() // x.shape[-1]), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, dtype=normed_dtype), statistics


@_residual_norm.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_residual_norm(x, residual, gamma, centred, normed_dtype)


@_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, normed_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _empty_norm(x, centred, normed_dtype)


@_residual_norm_backward.register_fake
def _(
    added: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    d_added: Tensor | None,
    d_normed: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    has_bias: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    of_parameters = statistics.new_empty((1 + has_bias + (gamma is not None), added.shape[-1]))
    return torch.empty_like(added, dtype=x_dtype), torch.empty_like(added, dtype=residual_dtype), of_parameters


@_norm_backward.register_fake
def _(
    x: Tensor, weight: Tensor, statistics: Tensor, d_normed: Tensor, has_bias: bool, centred: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), statistics.new_empty((1 + has_bias, x.shape[-1]))


def _keep_residual_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, gamma, weight, bias, _, ctx.centred, _ = inputs
    added, _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, residual, gamma, weight, bias)]
    # Without LayerScale no gradient depends on the residual itself: it is not kept.
    ctx.save_for_backward(added, None if gamma is None else residual, gamma, weight, statistics)


def _backward_residual_norm(
    ctx: Any, d_added: Tensor | None, d_normed: Tensor | None, _statistics: None
) -> tuple[Tensor | None, ...]:
    added, residual, gamma, weight, statistics = ctx.saved_tensors
    of_x, of_residual, of_gamma, of_weight, of_bias = ctx.dtypes
    d_normed = torch.zeros_like(added) if d_normed is None else d_normed.contiguous()
    d_added = None if d_added is None else d_added.contiguous()
    has_bias = of_bias is not None
    d_x, d_residual, d_parameters = _residual_norm_backward(
        added, residual, gamma, weight, statistics, d_added, d_normed, of_x, of_residual, has_bias, ctx.centred
    )
    d_weight, *others = d_parameters.unbind()
    d_bias = others[0].to(of_bias) if has_bias else None
    d_gamma = others[-1].to(of_gamma) if gamma is not None else None
    return d_x, d_residual, d_gamma, d_weight.to(of_weight), d_bias, None, None, None


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.centred, _ = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.of_bias = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, statistics)


def _backward_norm(ctx: Any, d_normed: Tensor, _statistics: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, statistics = ctx.saved_tensors
    has_bias = ctx.of_bias is not None
    d_x, d_parameters = _norm_backward(x, weight, statistics, d_normed.contiguous(), has_bias, ctx.centred)
    d_weight, *others = d_parameters.unbind()
    d_bias = others[0].to(ctx.of_bias) if has_bias else None
    return d_x, d_weight.to(weight.dtype), d_bias, None, None, None


_residual_norm.register_autograd(_backward_residual_norm, setup_context=_keep_residual_norm)
_norm.register_autograd(_backward_norm, setup_context=_keep_norm)


def traffic(
    rows: int, width: int, *, stream_bytes: int = 4, data_bytes: int = 2, residual: bool = True, backward: bool = False
) -> Traffic:
    """Of the kernel, with LayerScale, over `rows` x `width`: x, x' of `stream_bytes` an element, the residual and y of
    `data_bytes`. `residual` False: the norm alone."""
    elements, statistics = rows * width, 8 * rows
    if not backward:
        read = stream_bytes + data_bytes * residual
        written = stream_bytes * residual + data_bytes
        return Traffic(read * elements, written * elements + statistics, (8 + 2 * residual) * elements)
    read = stream_bytes + data_bytes + (stream_bytes + data_bytes) * residual
    written = stream_bytes + data_bytes * residual
    partial = 4 * (2 + residual) * width * min(rows, PROGRAMS)
    flops = (13 + 4 * residual) * elements
    return Traffic(read * elements + statistics + partial, written * elements + partial, flops)


def traffic_reference(
    rows: int, width: int, *, stream_bytes: int = 4, data_bytes: int = 2, backward: bool = False
) -> Traffic:
    """The same, residual and norm, in eager torch, each operator a pass: addcmul, the norm, and where the residual and
    y are narrower than the stream (autocast) their casts. A norm's backward reads x' and the gradient once for dx and
    once for the parameters; gamma's gradient is a product that is written and then summed, after addcmul's backward has
    written the residual times its factor, 1."""
    elements, cast = rows * width, data_bytes < stream_bytes
    stream, data = stream_bytes * elements, data_bytes * elements
    if not backward:
        read = 3 * stream + (stream + data) * cast
        written = 2 * stream + (stream + data) * cast
        return Traffic(read, written + 8 * rows, 10 * elements)
    # Casts both ways; the norm's two passes; the sum of both gradients; gamma times it; it times the residual, summed.
    read = (stream + data) * cast + 2 * 2 * stream + 2 * stream + stream + 3 * stream + stream
    written = (stream + data) * cast + stream + stream + stream + 2 * stream
    return Traffic(read + 8 * rows, written, 17 * elements)
