"""Which slices make a window, and which windows a set of volumes has: pure arithmetic on slice numbers.

A window is `depth` slices, `step` apart, around a centre; it is cut from its volume, never from a list of samples.
Invariant: every slice named lies in the volume, whatever the edge policy, and the middle one is the centre.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EDGES = ("clamp", "reflect", "error")


def check_window(depth: int, step: int, edge: str) -> None:
    """ValueError unless depth is odd and positive, step positive, and the edge policy known."""
    if depth < 1 or depth % 2 == 0:
        raise ValueError(f"depth is {depth}; a window has an odd number of slices, so that one is in the middle")
    if step < 1:
        raise ValueError(f"step is {step}; the slices of a window are at least 1 apart")
    if edge not in EDGES:
        raise ValueError(f"edge is {edge!r}, not one of {', '.join(EDGES)}")


def window_slices(center: int, depth: int, step: int, num_slices: int, edge: str) -> np.ndarray:
    """int64 (depth,): the slices of the window around `center` in a volume of `num_slices`.

    Beyond the volume, "clamp" repeats its first or last slice, "reflect" mirrors at it without repeating it (again and
    again where the volume is short), and "error" raises ValueError. IndexError if the centre is not in the volume.
    """
    check_window(depth, step, edge)
    if not 0 <= center < num_slices:
        raise IndexError(f"center {center} is not in a volume of {num_slices} slices")
    slices = center + step * np.arange(-(depth // 2), depth // 2 + 1)
    if edge == "error" and (slices[0] < 0 or slices[-1] >= num_slices):
        raise ValueError(
            f"the window of {depth} slices, {step} apart, around {center} reaches beyond the {num_slices} slices "
            'of its volume; choose another center, or edge="clamp" or "reflect"'
        )
    return inside(slices, num_slices, edge)


def inside(slices: np.ndarray, num_slices: int, edge: str) -> np.ndarray:
    """int64 (s,): slice numbers, those beyond the volume brought into it by the edge policy ("error": left alone)."""
    if edge == "clamp":
        return np.clip(slices, 0, num_slices - 1)
    if edge == "reflect":
        period = max(2 * (num_slices - 1), 1)
        folded = slices % period
        return np.minimum(folded, period - folded) if num_slices > 1 else np.zeros_like(slices)
    return slices


@dataclass(frozen=True, kw_only=True)
class WindowTable:
    """All windows of some volumes, numbered from 0: volume after volume, in each by ascending centre.

    All int64 (v,): volume, its index in the set · centers, how many windows it has · first_center · every, how far
    apart its centres are · step, how far apart the slices of its windows are (both in slices).

    chosen: int64 (n,), for each of the n windows its number among its volume's centres, ascending in each volume, where
    these are not all of them (`limit`); `centers` then counts those that were chosen.
    """

    volume: np.ndarray
    centers: np.ndarray
    first_center: np.ndarray
    every: np.ndarray
    step: np.ndarray
    chosen: np.ndarray | None = None

    @property
    def num_windows(self) -> int:
        return int(self.centers.sum())

    def locate(self, window: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Window numbers (b,) -> index of the volume, centre, step: int64 (b,) each."""
        ends = np.cumsum(self.centers)
        row = np.searchsorted(ends, window, side="right")
        number = window - (ends - self.centers)[row] if self.chosen is None else self.chosen[window]
        center = self.first_center[row] + self.every[row] * number
        return self.volume[row], center, self.step[row]

    def every_of(self, window: np.ndarray) -> np.ndarray:
        """Window numbers (…) -> how far apart the centres of their volumes are, int64 (…)."""
        return self.every[np.searchsorted(np.cumsum(self.centers), window, side="right")]


def table_of(
    volume: np.ndarray,
    num_slices: np.ndarray,
    *,
    depth: int,
    step: np.ndarray | int,
    edge: str,
    every: np.ndarray | int,
) -> WindowTable:
    """The windows of volumes (v,) that have num_slices (v,): every `every`-th centre of each, from its first one.

    step and every, in slices, are one for all volumes or one for each (see `in_slices`). With edge "error" only the
    centres count whose window lies in the volume.
    """
    step, every = (np.broadcast_to(np.asarray(each, np.int64), volume.shape) for each in (step, every))
    check_window(depth, int(step.min(initial=1)), edge)
    if every.min(initial=1) < 1:
        raise ValueError(f"every is {every.min()}; it must be at least 1")
    margin = depth // 2 * step if edge == "error" else np.zeros_like(step)
    possible = np.maximum(num_slices.astype(np.int64) - 2 * margin, 0)
    return WindowTable(volume=volume, centers=-(-possible // every), first_center=margin, every=every, step=step)


def in_slices(distance_mm: float, spacing_mm: np.ndarray) -> np.ndarray:
    """int64 (v,): a distance along z as the nearest whole number of slices of volumes with spacing (v,), at least 1.

    A volume whose spacing is unknown (0, a single slice) gets 1. ValueError for a distance that is not above 0.
    """
    if not 0 < distance_mm < np.inf:
        raise ValueError(f"a distance between slices is {distance_mm} mm; it must be above 0")
    known = spacing_mm > 0
    return np.maximum(np.rint(distance_mm / np.where(known, spacing_mm, np.inf)), 1).astype(np.int64)
