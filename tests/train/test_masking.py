"""Masks: exact constant counts, keyed and cut anyhow, and equal to the drawing of one crop after the other."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_train.keyed import uniform
from dinox_train.masking import MaskPlan, MaskSettings, draw_masks, draw_patches, masked_counts


def draw(
    batch: int = 8, grid: tuple[int, int] = (7, 9), rows: np.ndarray | None = None, seed: int = 5, **more: object
) -> MaskPlan:
    position = more.pop("position", 3)
    return draw_masks(
        MaskSettings(**more),  # type: ignore[arg-type]
        seed=seed,
        position=position,  # type: ignore[arg-type]
        rows=np.arange(batch) if rows is None else rows,
        batch_size=batch,
        num_views=2,
        grid=grid,
    )


def one_crop(
    seed: int, position: int, row: int, view: int, wanted: int, grid: tuple[int, int], blocks: bool
) -> np.ndarray:
    """The same, one crop, one try and one patch at a time."""
    height, width = grid
    mask = np.zeros(grid, bool)
    numbers = uniform(seed, f"masks.blocks.{view}", position, np.array([row]), 1, 128)[0, 0].reshape(32, 4)
    in_vain = 0
    for area_number, aspect_number, top_number, left_number in numbers if blocks else ():
        remaining = wanted - int(mask.sum())
        if remaining == 0 or in_vain == 10:
            break
        area = 4 + (min(remaining, height * width / 2) - 4) * area_number
        aspect = math.exp(math.log(0.3) + aspect_number * (math.log(1 / 0.3) - math.log(0.3)))
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        in_vain += 1
        if tall > height or wide > width:
            continue
        top, left = int((height - tall + 1) * top_number), int((width - wide + 1) * left_number)
        added = sum(not mask[y, x] for y in range(top, top + tall) for x in range(left, left + wide))
        if 0 < added <= remaining:
            mask[top : top + tall, left : left + wide] = True
            in_vain = 0
    single = uniform(seed, f"masks.patches.{view}", position, np.array([row]), 1, height * width)[0, 0]
    flat = mask.reshape(-1)
    for patch in sorted(np.flatnonzero(~flat), key=lambda patch: single[patch])[: wanted - int(flat.sum())]:
        flat[patch] = True
    return flat


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("grid", [(14, 14), (5, 8), (2, 2), (1, 6)])
def test_equals_the_drawing_of_one_crop_after_the_other(grid: tuple[int, int], blocks: bool) -> None:
    plan = draw(batch=10, grid=grid, blocks=blocks, share=(0.1, 0.7), fraction=0.8)
    for crop, mask in enumerate(plan.masks):
        slow = one_crop(5, 3, crop % 10, crop // 10, int(mask.sum()), grid, blocks)
        assert np.array_equal(mask, slow)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 12),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    fraction=st.floats(0, 1),
    blocks=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_counts_are_those_of_the_formula_whatever_is_drawn(
    batch: int, height: int, width: int, bounds: list[float], fraction: float, blocks: bool, seed: int
) -> None:
    share = (bounds[0], bounds[1])
    plan = draw(batch, (height, width), seed=seed, position=seed % 7, share=share, fraction=fraction, blocks=blocks)
    masked = int(2 * batch * fraction)
    shares = np.linspace(*share, masked + 1)[1:]
    expected = sorted([int(height * width * each) for each in shares] + [0] * (2 * batch - masked))
    assert sorted(plan.masks.sum(axis=1).tolist()) == expected
    counts = masked_counts(
        MaskSettings(share=share, fraction=fraction), num_crops=2 * batch, num_patches=height * width
    )
    assert counts.tolist() == expected

    assert plan.masks.shape == (2 * batch, height * width)
    assert plan.masks.dtype == bool
    assert plan.indices.dtype == np.int64
    assert plan.weights.dtype == np.float32
    assert np.array_equal(np.flatnonzero(plan.masks.reshape(-1)), plan.indices)
    crops = plan.indices // (height * width)
    assert np.allclose(plan.weights, 1 / plan.masks.sum(axis=1)[crops])


def test_the_known_numbers_of_masked_patches() -> None:
    for batch, side, expected in ((64, 14, 3771), (64, 16, 4941), (16, 32, 5114)):
        for position in range(2):
            assert len(draw(batch, (side, side), position=position).indices) == expected


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 10), cuts=st.lists(st.integers(0, 10), max_size=3), seed=st.integers(0, 2**31))
def test_a_batch_may_be_cut_anywhere(batch: int, cuts: list[int], seed: int) -> None:
    whole = draw(batch, (4, 5), seed=seed)
    edges = [0, *sorted(min(cut, batch) for cut in cuts), batch]
    total = 0
    for first, last in itertools.pairwise(edges):
        piece = draw(batch, (4, 5), np.arange(first, last), seed)
        crops = [view * batch + row for view in range(2) for row in range(first, last)]
        assert np.array_equal(piece.masks, whole.masks[crops])
        assert np.array_equal(piece.indices, np.flatnonzero(whole.masks[crops]))
        assert np.allclose(piece.weights, 1 / whole.masks[crops].sum(axis=1)[piece.indices // 20])
        total += len(piece.indices)
    assert total == len(whole.indices)


def test_rows_in_any_order_and_another_position_or_seed_is_another_draw() -> None:
    whole = draw(8)
    turned = draw(8, rows=np.array([5, 2]))
    assert np.array_equal(turned.masks, whole.masks[[5, 2, 13, 10]])
    assert np.array_equal(draw(8).masks, whole.masks)
    for other in (draw(8, position=4), draw(8, seed=6)):
        assert (other.masks != whole.masks).any(axis=1).mean() > 0.4
    first, second = np.split(whole.masks, 2)
    assert not np.array_equal(first, second)


def test_which_crops_are_masked_is_shuffled_over_rows_and_views() -> None:
    counts = np.stack([draw(6, (8, 8), position=position).masks.sum(axis=1) for position in range(300)])
    masked = (counts > 0).mean(axis=0)
    assert abs(masked - 0.5).max() < 0.12  # five deviations
    assert abs(counts.mean(axis=0) - counts.mean()).max() < 4
    single_view = (counts[:, :6] > 0).sum(axis=1)
    assert single_view.min() < 3 < single_view.max()  # the halves are not those of the views


def test_blocks_hang_together_and_single_patches_do_not() -> None:
    def neighbours(blocks: bool) -> float:
        """Share of a masked patch's right neighbours that are masked too."""
        masks = draw(32, (14, 14), blocks=blocks, share=(0.3, 0.3), fraction=1.0).masks.reshape(-1, 14, 14)
        return float((masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, :-1].sum())

    assert neighbours(blocks=True) > 0.65
    assert neighbours(blocks=False) == pytest.approx(0.3, abs=0.05)


def test_every_patch_has_its_turn() -> None:
    often = np.mean([draw(16, (6, 6), position=position).masks.mean(axis=0) for position in range(40)], axis=0)
    assert often.min() > 0.05
    assert often.max() < 0.3


def test_a_subset_of_patches_is_keyed_and_without_repetition() -> None:
    def subset(rows: np.ndarray, count: int = 5, position: int = 2) -> np.ndarray:
        return draw_patches(seed=1, position=position, rows=rows, num_views=2, num_patches=20, count=count)

    whole = subset(np.arange(4))
    assert whole.shape == (8, 5)
    assert all(len(set(crop)) == 5 and list(crop) == sorted(crop) for crop in whole.tolist())
    assert np.array_equal(subset(np.array([2])), whole[[2, 6]])
    assert not np.array_equal(subset(np.arange(4), position=3), whole)
    assert np.array_equal(subset(np.arange(2), count=20), np.tile(np.arange(20), (4, 1)))
    often = np.bincount(np.concatenate([subset(np.arange(50), position=p) for p in range(20)]).ravel(), minlength=20)
    assert often.min() > 0.8 * often.mean()


@pytest.mark.parametrize("wrong", [{"share": (0.5, 0.1)}, {"share": (0.1, 1.5)}, {"fraction": -0.1}])
def test_shares_that_are_none_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="share"):
        MaskSettings(**wrong)  # type: ignore[arg-type]


def test_rows_outside_the_batch_and_too_many_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="batch has 4"):
        draw(4, rows=np.array([4]))
    with pytest.raises(ValueError, match="21 different"):
        draw_patches(seed=0, position=0, rows=np.arange(1), num_views=1, num_patches=20, count=21)
