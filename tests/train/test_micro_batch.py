"""A micro-batch: its part of the global batch, however that is cut; what the student is told and what is compared."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinox_model import Preprocess, ViTConfig
from dinox_train.masking import MaskSettings, draw_masks, draw_patches
from dinox_train.micro_batch import GlobalBatch, Recipe, pieces
from dinox_train.objectives.objective import Needs
from dinox_train.view_batch import ViewBatch
from dinox_train.views import ViewSettings, draw_views, render_global_undistorted, render_views

VIT = ViTConfig(
    width=32, num_layers=2, num_heads=2, mlp_hidden=64, drop_path=0.5, rope_shift=0.2, scale_conditioning=True
)
RECIPE = Recipe(
    seed=3,
    views=ViewSettings(global_size=64, local_size=32, num_local=2),
    needs=Needs(masks=MaskSettings(), gram=True, gram_size=128, gram_patches=5),
    vit=VIT,
    preprocess=Preprocess(),
    batch_size=6,
    unknown_scale=0.5,
)
IMAGES = torch.randint(-1000, 400, (6, 3, 70, 90), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
SIZES, SPACING = np.full((6, 2), [70, 90]), np.full((6, 3), [2.0, 0.7, 0.8])


def made(rows: np.ndarray, recipe: Recipe = RECIPE, position: int = 4, **more: Any) -> ViewBatch:
    batch = GlobalBatch(recipe, position, gram=recipe.needs.gram, **more)
    return batch.micro_batch(IMAGES[rows], rows, SIZES[rows], SPACING[rows], labels=rows % 2)[0]


def by_row(part: Tensor, rows: np.ndarray) -> Tensor:
    """View-major (V*b, …) as (b, V, …)."""
    return part.unflatten(0, (-1, len(rows))).swapaxes(0, 1)


def test_pieces_are_parts_of_the_whole() -> None:
    everything = np.arange(6)
    whole = made(everything)
    for rows in (np.array([4]), np.array([5, 0, 2])):
        part = made(rows)
        for name in ("global_views", "local_views", "gram_views", "gram_patches"):
            assert torch.equal(by_row(getattr(part, name), rows), by_row(getattr(whole, name), everything)[rows]), name
        for name in ("teacher_mm", "global_mm", "local_mm", "gram_mm"):
            ours, theirs = by_row(getattr(part, name), rows), by_row(getattr(whole, name), everything)[rows]
            assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1)), name
        assert torch.equal(by_row(part.masked.masks, rows), by_row(whole.masked.masks, everything)[rows])
        assert part.labels.tolist() == [row % 2 for row in rows]


def test_kept_rows_are_those_of_the_global_batch() -> None:
    whole = made(np.arange(6)).global_draws
    kept = [set() for _ in whole.kept]
    for first in (0, 2, 4):
        rows = np.arange(first, first + 2)
        for number, indices in enumerate(made(rows).global_draws.kept):
            kept[number] |= {(int(index) // 2) * 6 + int(rows[int(index) % 2]) for index in indices}
    assert kept == [set(indices.tolist()) for indices in whole.kept]


def test_the_student_is_not_told_some_scales_and_the_teacher_all() -> None:
    batches = [made(np.arange(6), position=position) for position in range(20)]
    for batch in batches:
        assert not batch.teacher_mm.isnan().any()
        unknown = batch.global_mm.isnan()
        assert torch.equal(unknown[:, 0], unknown[:, 1])
        assert torch.equal(batch.global_mm[~unknown], batch.teacher_mm[~unknown])
    told = torch.cat([part.isnan()[:, 0] for batch in batches for part in (batch.global_mm, batch.local_mm)])
    assert 0.4 < told.float().mean() < 0.6
    assert not torch.equal(batches[0].global_mm.isnan(), batches[1].global_mm.isnan())
    for known in (made(np.arange(6), draws=False), made(np.arange(6), replace(RECIPE, unknown_scale=0.0))):
        assert torch.equal(known.global_mm, known.teacher_mm)
        assert not known.local_mm.isnan().any()


def test_a_scale_is_that_of_the_view() -> None:
    batch = made(np.arange(6))
    torch.testing.assert_close(batch.gram_mm, batch.teacher_mm / 2)
    assert len(set(batch.teacher_mm[:, 0].tolist())) == 12


def test_what_nobody_asks_for_is_absent() -> None:
    plain = replace(RECIPE, needs=Needs(), vit=replace(VIT, drop_path=0.0, rope_shift=None, scale_conditioning=False))
    batch = made(np.arange(2), plain)
    absent = ("masked", "global_draws", "local_draws", "teacher_mm", "global_mm", "local_mm", "gram_views", "gram_mm")
    assert [name for name in (*absent, "gram_patches") if getattr(batch, name) is not None] == []


def test_compared_patches_are_all_where_there_are_no_more() -> None:
    batch = made(np.arange(6))
    assert batch.gram_patches.shape == (12, 5)
    assert batch.gram_patches.max() < 16
    assert made(np.arange(6), replace(RECIPE, needs=replace(RECIPE.needs, gram_patches=16))).gram_patches is None


def test_pieces_hold_every_row_once() -> None:
    assert [piece.tolist() for piece in pieces(5, 2)] == [[0, 1], [2, 3], [4]]
    assert pieces(0, 2) == []


def test_it_holds_what_is_drawn_and_rendered_at_its_key() -> None:
    """Each part by the function that makes it, called alone with seed 3, position 4 and these rows."""
    rows, views, side = np.array([4, 1]), RECIPE.views, 4
    batch = made(rows)
    plan = draw_views(views, seed=3, position=4, rows=rows, sizes=SIZES[rows], spacing_mm=SPACING[rows])
    for found, expected in zip(
        (batch.global_views, batch.local_views), render_views(IMAGES[rows], plan, views, 0.5, 0.25), strict=True
    ):
        assert torch.equal(found, expected)
    assert torch.equal(batch.gram_views, render_global_undistorted(IMAGES[rows], plan, 128, 0.5, 0.25))
    key = {"seed": 3, "position": 4, "rows": rows, "num_views": 2}
    masks = draw_masks(RECIPE.needs.masks, batch_size=6, grid=(side, side), **key)
    assert torch.equal(batch.masked.masks, torch.from_numpy(masks.masks))
    assert torch.equal(batch.masked.indices, torch.from_numpy(masks.indices))
    assert torch.equal(batch.masked.weights, torch.from_numpy(masks.weights))
    patches = draw_patches(num_patches=side**2, count=5, **key)
    assert torch.equal(batch.gram_patches, torch.from_numpy(patches))
    mm = plan.mm_per_pixel.swapaxes(0, 1).reshape(-1, 2)
    assert torch.equal(batch.teacher_mm, torch.from_numpy(mm[:4].astype(np.float32)))
    assert batch.num_images == 2


def test_a_gram_teacher_that_is_not_there_yet_gets_no_views() -> None:
    rows = np.arange(2)
    batch, _ = GlobalBatch(RECIPE, 4, gram=False).micro_batch(IMAGES[rows], rows, SIZES[rows], SPACING[rows])
    assert [batch.gram_views, batch.gram_mm, batch.gram_patches, batch.labels] == [None] * 4
    assert torch.equal(batch.global_views, made(rows).global_views), "and nothing else depends on it"
