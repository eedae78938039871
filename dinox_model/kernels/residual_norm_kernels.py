"""The Triton kernels of residual_norm.py, and how they are launched. What they compute, and the legend, stand there.

Invariant: a launch writes every element of the tensors that it is given to write, whatever the width; what a variant
does not have (residual, gamma, bias, a gradient of x') is handed another pointer and never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dinox_model.kernels.architecture import ARCHITECTURES, architecture
from dinox_model.kernels.language import kernel, tl
from dinox_model.kernels.tiles import Launch, Tiles, tiles_for

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
"""Of the data. fp64 is for tests of gradients; it is shipped for no architecture."""
PROGRAMS = 256
"""Most programs of a backward: each writes a row of partial sums, so that many would cost more than they hide."""
WIDTHS = (192, 384, 1024, 1536, 4096)
"""Compiled ahead: a preset's for each row of the table of tiles. Other widths run with the tiles of their row."""


@kernel
def forward_kernel(
    x,
    residual,
    gamma,
    weight,
    bias,
    added,
    normed,
    statistics,
    rows,
    eps,
    WIDTH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GAMMA: tl.constexpr,
    BIAS: tl.constexpr,
    CENTRED: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """A block of rows. What is not there (residual, gamma, bias) is handed another pointer and not read."""
    wide = tl.float64 if DOUBLE else tl.float32
    row_R = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column_D = tl.arange(0, BLOCK_WIDTH)
    in_width_D = column_D < WIDTH
    at_RD = row_R.to(tl.int64)[:, None] * WIDTH + column_D[None, :]
    inside_RD = (row_R < rows)[:, None] & in_width_D[None, :]
    x_RD = tl.load(x + at_RD, mask=inside_RD, other=0.0).to(wide)
    if RESIDUAL:
        residual_RD = tl.load(residual + at_RD, mask=inside_RD, other=0.0).to(wide)
        if GAMMA:
            residual_RD = residual_RD * tl.load(gamma + column_D, mask=in_width_D, other=0.0).to(wide)[None, :]
        stored_RD = (x_RD + residual_RD).to(added.dtype.element_ty)
        tl.store(added + at_RD, stored_RD, mask=inside_RD)
        x_RD = stored_RD.to(wide)
    if CENTRED:
        mean_R = tl.sum(x_RD, axis=1) / WIDTH
        tl.store(statistics + rows + row_R, mean_R, mask=row_R < rows)
        x_RD = tl.where(inside_RD, x_RD - mean_R[:, None], 0.0)
    inverse_R = 1.0 / tl.sqrt(tl.sum(x_RD * x_RD, axis=1) / WIDTH + eps)
    tl.store(statistics + row_R, inverse_R, mask=row_R < rows)
    y_RD = x_RD * inverse_R[:, None] * tl.load(weight + column_D, mask=in_width_D, other=0.0).to(wide)[None, :]
    if BIAS:
        y_RD += tl.load(bias + column_D, mask=in_width_D, other=0.0).to(wide)[None, :]
    tl.store(normed + at_RD, y_RD.to(normed.dtype.element_ty), mask=inside_RD)


@kernel
def backward_kernel(
    added,
    residual,
    gamma,
    weight,
    statistics,
    d_added,
    d_normed,
    d_x,
    d_residual,
    partial,
    rows,
    rows_each,
    programs,
    WIDTH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GAMMA: tl.constexpr,
    BIAS: tl.constexpr,
    PASSED: tl.constexpr,
    CENTRED: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """`rows_each` rows (a multiple of BLOCK_ROWS). PASSED: x' has a gradient of its own, `d_added`. `partial`: sums of
    these rows for weight, bias, gamma, as many as there are: (k, p, d)."""
    wide = tl.float64 if DOUBLE else tl.float32
    program = tl.program_id(0)
    column_D = tl.arange(0, BLOCK_WIDTH)
    in_width_D = column_D < WIDTH
    weight_D = tl.load(weight + column_D, mask=in_width_D, other=0.0).to(wide)
    if GAMMA:
        gamma_D = tl.load(gamma + column_D, mask=in_width_D, other=0.0).to(wide)
    of_weight_RD = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), wide)
    of_bias_RD = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), wide)
    of_gamma_RD = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), wide)
    for start in range(0, rows_each, BLOCK_ROWS):
        row_R = program * rows_each + start + tl.arange(0, BLOCK_ROWS)
        in_rows_R = row_R < rows
        at_RD = row_R.to(tl.int64)[:, None] * WIDTH + column_D[None, :]
        inside_RD = in_rows_R[:, None] & in_width_D[None, :]
        n_RD = tl.load(added + at_RD, mask=inside_RD, other=0.0).to(wide)
        dy_RD = tl.load(d_normed + at_RD, mask=inside_RD, other=0.0).to(wide)
        inverse_R = tl.load(statistics + row_R, mask=in_rows_R, other=0.0)
        if CENTRED:
            mean_R = tl.load(statistics + rows + row_R, mask=in_rows_R, other=0.0)
            n_RD = tl.where(inside_RD, n_RD - mean_R[:, None], 0.0)
        n_RD *= inverse_R[:, None]
        of_weight_RD += dy_RD * n_RD
        u_RD = dy_RD * weight_D[None, :]
        g_RD = u_RD - n_RD * (tl.sum(u_RD * n_RD, axis=1) / WIDTH)[:, None]
        if CENTRED:
            g_RD -= (tl.sum(u_RD, axis=1) / WIDTH)[:, None]
        g_RD *= inverse_R[:, None]
        if BIAS:
            of_bias_RD += dy_RD
        if PASSED:
            g_RD += tl.load(d_added + at_RD, mask=inside_RD, other=0.0).to(wide)
        tl.store(d_x + at_RD, g_RD.to(d_x.dtype.element_ty), mask=inside_RD)
        if RESIDUAL:
            scaled_RD = g_RD
            if GAMMA:
                of_gamma_RD += g_RD * tl.load(residual + at_RD, mask=inside_RD, other=0.0).to(wide)
                scaled_RD = g_RD * gamma_D[None, :]
            tl.store(d_residual + at_RD, scaled_RD.to(d_residual.dtype.element_ty), mask=inside_RD)
    at_D = program * WIDTH + column_D
    tl.store(partial + at_D, tl.sum(of_weight_RD, axis=0), mask=in_width_D)
    if BIAS:
        tl.store(partial + programs * WIDTH + at_D, tl.sum(of_bias_RD, axis=0), mask=in_width_D)
    if GAMMA:
        number = 2 if BIAS else 1
        tl.store(partial + number * programs * WIDTH + at_D, tl.sum(of_gamma_RD, axis=0), mask=in_width_D)


def run_forward(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    normed: Tensor,
    statistics: Tensor,
    *,
    eps: float,
    centred: bool,
) -> None:
    """Writes x' to `added` (where there is a residual), y to `normed`, and each row's 1 / deviation, and where
    `centred` (LayerNorm) its mean, to `statistics`, (1 or 2, r) of the dtype of the arithmetic. Raises ValueError where
    the table has no tiles."""
    rows, width = statistics.shape[1], x.shape[-1]
    if rows == 0:
        return
    tiles = _tiles("residual_norm", x)
    forward_kernel[(-(-rows // tiles.sizes["BLOCK_ROWS"]),)](
        x,
        x if residual is None else residual,
        weight if gamma is None else gamma,
        weight,
        weight if bias is None else bias,
        normed if added is None else added,
        normed,
        statistics,
        rows,
        eps,
        **_constants(width, residual is not None, gamma is not None, bias is not None, centred, statistics.dtype),
        **tiles.arguments(),
    )


def run_backward(
    added: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    d_added: Tensor | None,
    d_normed: Tensor,
    d_x: Tensor,
    d_residual: Tensor | None,
    *,
    has_bias: bool,
    centred: bool,
) -> Tensor:
    """Writes the gradients of x and the residual; returns those of weight, bias and gamma, as many as there are, as
    (k, d) of the dtype of the arithmetic. `residual` is needed with gamma only. Raises ValueError as `run_forward`."""
    rows, width = statistics.shape[1], added.shape[-1]
    parameters = 1 + has_bias + (gamma is not None)
    if rows == 0:
        return statistics.new_zeros((parameters, width))
    tiles = _tiles("residual_norm_backward", added)
    each = rows_each(rows, tiles.sizes["BLOCK_ROWS"])
    programs = -(-rows // each)
    partial = statistics.new_empty((parameters, programs, width))
    backward_kernel[(programs,)](
        added,
        added if residual is None else residual,
        weight if gamma is None else gamma,
        weight,
        statistics,
        d_normed if d_added is None else d_added,
        d_normed,
        d_x,
        d_x if d_residual is None else d_residual,
        partial,
        rows,
        each,
        programs,
        **_constants(width, d_residual is not None, gamma is not None, has_bias, centred, statistics.dtype),
        PASSED=d_added is not None,
        **tiles.arguments(),
    )
    return partial.sum(dim=1)


def rows_each(rows: int, block_rows: int) -> int:
    """Rows of one program of the backward: whole blocks, as few as `PROGRAMS` programs allow."""
    blocks = -(-rows // block_rows)
    return -(-blocks // PROGRAMS) * block_rows


def _tiles(name: str, x: Tensor) -> Tiles:
    arch, dtype, width = architecture(x.device), DTYPES[x.dtype], x.shape[-1]
    tiles = tiles_for(name, arch=arch, dtype=dtype, length=width)
    if tiles is None:
        raise ValueError(f"{name}: no tiles for {arch}, {dtype}, width {width}; use residual_norm_reference")
    return tiles


def _constants(
    width: int, residual: bool, gamma: bool, bias: bool, centred: bool, compute: torch.dtype
) -> dict[str, Any]:
    return {
        "WIDTH": width,
        "RESIDUAL": residual,
        "GAMMA": gamma,
        "BIAS": bias,
        "CENTRED": centred,
        "DOUBLE": compute == torch.float64,
        "BLOCK_WIDTH": 1 << (width - 1).bit_length(),
    }


def launches(arch: str) -> Iterator[Launch]:
    """The ways it is shipped for `arch`. All WIDTHS: LayerNorm after a residual with LayerScale, as autocast has it
    (stream and parameters fp32, residual and y bf16). Width 1024 alone: the same in fp32, fp16 and bf16, then RMSNorm,
    without LayerScale, and without a residual."""
    ARCHITECTURES[arch]  # KeyError: no such architecture
    everything = {"residual": True, "gamma": True, "bias": True, "centred": True}
    for width in WIDTHS:
        yield from _launches(arch, width, "fp32", "bf16", **everything)
    for dtype in ("fp32", "fp16", "bf16"):
        yield from _launches(arch, 1024, dtype, dtype, **everything)
    for lacking in (("bias", "centred"), ("gamma",), ("residual", "gamma")):
        yield from _launches(arch, 1024, "fp32", "bf16", **(everything | dict.fromkeys(lacking, False)))


def _launches(arch: str, width: int, stream: str, data: str, **parts: bool) -> Iterator[Launch]:
    """Forward and backward of one variant: the stream, x' and parameters of one dtype, residual and y of another."""
    constants = _constants(width, parts["residual"], parts["gamma"], parts["bias"], parts["centred"], torch.float32)
    block = {"BLOCK_WIDTH": constants.pop("BLOCK_WIDTH")}
    wide, narrow = f"*{stream}", f"*{data}"
    forward = {"x": wide, "residual": narrow, "gamma": wide, "weight": wide, "bias": wide, "added": wide}
    forward |= {"normed": narrow, "statistics": "*fp32", "rows": "i32", "eps": "fp32"}
    backward = {"added": wide, "residual": narrow, "gamma": wide, "weight": wide, "statistics": "*fp32"}
    backward |= {"d_added": wide, "d_normed": narrow, "d_x": wide, "d_residual": narrow, "partial": "*fp32"}
    backward |= dict.fromkeys(("rows", "rows_each", "programs"), "i32")
    for name, function, signature, more in (
        ("residual_norm", forward_kernel, forward, {}),
        ("residual_norm_backward", backward_kernel, backward, {"PASSED": parts["residual"]}),
    ):
        tiles = tiles_for(name, arch=arch, dtype=stream, length=width)
        if tiles is not None:
            yield Launch(
                kernel=name,
                function=function,
                signature=signature,
                constants=constants | block | more,
                aligned=tuple(argument for argument, kind in signature.items() if kind.startswith("*")),
                tiles=tiles,
                dtype=data,
                facts={"width": width, "stream": stream, **parts},
            )
