"""The reversible filters before zstd, and what else runs over every voxel, in two tiers: C and NumPy.

Invariant: both tiers give the same bits for every shape and every int16. The tier is chosen once, when this module is
imported: C where its extension (_filters.c) was built, else NumPy. The environment variable DINOX_FILTERS=numpy or c
asks for one of them, to compare or to test; one that is not there is then an ImportError.

Filters (docs/format.md): `none` the slice itself, little endian; `planes` all low bytes, then all high bytes;
`hilp` the residual of a two-level vertical interpolation, horizontally differenced, in two byte planes whose high
one is sign-corrected. All their arithmetic is modulo 2^16.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

FILTERS = ("none", "planes", "hilp")

_INTERFACE = 1  # that of _filters.c, which says more


class Tier(NamedTuple):
    """One implementation. `filter` and `unfilter` by name; slices int16 (y, x), filtered bytes uint8 (2·y·x,)."""

    name: str
    filter: dict[str, Callable[[np.ndarray, np.ndarray], None]]
    """(slice, filtered): writes `filtered`."""
    unfilter: dict[str, Callable[[np.ndarray, np.ndarray, Scratch], None]]
    """(filtered, slice, scratch): writes the slice, whose rows may be any distance apart."""
    add_histogram: Callable[[np.ndarray, np.ndarray], None]
    """(values, counts): adds contiguous int16 to int64 (4096,), bins of 16 from -32768."""


class Scratch:
    """Buffers that one thread reuses from slice to slice: fresh memory would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._shape = self._numpy_shape = (0, 0)

    def fit(self, shape: tuple[int, int]) -> Scratch:
        """`filtered` for slices of `shape` (y, x), kept while the shape stays."""
        if shape != self._shape:
            self.filtered = np.empty(2 * shape[0] * shape[1], np.uint8)
            self._shape = shape
        return self

    def fit_numpy(self, shape: tuple[int, int]) -> Scratch:
        """What the NumPy tier needs besides: `residual`, `mean`, `sums`."""
        if shape != self._numpy_shape:
            rows, columns = shape
            self.residual = np.empty(shape, np.int16)
            self.mean = np.empty(((rows + 1) // 2, columns), np.int16)
            self.sums = np.empty(shape, np.int32)
            self._numpy_shape = shape
        return self


# --- the NumPy tier ----------------------------------------------------------------------------------------------


def _filter_planes(slice_hu: np.ndarray, filtered: np.ndarray) -> None:
    pairs = slice_hu.astype("<i2", order="C", copy=False).view(np.uint8).reshape(-1, 2)
    np.copyto(filtered.reshape(2, -1), pairs.T)


def _filter_hilp(slice_hu: np.ndarray, filtered: np.ndarray) -> None:
    residual = _residual(slice_hu)
    difference = residual.copy()
    np.subtract(residual[:, 1:], residual[:, :-1], out=difference[:, 1:])
    low, high = filtered.view(np.int8).reshape(2, *difference.shape)
    np.copyto(low, difference, casting="unsafe")
    np.subtract(difference, low, out=difference)
    np.right_shift(difference, 8, out=difference)
    np.copyto(high, difference, casting="unsafe")


def _residual(rows: np.ndarray) -> np.ndarray:
    """Rows 0,4,8… as they are, rows 2,6,10… minus the mean of their neighbours among those, odd rows minus theirs."""
    residual = np.empty_like(rows)
    first, second, _ = _row_groups(len(rows))
    residual[:first] = rows[0::4]
    np.subtract(rows[2::4], _vertical_mean(rows[0::4], second), out=residual[first : first + second])
    np.subtract(rows[1::2], _vertical_mean(rows[0::2], len(rows) // 2), out=residual[first + second :])
    return residual


def _row_groups(num_rows: int) -> tuple[int, int, int]:
    """How many rows there are of y % 4 == 0, of y % 4 == 2, and odd ones."""
    return (num_rows + 3) // 4, (num_rows + 1) // 4, num_rows // 2


def _vertical_mean(known: np.ndarray, count: int) -> np.ndarray:
    """For each of `count` rows between known rows: (up + down) >> 1, with down = up below the last known row."""
    mean = known[:count].copy()
    between = min(count, len(known) - 1)
    mean[:between] += known[1 : between + 1]
    mean[between:] += known[between:count]
    return np.right_shift(mean, 1, out=mean)


def _unfilter_planes(filtered: np.ndarray, out: np.ndarray, scratch: Scratch) -> None:
    low, high = filtered.reshape(2, *out.shape)
    np.multiply(high.view(np.int8), 256, out=out, dtype=np.int16)
    np.add(out, low, out=out)


def _unfilter_hilp(filtered: np.ndarray, out: np.ndarray, scratch: Scratch) -> None:
    low, high = filtered.view(np.int8).reshape(2, *out.shape)
    scratch.fit_numpy((out.shape[0], out.shape[1]))
    _undo_horizontal_difference(low, high, scratch)
    _undo_vertical_prediction(scratch.residual, out, scratch.mean)


def _undo_horizontal_difference(low: np.ndarray, high: np.ndarray, scratch: Scratch) -> None:
    """scratch.residual = cumulative sum along x of low + 256·high, modulo 2^16."""
    np.multiply(high, 256, out=scratch.residual, dtype=np.int16)
    np.add(scratch.residual, low, out=scratch.residual)
    # Summed in 32 bits, which is congruent: NumPy's 16-bit cumsum takes 3 times as long (on x86-64, measured).
    np.cumsum(scratch.residual, axis=1, dtype=np.int32, out=scratch.sums)
    np.copyto(scratch.residual, scratch.sums, casting="unsafe")


def _undo_vertical_prediction(residual: np.ndarray, out: np.ndarray, mean: np.ndarray) -> None:
    first, second, third = _row_groups(len(out))
    out[0::4] = residual[:first]
    _add_vertical_mean(out[0::4], residual[first : first + second], out[2::4], mean[:second])
    _add_vertical_mean(out[0::2], residual[first + second :], out[1::2], mean[:third])


def _add_vertical_mean(known: np.ndarray, residual: np.ndarray, out: np.ndarray, mean: np.ndarray) -> None:
    count = len(out)
    between = min(count, len(known) - 1)
    np.add(known[:between], known[1 : between + 1], out=mean[:between])
    np.add(known[between:count], known[between:count], out=mean[between:])
    np.right_shift(mean, 1, out=mean)
    np.add(mean, residual, out=out)


def _add_histogram(values: np.ndarray, counts: np.ndarray) -> None:
    flat = values.reshape(-1).view(np.uint16)
    # Piece by piece: bincount widens its input to 8 bytes a voxel.
    for begin in range(0, flat.size, 1 << 18):
        # Of the bits of an int16, the sign turned over makes an offset binary: its upper 12 bits are the bin.
        bins = (flat[begin : begin + (1 << 18)] ^ np.uint16(0x8000)) >> np.uint16(4)
        counts += np.bincount(bins, minlength=counts.size)


NUMPY = Tier(
    "numpy",
    {"planes": _filter_planes, "hilp": _filter_hilp},
    {"planes": _unfilter_planes, "hilp": _unfilter_hilp},
    _add_histogram,
)

# --- the choice --------------------------------------------------------------------------------------------------


def _load_c() -> tuple[Tier | None, str]:
    """The C tier, or None; and which instructions it uses, or why it is not there."""
    try:
        # Any: the extension has no stubs, and may not be there.
        extension: Any = importlib.import_module("dinox_io._filters")
    except ModuleNotFoundError:
        return None, "the C extension was not built: no compiler when dinox was installed"
    except ImportError as error:
        return None, f"the C extension does not load: {error}"
    if extension.INTERFACE != _INTERFACE:
        return None, "the C extension is of another version of dinox: install dinox again"

    def unfilter_planes(filtered: np.ndarray, out: np.ndarray, scratch: Scratch) -> None:
        extension.unfilter_planes(filtered, out)

    def unfilter_hilp(filtered: np.ndarray, out: np.ndarray, scratch: Scratch) -> None:
        extension.unfilter_hilp(filtered, out)

    c = Tier(
        "c",
        {"planes": extension.filter_planes, "hilp": extension.filter_hilp},
        {"planes": unfilter_planes, "hilp": unfilter_hilp},
        extension.add_histogram,
    )
    return c, extension.INSTRUCTIONS


def _choose(c: Tier | None, about_c: str, wanted: str | None) -> tuple[Tier, str]:
    """The tier that runs and `describe()` of it; `wanted` is DINOX_FILTERS. ImportError where it is not there."""
    if wanted not in {None, "", "c", "numpy"}:
        raise ImportError(f"DINOX_FILTERS={wanted}: there are c and numpy; unset it for the faster one that is there")
    if wanted == "numpy":
        return NUMPY, "filters: NumPy (DINOX_FILTERS=numpy)"
    if c is not None:
        return c, f"filters: C ({about_c})"
    if wanted == "c":
        raise ImportError(f"DINOX_FILTERS=c, but {about_c}; see docs/format.md, or unset it")
    return NUMPY, f"filters: NumPy ({about_c})"


C, _about_c = _load_c()
TIER, _description = _choose(C, _about_c, os.environ.get("DINOX_FILTERS"))


def tier() -> str:
    """The tier that runs: "c" or "numpy"."""
    return TIER.name


def describe() -> str:
    """One line for a log: the tier that runs, with its instructions, or why it is not the C one."""
    return _description


# --- what others call --------------------------------------------------------------------------------------------


def check_filter(name: str) -> None:
    """ValueError, with the names that exist, for a filter that does not."""
    if name not in FILTERS:
        raise ValueError(f"unknown filter {name!r}: this version knows {', '.join(FILTERS)}")


def apply_filter(slice_hu: np.ndarray, name: str, out: np.ndarray | None = None, tier: Tier = TIER) -> np.ndarray:
    """int16 (y, x) -> uint8 (2·y·x,), the bytes that are compressed; ValueError for an unknown filter.

    `out`, uint8 (2·y·x,) contiguous, is written and returned where given (but for `none`, which needs no memory).
    """
    check_filter(name)
    if name == "none":
        return np.ascontiguousarray(slice_hu, dtype="<i2").view(np.uint8).reshape(-1)
    filtered = np.empty(2 * slice_hu.size, np.uint8) if out is None else out
    tier.filter[name](np.ascontiguousarray(slice_hu, dtype=np.int16), filtered)
    return filtered


def remove_filter(filtered: np.ndarray, name: str, out: np.ndarray, scratch: Scratch, tier: Tier = TIER) -> None:
    """uint8 (2·y·x,) -> int16 (y, x), written into `out`, whose rows may lie apart: a slot of a larger slab will do.

    ValueError for an unknown filter, or an `out` whose columns are not side by side.
    """
    check_filter(name)
    if out.dtype != np.int16 or (out.strides[1] != 2 and out.shape[1] > 1):
        raise ValueError("a slice is decoded into int16 (y, x) with its columns side by side")
    if name == "none":
        np.copyto(out, filtered.view("<i2").reshape(out.shape))
    else:
        tier.unfilter[name](filtered, out, scratch)


def add_histogram(values: np.ndarray, counts: np.ndarray, tier: Tier = TIER) -> None:
    """Adds the counts of int16 values of any shape to int64 (4096,): bins of 16, the first one from -32768."""
    tier.add_histogram(np.ascontiguousarray(values), counts)
