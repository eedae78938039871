"""Slices as a loader hands them out, still filtered (docs/format.md), to int16 HU, on the device that trains.

    bytes (b, depth, n) ─▶ low + 256·high ─▶ running sum along x ─▶ + mean of the rows above and below ─▶ int16 HU

`hilp` looks serial and is not: a row is a running sum of its own bytes, and what it needs of others are rows of the
same four: y = 4q stands alone, 4q + 2 lies between 4q and 4q + 4, and the odd ones between those. So one program makes
four rows from five sums, and no program waits for another.

Invariant: bit for bit what dinox_io's tiers give, for every filter, shape and byte; air beyond a slice's true size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dinox_model.host_to_device import to_device
from dinox_model.kernels.architecture import architecture
from dinox_model.kernels.language import can_run_on, kernel, tl
from dinox_model.kernels.tiles import Launch, tiles_for
from dinox_model.kernels.traffic import Traffic
from dinox_model.preprocess import AIR_HU

NONE, PLANES, HILP = 0, 1, 2
"""Filters by their number in a shard's index (docs/format.md)."""
_COUNTS = ("slice_bytes", "depth", "height", "width")
"""Of the kernel's arguments: one compiled kernel serves all, but for IS_WIDE."""
_AIR = tl.constexpr(AIR_HU) if tl is not None else AIR_HU
_HILP = tl.constexpr(HILP) if tl is not None else HILP
_NONE = tl.constexpr(NONE) if tl is not None else NONE


def unfilter(filtered: Tensor, sizes: np.ndarray, filters: np.ndarray, slice_size: tuple[int, int]) -> Tensor:
    """int16 HU (b, depth, Y, X) of b windows of filtered slices, by the kernel, on the device of `filtered`.

    filtered: uint8 (b, depth, n), contiguous, n at least 2·Y·X: the first 2·y·x bytes of each are a slice's, the others
    are not read. sizes: int (b, 2), on the host, true y and x of each window's slices, at most slice_size = (Y, X).
    filters: int (b,), on the host: NONE, PLANES or HILP. -1024 beyond a slice's true size.

    Raises TypeError or ValueError for other dtypes and shapes, RuntimeError where Triton does not run on the device.
    """
    _check(filtered, sizes, filters, slice_size)
    if not can_run_on(filtered.device):
        raise RuntimeError(
            f"unfilter: no Triton kernel runs on {filtered.device}. Set kernels.unfilter to reference (the same on "
            "that device in torch), or leave it out: the loader's threads then undo the filter."
        )
    facts = np.concatenate((sizes, np.asarray(filters)[:, None]), axis=1).astype(np.int32)
    told = to_device(facts, filtered.device)
    is_wide = not any(number % 16 for number in (*facts[:, 1].tolist(), filtered.shape[2], slice_size[1]))
    return _unfilter_op(filtered, told, *slice_size, is_wide)


def unfilter_reference(filtered: Tensor, sizes: np.ndarray, filters: np.ndarray, slice_size: tuple[int, int]) -> Tensor:
    """As `unfilter`, in torch, on any device: windows of one size and filter together. The same bits."""
    _check(filtered, sizes, filters, slice_size)
    batch, depth = filtered.shape[:2]
    images = torch.full((batch, depth, *slice_size), AIR_HU, dtype=torch.int16, device=filtered.device)
    kinds, which = np.unique(np.concatenate((sizes, np.asarray(filters)[:, None]), axis=1), axis=0, return_inverse=True)
    for number, (rows, columns, name) in enumerate(kinds.tolist()):
        chosen = np.flatnonzero(which.reshape(-1) == number)
        index = torch.from_numpy(chosen).to(filtered.device)
        slices = filtered[:, :, : 2 * rows * columns].index_select(0, index)
        hu = _REFERENCES[name](slices, rows, columns)
        images[:, :, :rows, :columns] = images[:, :, :rows, :columns].index_copy(0, index, hu)
    return images


def _check(filtered: Tensor, sizes: np.ndarray, filters: np.ndarray, slice_size: tuple[int, int]) -> None:
    if filtered.dtype != torch.uint8:
        raise TypeError(f"filtered slices are uint8, not {filtered.dtype}")
    if filtered.ndim != 3 or not filtered.is_contiguous():
        raise ValueError(f"filtered slices must be contiguous (b, depth, bytes), not {tuple(filtered.shape)}")
    height, width = slice_size
    if filtered.shape[2] < 2 * height * width:
        raise ValueError(f"a slice of {height} x {width} has {2 * height * width} bytes, not {filtered.shape[2]}")
    count = filtered.shape[0]
    if np.shape(sizes) != (count, 2) or np.shape(filters) != (count,):
        raise ValueError(
            f"sizes must be ({count}, 2) and filters ({count},), not {np.shape(sizes)}, {np.shape(filters)}"
        )
    if np.any(np.asarray(sizes) < 1) or np.any(np.asarray(sizes) > slice_size):
        raise ValueError(f"sizes must lie between 1 x 1 and {height} x {width}: {np.asarray(sizes).tolist()}")
    if not np.isin(filters, (NONE, PLANES, HILP)).all():
        raise ValueError(f"filters must be {NONE}, {PLANES} or {HILP}, not {np.asarray(filters).tolist()}")


# --- the reference -----------------------------------------------------------------------------------------------


def _wrapped(values: Tensor) -> Tensor:
    """int32 modulo 2^16 as int16. The bits are taken as they are: no conversion has to be trusted to wrap."""
    return (((values & 0xFFFF) ^ 0x8000) - 0x8000).to(torch.int16)


def _reference_none(slices: Tensor, rows: int, columns: int) -> Tensor:
    low, high = slices.unflatten(2, (rows, columns, 2)).to(torch.int32).unbind(-1)
    return _wrapped(low + (high << 8))


def _reference_planes(slices: Tensor, rows: int, columns: int) -> Tensor:
    low, high = slices.unflatten(2, (2, rows, columns)).to(torch.int32).unbind(2)
    return _wrapped(low + (high << 8))


def _reference_hilp(slices: Tensor, rows: int, columns: int) -> Tensor:
    low, high = slices.view(torch.int8).unflatten(2, (2, rows, columns)).to(torch.int32).unbind(2)
    # Sums of 32 bits are congruent to those of 16, and overflow nowhere: columns times 2^15 fit.
    residual = _wrapped((low + (high << 8)).cumsum(dim=3, dtype=torch.int32))
    first, second = (rows + 3) // 4, (rows + 1) // 4
    hu = residual.new_empty(residual.shape)
    hu[:, :, 0::4] = residual[:, :, :first]
    _add_mean(hu[:, :, 0::4], residual[:, :, first : first + second], hu[:, :, 2::4])
    _add_mean(hu[:, :, 0::2], residual[:, :, first + second :], hu[:, :, 1::2])
    return hu


def _add_mean(known: Tensor, residual: Tensor, out: Tensor) -> None:
    """out (…, m, x) = residual + (up + down) >> 1, its neighbours among `known`; down is up below the last one."""
    count = residual.shape[2]
    up = known[:, :, :count].to(torch.int32)
    down = torch.cat((known[:, :, 1:], known[:, :, -1:]), dim=2)[:, :, :count].to(torch.int32)
    out.copy_(_wrapped((_wrapped(up + down).to(torch.int32) >> 1) + residual))


_REFERENCES = {NONE: _reference_none, PLANES: _reference_planes, HILP: _reference_hilp}


# --- the kernel --------------------------------------------------------------------------------------------------


@kernel
def _sum_along_row(low, row, rows, columns, x, before, there):
    """Running sums (QUADS, BLOCK_X) from column x on of the stacked rows `row` (QUADS,), `before` what precedes them
    (QUADS,); and the new `before`. int32, congruent modulo 2^16."""
    place = row[:, None] * columns + x[None, :]
    mask = there[:, None] & (x[None, :] < columns)
    value = tl.load(low + place, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.int32)
    high = tl.load(low + rows * columns + place, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.int32)
    value += high * 256
    return tl.cumsum(value, axis=1) + before[:, None], before + tl.sum(value, axis=1)


@kernel
def _between(up, down, residual):
    """residual + mean(up, down), int32 sign-extended from 16 bits, which is how the sum is cut before it is halved."""
    return ((((up + down) << 16) >> 17) + residual << 16) >> 16


@kernel
def _store_row(out, hu, y, x, rows, columns, height, width):
    hu = tl.where((y < rows)[:, None] & (x < columns)[None, :], hu, _AIR)
    mask = (y < height)[:, None] & (x < width)[None, :]
    tl.store(out + y[:, None] * width + x[None, :], hu.to(tl.int16), mask=mask)


@partial(kernel, do_not_specialize=_COUNTS)
def unfilter_kernel(
    filtered, facts, out, slice_bytes, depth, height, width, IS_WIDE: tl.constexpr, QUADS: tl.constexpr,
    BLOCK_X: tl.constexpr,
):  # fmt: skip
    """QUADS times four rows of one slice. Grid: (b·depth, ceil(Y / (4 QUADS))).

    facts: int32 (b, 3), y, x and filter. IS_WIDE: all x, width and slice_bytes are multiples of 16, and so loads wide.
    """
    if IS_WIDE:  # a product with 16 is what the compiler sees to be a multiple
        slice_bytes, width = slice_bytes // 16 * 16, width // 16 * 16
    slice_number = tl.program_id(0)
    fact = facts + (slice_number // depth) * 3
    rows, columns, name = tl.load(fact), tl.load(fact + 1), tl.load(fact + 2)
    if IS_WIDE:
        columns = tl.multiple_of(columns, 16)
    low = filtered + slice_number.to(tl.int64) * slice_bytes
    out += slice_number.to(tl.int64) * height * width
    quad = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    y = 4 * quad
    if name == _HILP:
        # Places of the rows in the stack of the three groups; `second` and `odd` are where those groups begin.
        second = (rows + 3) // 4
        odd = second + (rows + 1) // 4
        zero = tl.zeros((QUADS,), tl.int32)
        sum_0, sum_1, sum_2, sum_3, sum_4 = zero, zero, zero, zero, zero
        for begin in range(0, width, BLOCK_X):
            x = begin + tl.arange(0, BLOCK_X)
            row_0, sum_0 = _sum_along_row(low, quad, rows, columns, x, sum_0, y < rows)
            row_4, sum_4 = _sum_along_row(low, quad + 1, rows, columns, x, sum_4, y + 4 < rows)
            row_2, sum_2 = _sum_along_row(low, second + quad, rows, columns, x, sum_2, y + 2 < rows)
            row_1, sum_1 = _sum_along_row(low, odd + 2 * quad, rows, columns, x, sum_1, y + 1 < rows)
            row_3, sum_3 = _sum_along_row(low, odd + 2 * quad + 1, rows, columns, x, sum_3, y + 3 < rows)
            row_0, row_4 = (row_0 << 16) >> 16, (row_4 << 16) >> 16
            row_2 = _between(row_0, tl.where((y + 4 < rows)[:, None], row_4, row_0), row_2)
            row_1 = _between(row_0, tl.where((y + 2 < rows)[:, None], row_2, row_0), row_1)
            row_3 = _between(row_2, tl.where((y + 4 < rows)[:, None], row_4, row_2), row_3)
            _store_row(out, row_0, y, x, rows, columns, height, width)
            _store_row(out, row_1, y + 1, x, rows, columns, height, width)
            _store_row(out, row_2, y + 2, x, rows, columns, height, width)
            _store_row(out, row_3, y + 3, x, rows, columns, height, width)
    else:
        # Of value i the bytes i and i + plane, or 2 i and 2 i + 1.
        step = tl.where(name == _NONE, 2, 1)
        plane = tl.where(name == _NONE, 1, rows * columns)
        for line in range(4):
            for begin in range(0, width, BLOCK_X):
                x = begin + tl.arange(0, BLOCK_X)
                place = ((y + line)[:, None] * columns + x[None, :]) * step
                mask = (y + line < rows)[:, None] & (x < columns)[None, :]
                value = tl.load(low + place, mask=mask, other=0).to(tl.int32)
                value += tl.load(low + plane + place, mask=mask, other=0).to(tl.int32) * 256
                _store_row(out, value, y + line, x, rows, columns, height, width)


@torch.library.custom_op("dinox::unfilter", mutates_args=())
def _unfilter_op(filtered: Tensor, facts: Tensor, height: int, width: int, is_wide: bool) -> Tensor:
    batch, depth, slice_bytes = filtered.shape
    out = torch.empty((batch, depth, height, width), dtype=torch.int16, device=filtered.device)
    tiles = tiles_for("unfilter", arch=architecture(filtered.device), dtype="int16")
    if tiles is None:
        raise RuntimeError(f"unfilter: no tiles for {architecture(filtered.device)}; set kernels.unfilter to reference")
    rows_at_once = 4 * tiles.sizes["QUADS"]
    if out.numel():
        unfilter_kernel[(batch * depth, -(-height // rows_at_once))](
            filtered, facts, out, slice_bytes, depth, height, width, IS_WIDE=is_wide, **tiles.sizes,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out


@_unfilter_op.register_fake
def _(filtered: Tensor, facts: Tensor, height: int, width: int, is_wide: bool) -> Tensor:
    return filtered.new_empty((*filtered.shape[:2], height, width), dtype=torch.int16)


# --- what it costs -----------------------------------------------------------------------------------------------


def launches(arch: str) -> Iterator[Launch]:
    """Each way the kernel is shipped for an architecture."""
    tiles = tiles_for("unfilter", arch=arch, dtype="int16")
    signature = {"filtered": "*u8", "facts": "*i32", "out": "*i16", **dict.fromkeys(_COUNTS, "i32")}
    for is_wide in (True, False):
        if tiles is not None:
            yield Launch(
                kernel="unfilter",
                function=unfilter_kernel,
                signature=signature,
                constants={"IS_WIDE": is_wide},
                aligned=("filtered", "facts", "out"),
                tiles=tiles,
                dtype="int16",
                facts={"wide": is_wide},
            )


def traffic(batch: int, depth: int, height: int, width: int) -> Traffic:
    """Of the kernel, on `hilp` slices of (height, width). The row that two programs share counts once: it is read at
    the same time, from the cache."""
    values = batch * depth * height * width
    return Traffic(2 * values, 2 * values)


def traffic_reference(batch: int, depth: int, height: int, width: int) -> Traffic:
    """Of `unfilter_reference` in eager torch, on a batch of one size. Bytes of a value, operation by operation.

    Read: chosen 2, to int32 2, shifted 4, added 8, summed 4, `_wrapped` 16, rows of the first group 1/2, the 3/4 that
    are predicted 60 each, into the images 6. Written: the air 2, then 2, 8, 4, 4, 4, 14, 1/2, 56, 4.
    """
    values = batch * depth * height * width
    read, written = 2 + 2 + 4 + 8 + 4 + 16 + 0.5 + 0.75 * 60 + 6, 2 + 2 + 8 + 4 + 4 + 4 + 14 + 0.5 + 0.75 * 56 + 4
    return Traffic(int(read * values), int(written * values))


def traffic_compiled(batch: int, depth: int, height: int, width: int) -> Traffic:
    """What a compiler that fuses all but the running sum and the three groups of rows, each of which needs the one
    before, would leave of `traffic_reference`: residual, first, second and odd rows, and into the images."""
    values = batch * depth * height * width
    read, written = 2 + 0.5 + (0.5 + 0.5) + (1 + 1) + 2, 2 + 0.5 + 0.5 + 1 + 2
    return Traffic(int(read * values), int(written * values))
