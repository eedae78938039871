"""A micro-batch of a step, made from a micro-batch of windows: views, masks and draws, as an objective needs them.

Invariant: everything is a function of (seed, position, row, view), the settings and the size of the global batch; how
that is cut into micro-batches changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinox_model import Preprocess, ViTConfig
from dinox_model.host_to_device import to_device
from dinox_train.masking import draw_masks, draw_patches
from dinox_train.network_draws import PassDraws, draw_pass, draw_unknown_scale
from dinox_train.objectives.objective import Needs
from dinox_train.view_batch import NUM_GLOBAL, Masked, ViewBatch
from dinox_train.views import Crop, ViewPlan, ViewSettings, draw_views, render_global_undistorted, render_views


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How windows become what a step needs; the same for all updates of a stage."""

    seed: int
    views: ViewSettings
    needs: Needs
    vit: ViTConfig
    preprocess: Preprocess
    batch_size: int
    """Of the global batch."""
    unknown_scale: float = 0.0
    """Share of the views whose physical scale the student is not told."""
    crop: Crop | None = None
    """What renders views; None: the torch of `views.py`."""


class GlobalBatch:
    """One global batch in the making: what its micro-batches share."""

    def __init__(self, recipe: Recipe, position: int, *, gram: bool, draws: bool = True) -> None:
        """gram: whether a Gram teacher is there and wants its views; draws: whether the networks draw (training)."""
        self.recipe, self.position = recipe, position
        self._gram, self._draws = gram, draws
        self._global_draws = self._draw_pass("global", NUM_GLOBAL) if draws else None
        self._local_draws = self._draw_pass("local", recipe.views.num_local) if draws else None

    def _draw_pass(self, name: str, num_views: int) -> PassDraws | None:
        recipe = self.recipe
        return draw_pass(
            recipe.vit,
            name,
            seed=recipe.seed,
            position=self.position,
            batch_size=recipe.batch_size,
            num_views=num_views,
        )

    def micro_batch(
        self,
        images: Tensor,
        rows: np.ndarray,
        sizes: np.ndarray,
        spacing_mm: np.ndarray,
        labels: np.ndarray | None = None,
    ) -> tuple[ViewBatch, ViewPlan]:
        """Of windows int16 HU (b, depth, Y, X) on the device; rows (b,): their places in the global batch; sizes (b, 2)
        and spacing_mm (b, 3) as `draw_views` takes them; labels float (b,)."""
        recipe, device = self.recipe, images.device
        views, preprocess = recipe.views, recipe.preprocess
        plan = draw_views(
            views, seed=recipe.seed, position=self.position, rows=rows, sizes=sizes, spacing_mm=spacing_mm
        )
        global_views, local_views = render_views(images, plan, views, preprocess.mean, preprocess.std, crop=recipe.crop)
        gram_views = gram_mm = gram_patches = None
        if self._gram:
            side = recipe.needs.gram_size or views.global_size
            gram_views = render_global_undistorted(
                images, plan, side, preprocess.mean, preprocess.std, crop=recipe.crop
            )
            gram_mm = self._mm(plan.mm_per_pixel[:, :NUM_GLOBAL] * (views.global_size / side), device)
            gram_patches = self._gram_patches(rows, device)
        told_mm = self._told_mm(plan, rows)
        batch = ViewBatch(
            global_views,
            local_views,
            masked=self._masked(rows, device),
            global_draws=self._global_draws and self._global_draws.of_rows(rows).to(device),
            local_draws=self._local_draws and self._local_draws.of_rows(rows).to(device),
            teacher_mm=self._mm(plan.mm_per_pixel[:, :NUM_GLOBAL], device),
            global_mm=self._mm(told_mm[:, :NUM_GLOBAL], device),
            local_mm=self._mm(told_mm[:, NUM_GLOBAL:], device),
            gram_views=gram_views,
            gram_mm=gram_mm,
            gram_patches=gram_patches,
            labels=None if labels is None else to_device(labels.astype(np.float32), device),
        )
        return batch, plan

    def _masked(self, rows: np.ndarray, device: torch.device) -> Masked | None:
        recipe = self.recipe
        if recipe.needs.masks is None:
            return None
        side = recipe.views.global_size // recipe.vit.patch_size
        plan = draw_masks(
            recipe.needs.masks,
            seed=recipe.seed,
            position=self.position,
            rows=rows,
            batch_size=recipe.batch_size,
            num_views=NUM_GLOBAL,
            grid=(side, side),
        )
        return Masked(*(to_device(part, device) for part in (plan.masks, plan.indices, plan.weights)))

    def _gram_patches(self, rows: np.ndarray, device: torch.device) -> Tensor | None:
        recipe = self.recipe
        num_patches, count = (recipe.views.global_size // recipe.vit.patch_size) ** 2, recipe.needs.gram_patches
        if count is None or count >= num_patches:
            return None
        drawn = draw_patches(
            seed=recipe.seed,
            position=self.position,
            rows=rows,
            num_views=NUM_GLOBAL,
            num_patches=num_patches,
            count=count,
        )
        return to_device(drawn, device)

    def _told_mm(self, plan: ViewPlan, rows: np.ndarray) -> np.ndarray:
        """mm_per_pixel (b, V, 2) of the plan, NaN where the student is not told."""
        recipe, mm = self.recipe, plan.mm_per_pixel
        if not (self._draws and recipe.unknown_scale):
            return mm
        unknown = draw_unknown_scale(
            recipe.unknown_scale, seed=recipe.seed, position=self.position, rows=rows, num_views=mm.shape[1]
        )
        return np.where(unknown[..., None], np.nan, mm)

    def _mm(self, mm: np.ndarray, device: torch.device) -> Tensor | None:
        """float32 (V*b, 2), view-major, of mm (b, V, 2), where the network wants to know."""
        if not self.recipe.vit.uses_mm_per_pixel:
            return None
        return to_device(mm.swapaxes(0, 1).reshape(-1, 2).astype(np.float32), device)


def pieces(rows: int, size: int) -> Sequence[np.ndarray]:
    """The places 0 … rows - 1 in pieces of `size`, the last one of what is left."""
    return [np.arange(first, min(first + size, rows)) for first in range(0, rows, size)]
