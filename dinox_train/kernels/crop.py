"""Views in one pass over int16 HU: crop, antialiased resize, flip, blur, noise, HU window, gamma, normalise.

    ViewPlan ─▶ weights of each result's pixels (small) ─▶ tile of results: Σ_y w_y · Σ_x w_x · HU ─▶ … ─▶ float32

The reference is `dinox_train/views.py` with `resample.py`, `photometric.py` and `keyed_normal.py`; so are the order of
the steps and the formulae. There a view is a crop as floats, two dense products, and a pass over the results for each
step. Here HU are read as they are, weights are those that are not 0, and the results are written once.

Two kernels: the first makes, for each result along an axis, its first pixel and the weights from there on (a triangle,
a Gaussian of triangles where the view is blurred); the second sums and finishes tiles of results.

Invariants: no pixel beyond a crop is read; a view's pixels depend on its own plan and slice alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinox_model.host_to_device import to_device
from dinox_model.kernels.architecture import architecture
from dinox_model.kernels.language import can_run_on, kernel, tl
from dinox_model.kernels.tiles import Launch, Tiles, tiles_for
from dinox_model.kernels.traffic import Traffic
from dinox_train.resample import BLUR_REACH
from dinox_train.view_plan import ViewPlan

_MARGIN = 1e-3
"""Pixels: how much farther than a triangle its pixels are looked for. Places are rounded to float32, which is finer."""
_SHARP = 1e-3
"""A standard deviation in the place of 0, which nothing divides by."""
_COUNTS = ("batch", "channels", "height", "width", "size", "most_taps")
"""Of the kernels' arguments: one compiled kernel serves all, but for IS_WIDE."""
_LOOK_MARGIN = tl.constexpr(_MARGIN) if tl is not None else _MARGIN


def crop(
    images: Tensor, plan: ViewPlan, views: range, size: int, mean: float, std: float, *, distorted: bool = True
) -> Tensor:
    """Some views of all rows as the network sees them, view-major: float32 (len(views)·b, k, size, size).

    images: int16 HU (b, k, Y, X) on the device, contiguous; views: which of the plan's; mean, std: of windowed values;
    distorted: with the plan's blur, noise and gamma. Equal to `views.render_views` up to the rounding of float32.
    Raises TypeError or ValueError for other images, RuntimeError where Triton does not run on their device.
    """
    if images.dtype != torch.int16:
        raise TypeError(f"images must be int16 HU, not {images.dtype}: what was scaled or windowed before is not HU")
    if images.ndim != 4 or not images.is_contiguous():
        raise ValueError(f"images must be contiguous (b, k, Y, X), not {tuple(images.shape)}")
    if not can_run_on(images.device):
        raise RuntimeError(f"crop: no Triton kernel runs on {images.device}. Set kernels.crop to reference.")
    told = _told(plan, views, size, distorted)
    numbers, places = (to_device(each, images.device) for each in (told.numbers, told.places))
    return _crop_op(images, numbers, places, size, told.taps, mean, std)


class _Told(NamedTuple):
    """What the kernels are told of n views, view-major."""

    numbers: np.ndarray
    """float32 (n, 9): along y and x, edge of the first result from the crop's first pixel on, and pixels of a result
    (negative: mirrored); then sigma of the blur, lower edge and width of the HU window, gamma, sigma of the noise."""
    places: np.ndarray
    """int32 (n, 9): along y and x, the crop's first pixel, its pixels, and pixels of a result; then how many results a
    blur reaches to either side, and the noise's key."""
    taps: int
    """The most pixels that a result has along an axis."""


def _told(plan: ViewPlan, views: range, size: int, distorted: bool) -> _Told:
    def of_views(values: np.ndarray) -> np.ndarray:
        """(b, v, …) to (n, …)."""
        chosen = values[:, views.start : views.stop].swapaxes(0, 1)
        return np.ascontiguousarray(chosen).reshape(-1, *values.shape[2:])

    boxes, flip, width_hu = of_views(plan.boxes), of_views(plan.flip), of_views(plan.width_hu).astype(np.float32)
    nothing = np.zeros(len(flip))
    sigma = of_views(plan.blur_sigma) if distorted else nothing
    noise = of_views(plan.noise_hu) if distorted else nothing
    gamma = of_views(plan.gamma) if distorted else nothing + 1
    low = np.floor(boxes[:, :2]).astype(np.int64)
    high = np.minimum(np.ceil(boxes[:, :2] + boxes[:, 2:]).astype(np.int64), np.tile(plan.sizes, (len(views), 1)))
    start, step = boxes[:, :2] - low, boxes[:, 2:] / size
    # A box of negative width, begun at its right edge, is the mirrored one.
    start[:, 1] += np.where(flip, boxes[:, 3], 0.0)
    reach = np.ceil(BLUR_REACH * sigma).astype(np.int64)
    taps = np.ceil(2 * reach[:, None] * step + 2 * np.maximum(step, 1.0) + 2 * _MARGIN).astype(np.int64)
    taps = np.minimum(taps, high - low)
    step[:, 1] *= np.where(flip, -1.0, 1.0)
    edge = of_views(plan.level_hu).astype(np.float32) - width_hu / np.float32(2)
    numbers = (*start.T, *step.T, np.maximum(sigma, _SHARP), edge, width_hu, gamma, noise)
    places = (*low.T, *(high - low).T, *taps.T, reach, *of_views(plan.noise_key).view(np.int32).T)
    return _Told(
        np.stack(numbers, axis=1).astype(np.float32),
        np.stack(places, axis=1).astype(np.int32),
        int(taps.max(initial=1)),
    )


# --- the kernels -------------------------------------------------------------------------------------------------


@partial(kernel, do_not_specialize=_COUNTS[-2:])
def crop_weights_kernel(
    numbers, places, weights, begins, size, most_taps, OUTPUTS: tl.constexpr, TAPS: tl.constexpr
):  # fmt: skip
    """Of OUTPUTS results along one axis of one view: weights float32 (n, 2, most_taps, size), those beyond the view's
    own taps left as they are, and begins int32 (n, 2, size), counted in the crop.

    Grid: (n, 2, ceil(size / OUTPUTS)).
    """
    view, axis = tl.program_id(0), tl.program_id(1)
    output = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    start, step = tl.load(numbers + view * 9 + axis), tl.load(numbers + view * 9 + 2 + axis)
    sigma = tl.load(numbers + view * 9 + 4)
    count, taps = tl.load(places + view * 9 + 2 + axis), tl.load(places + view * 9 + 4 + axis)
    reach = tl.load(places + view * 9 + 6)
    support = tl.maximum(tl.abs(step), 1.0)
    ends = (tl.maximum(output - reach, 0), tl.minimum(output + reach, size - 1))
    nearest = tl.minimum(start + (ends[0] + 0.5) * step, start + (ends[1] + 0.5) * step)
    begin = tl.floor(nearest - support - (0.5 + _LOOK_MARGIN)).to(tl.int32) + 1
    begin = tl.maximum(tl.minimum(begin, count - taps), 0)
    line = (view * 2 + axis).to(tl.int64)
    tl.store(begins + line * size + output, begin, mask=output < size)
    around = 2 * size * (reach // (2 * size) + 1)
    own_taps = (2.0 * support).to(tl.int32) + 2
    for first in range(0, taps, TAPS):
        tap = first + tl.arange(0, TAPS)
        pixel = begin[:, None] + tap[None, :]
        mixed = tl.zeros((OUTPUTS, TAPS), tl.float32)
        mass = 0.0
        for away in range(-reach, reach + 1):
            # Beyond both edges the result goes on as its mirror image.
            other = (output + away + around) % (2 * size)
            other = tl.minimum(other, 2 * size - 1 - other)
            centre = start + (other + 0.5) * step
            own = tl.floor(centre - support - (0.5 + _LOOK_MARGIN)).to(tl.int32) + 1
            norm = tl.zeros((OUTPUTS,), tl.float32)
            for own_first in range(0, own_taps, TAPS):
                near = own[:, None] + own_first + tl.arange(0, TAPS)[None, :]
                triangle = tl.maximum(1.0 - tl.abs(near + 0.5 - centre[:, None]) / support, 0.0)
                norm += tl.sum(tl.where((near >= 0) & (near < count), triangle, 0.0), axis=1)
            share = away / sigma
            share = tl.exp(-0.5 * share * share)
            mass += share
            triangle = tl.maximum(1.0 - tl.abs(pixel + 0.5 - centre[:, None]) / support, 0.0)
            mixed += triangle * (share / tl.maximum(norm, 1e-9))[:, None]
        place = line * most_taps * size + tap[None, :] * size + output[:, None]
        tl.store(weights + place, mixed / mass, mask=(tap < taps)[None, :] & (output < size)[:, None])


@kernel
def _mixed(bits):
    """`keyed_normal._mix_`, of int32."""
    bits ^= (bits >> 16) & 0xFFFF
    bits *= 0x7FEB352D
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= -0x7B935975
    return bits ^ ((bits >> 16) & 0xFFFF)


@kernel
def _normal(index, count, first_key, second_key):
    """Numbers `index` of the `count` that `keyed_normal` gives for a key, float32 of mean 0 and variance 1."""
    pairs = (count + 1) // 2
    bits = _mixed(tl.where(index < pairs, index, index - pairs) ^ first_key)
    bits = _mixed(bits + second_key)
    radius = tl.sqrt(-2.0 * tl.log((((bits >> 16) & 0xFFFF).to(tl.float32) + 0.5) * 1.52587890625e-05))
    angle = (bits & 0xFFFF).to(tl.float32) * 9.587379924285257e-05  # 2 pi / 2^16
    return radius * tl.where(index < pairs, tl.cos(angle), tl.sin(angle))


@partial(kernel, do_not_specialize=_COUNTS)
def crop_kernel(
    images, numbers, places, weights, begins, out, batch, channels, height, width, size, most_taps, mean, std,
    IS_WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """A tile of results (BLOCK_Y, BLOCK_X) of one view of one slice. Grid: (n·channels, tiles along y, along x).

    IS_WIDE: width and size are multiples of 16.
    """
    if IS_WIDE:  # a product with 16 is what the compiler sees to be a multiple
        width, size = width // 16 * 16, size // 16 * 16
    view, channel = tl.program_id(0) // channels, tl.program_id(0) % channels
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = tl.program_id(2) * BLOCK_X + tl.arange(0, BLOCK_X)
    number, place = numbers + view * 9, places + view * 9
    taps_y, taps_x = tl.load(place + 4), tl.load(place + 5)
    weights_y = weights + (view * 2).to(tl.int64) * most_taps * size
    weights_x = weights_y + most_taps * size
    begins += (view * 2).to(tl.int64) * size
    begin_y = tl.load(begins + y, mask=y < size, other=0)
    begin_x = tl.load(begins + size + x, mask=x < size, other=0)
    first_line = tl.min(tl.where(y < size, begin_y, 2147483647), axis=0)
    last_line = tl.max(tl.where(y < size, begin_y + taps_y, 0), axis=0)
    image = images + ((view % batch) * channels + channel).to(tl.int64) * height * width
    pixels = image + (tl.load(place) + first_line) * width + tl.load(place + 1)
    results = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    for line in range(first_line, last_line):
        narrow = tl.zeros((BLOCK_X,), tl.float32)
        for first in range(0, taps_x, TAPS):
            tap = first + tl.arange(0, TAPS)
            mask = (tap < taps_x)[:, None] & (x < size)[None, :]
            hu = tl.load(pixels + begin_x[None, :] + tap[:, None], mask=mask, other=0).to(tl.float32)
            weight = tl.load(weights_x + tap[:, None] * size + x[None, :], mask=mask, other=0.0)
            narrow += tl.sum(hu * weight, axis=0)
        tap_y = line - begin_y
        mask_y = (tap_y >= 0) & (tap_y < taps_y) & (y < size)
        weight_y = tl.load(weights_y + tap_y * size + y, mask=mask_y, other=0.0)
        results += weight_y[:, None] * narrow[None, :]
        pixels += width
    noise_hu = tl.load(number + 8)
    if noise_hu > 0.0:
        index = (channel * size + y)[:, None] * size + x[None, :]
        results += noise_hu * _normal(index, channels * size * size, tl.load(place + 7), tl.load(place + 8))
    shown = (results - tl.load(number + 5)) / tl.load(number + 6)
    shown = tl.minimum(tl.maximum(shown, 0.0), 1.0)
    gamma = tl.load(number + 7)
    if gamma != 1.0:
        shown = tl.where(shown > 0.0, tl.exp2(gamma * tl.log2(tl.maximum(shown, 1e-30))), 0.0)
    out += tl.program_id(0).to(tl.int64) * size * size
    mask = (y < size)[:, None] & (x < size)[None, :]
    tl.store(out + y[:, None] * size + x[None, :], (shown - mean) / std, mask=mask)


@torch.library.custom_op("dinox::crop", mutates_args=())
def _crop_op(images: Tensor, numbers: Tensor, places: Tensor, size: int, taps: int, mean: float, std: float) -> Tensor:
    batch, channels, height, width = images.shape
    num_views, device = len(numbers), images.device
    out = torch.empty((num_views, channels, size, size), device=device)
    of_weights, of_results = _tiles(architecture(device))
    if not out.numel():
        return out
    weights = torch.empty((num_views, 2, taps, size), device=device)
    begins = torch.empty((num_views, 2, size), dtype=torch.int32, device=device)
    crop_weights_kernel[(num_views, 2, -(-size // of_weights.sizes["OUTPUTS"]))](
        numbers, places, weights, begins, size, taps, **of_weights.sizes,
        num_warps=of_weights.num_warps, num_stages=of_weights.num_stages,
    )  # fmt: skip
    grid = (num_views * channels, -(-size // of_results.sizes["BLOCK_Y"]), -(-size // of_results.sizes["BLOCK_X"]))
    is_wide = width % 16 == 0 and size % 16 == 0
    crop_kernel[grid](
        images, numbers, places, weights, begins, out, batch, channels, height, width, size, taps, mean, std,
        IS_WIDE=is_wide, **of_results.sizes, num_warps=of_results.num_warps, num_stages=of_results.num_stages,
    )  # fmt: skip
    return out


@_crop_op.register_fake
def _(images: Tensor, numbers: Tensor, places: Tensor, size: int, taps: int, mean: float, std: float) -> Tensor:
    return numbers.new_empty((len(numbers), images.shape[1], size, size))


def _tiles(arch: str) -> tuple[Tiles, Tiles]:
    of_weights, of_results = (tiles_for(name, arch=arch, dtype="int16") for name in ("crop_weights", "crop"))
    if of_weights is None or of_results is None:
        raise RuntimeError(f"crop: no tiles for {arch}; set kernels.crop to reference")
    return of_weights, of_results


# --- what it costs -----------------------------------------------------------------------------------------------


def launches(arch: str) -> Iterator[Launch]:
    """Each way the kernels are shipped for an architecture: slices and views with sides in multiples of 16, or not."""
    of_weights, of_results = _tiles(arch)
    pointers = {"numbers": "*fp32", "places": "*i32", "weights": "*fp32", "begins": "*i32"}
    yield Launch(
        kernel="crop_weights",
        function=crop_weights_kernel,
        signature={**pointers, **dict.fromkeys(_COUNTS[-2:], "i32")},
        constants={},
        aligned=tuple(pointers),
        tiles=of_weights,
        dtype="int16",
    )
    results = {"images": "*i16", **pointers, "out": "*fp32"}
    for is_wide in (True, False):
        yield Launch(
            kernel="crop",
            function=crop_kernel,
            signature={**results, **dict.fromkeys(_COUNTS, "i32"), "mean": "fp32", "std": "fp32"},
            constants={"IS_WIDE": is_wide},
            aligned=tuple(results),
            tiles=of_results,
            dtype="int16",
            facts={"wide": is_wide},
        )


def traffic(num_views: int, depth: int, box: int, size: int, reach: int, block_y: int = 16) -> Traffic:
    """Of both kernels, for views of square boxes of `box` pixels. Each pixel of a box counts once, and so do the
    weights, which a view's tiles share; reach: results that a blur reaches to either side.
    """
    scale = box / size
    taps = int(np.ceil(2 * reach * scale + 2 * max(scale, 1.0)))
    tables = 4 * 2 * size * (taps + 1)
    lines = -(-size // block_y) * (block_y * scale + taps)
    sums = 2 * depth * lines * (size * taps + block_y * size)
    made = 2 * size * taps * (2 * reach + 1) * (8 + 6 * (2 * max(scale, 1.0) + 2) / 8)
    return Traffic(
        int(num_views * (2 * depth * box**2 + tables)),
        int(num_views * (4 * depth * size**2 + tables)),
        int(num_views * (sums + made)),
    )


def traffic_reference(num_views: int, depth: int, box: int, size: int, reach: int) -> Traffic:
    """Of `views.py` in eager torch on a device, all rows in one product; without noise and gamma.

    Bytes of a value. Of the box's pixels: cut 2 and 2, to float32 2 and 4, the first product's operand 4. Of the
    weights (results x box, both axes): six passes of 4. Of the first product (box x results): written 4, the weights
    that are spread over the slices 4 and 4, both operands of the second 8. Of the results: the second product, the copy
    to the others, three steps of the window, two to normalise, the last copy, 4 and 4 each. A blur's own weights
    (results x results): 41 and 33, and those of the box once more into its product.
    """
    pixels, results, half = depth * box**2, depth * size**2, depth * box * size
    weights, mixed = 2 * (size + 2 * reach) * box, 2 * size * box
    blur = size * (size + 2 * reach)
    read = 8 * pixels + 24 * weights + 2 * mixed + 12 * half + 28 * results
    written = 6 * pixels + 24 * weights + 8 * half + 32 * results
    flops = 2 * half * box + 2 * half * size
    if reach:
        read, written = read + 8 * weights + 41 * blur, written + 4 * weights + 4 * mixed + 33 * blur
        flops += 2 * mixed * (size + 2 * reach)
    return Traffic(num_views * read, num_views * written, num_views * flops)


def traffic_compiled(num_views: int, depth: int, box: int, size: int, reach: int) -> Traffic:
    """What a compiler that fuses all but the products would leave of `traffic_reference`: the crop as float32 (read as
    int16), each set of weights written and read once, two products, and one pass over the results."""
    pixels, results, half = depth * box**2, depth * size**2, depth * box * size
    weights, mixed = 2 * (size + 2 * reach) * box, 2 * size * box
    blur = size * (size + 2 * reach) if reach else 0
    operands = weights + mixed + blur if reach else weights
    flops = traffic_reference(num_views, depth, box, size, reach).flops
    read = (2 + 4) * pixels + 4 * operands + 4 * half + 4 * results
    written = 4 * pixels + 4 * operands + 4 * half + 8 * results
    return Traffic(num_views * read, num_views * written, flops)
