"""The pixels of places: windows read from the set, as views of retrieval or as whole slices, as the network takes them.

Invariant: HU become floats by the functions of the training; a batch is a run or a slice, so memory does not grow with
the gallery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinox_io import ShardSet
from dinox_io.hounsfield import AIR_HU
from dinox_model import Preprocess
from dinox_train.views import draw_views, render_views, render_whole_slices
from monitoring.places import Place
from monitoring.protocol import SEED, VIEW_POSITION, Sizes, view_settings


@dataclass(frozen=True)
class Shown:
    """Some images as a network takes them."""

    pixels: Tensor
    """float32 (b, k, side, side)."""
    mm_per_pixel: Tensor
    """float32 (b, 2), along y and x."""


class Windows:
    """Reads places of some sets; `depth` slices a window."""

    def __init__(self, sets: Sequence[ShardSet], depth: int, sizes: Sizes, device: torch.device) -> None:
        self._sets, self._depth, self._sizes, self._device = sets, depth, sizes, device
        self._views = view_settings(sizes.view)

    def views(self, places: Sequence[Place], first: int, preprocess: Preprocess) -> tuple[Shown, Shown]:
        """Two views of each place. first: the number of the first one among all that are looked at."""
        images, sizes, spacing_mm = self._read(places)
        rows = np.arange(first, first + len(places))
        plan = draw_views(self._views, seed=SEED, position=VIEW_POSITION, rows=rows, sizes=sizes, spacing_mm=spacing_mm)
        both, _ = render_views(images, plan, self._views, preprocess.mean, preprocess.std)
        one, other = both.split(len(places))
        mm = torch.from_numpy(plan.mm_per_pixel.astype(np.float32)).to(self._device)
        return Shown(one, mm[:, 0]), Shown(other, mm[:, 1])

    def whole(self, place: Place, preprocess: Preprocess) -> Shown:
        """The whole slices of one window, for pictures."""
        images, sizes, spacing_mm = self._read([place])
        side = self._sizes.picture
        mm = (spacing_mm[:, 1:] * sizes / side).astype(np.float32)
        return Shown(render_whole_slices(images, sizes, side, preprocess), torch.from_numpy(mm).to(self._device))

    def gray(self, place: Place, preprocess: Preprocess) -> np.ndarray:
        """The middle slice of a window as `whole` shows it, float32 (side, side) in [0, 1]."""
        shown = self.whole(place, preprocess).pixels[0, self._depth // 2]
        return np.clip((shown * preprocess.std + preprocess.mean).cpu().numpy(), 0, 1)

    def _read(self, places: Sequence[Place]) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """int16 HU (b, k, Y, X) on the device, true sizes int (b, 2), spacing in mm (b, 3)."""
        records = [self._sets[place.stack.set].volumes[place.stack.volume] for place in places]
        sizes = np.array([record.shape[1:] for record in records])
        images = np.full((len(places), self._depth, *sizes.max(axis=0)), AIR_HU, np.int16)
        for image, place, size in zip(images, places, sizes, strict=True):
            shards = self._sets[place.stack.set]
            window = shards.read_window(place.stack.volume, place.center, self._depth, place.stack.step)
            image[:, : size[0], : size[1]] = window
        spacing_mm = np.array([record.spacing_mm for record in records], np.float64)
        return torch.from_numpy(images).to(self._device), sizes, spacing_mm
