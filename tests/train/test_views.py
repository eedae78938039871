"""Views: boxes inside their slices, keyed draws, HU windows that keep what they should show, and rows left alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinox_model.preprocess import Preprocess
from dinox_train.views import SUBPIXEL, ViewPlan, ViewSettings, draw_views, render_views, render_whole_slices

SMALL = ViewSettings(global_size=32, local_size=16, num_local=3)
LUNG_HU, SOFT_HU = -850, 40
MEAN, STD = 0.5, 0.25


def draw(view_settings: ViewSettings = SMALL, *, seed: int = 0, position: int = 0, rows=4, size=(64, 64)) -> ViewPlan:
    rows = np.arange(rows) if isinstance(rows, int) else np.asarray(rows)
    return draw_views(
        view_settings,
        seed=seed,
        position=position,
        rows=rows,
        sizes=np.broadcast_to(np.asarray(size, np.int32), (len(rows), 2)),
        spacing_mm=np.tile([2.5, 0.7, 0.8], (len(rows), 1)),
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-1000, 1000, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int16)


def numbers_of(plan: ViewPlan) -> list[np.ndarray]:
    return [plan.boxes, plan.level_hu, plan.width_hu, plan.flip, plan.mm_per_pixel]


def gray(view: Tensor) -> Tensor:
    """Back from normalised to [0, 1]."""
    return view * STD + MEAN


def slow_view(image: np.ndarray, plan: ViewPlan, row: int, view: int, size: int) -> np.ndarray:
    """One view in plain loops and fp64: triangle weights of the touched pixels, HU window, normalisation."""
    top, left, height, width = plan.boxes[row, view]

    def axis(start: float, length: float, limit: int) -> np.ndarray:
        scale = length / size
        support = max(scale, 1.0)
        weights = np.zeros((size, limit))
        for i, j in itertools.product(range(size), range(math.floor(start), min(math.ceil(start + length), limit))):
            weights[i, j] = max(0.0, 1 - abs(j + 0.5 - (start + (i + 0.5) * scale)) / support)
        return weights / weights.sum(axis=1, keepdims=True)

    true_y, true_x = plan.sizes[row]
    hu = axis(top, height, true_y) @ image[:, :true_y, :true_x].astype(np.float64) @ axis(left, width, true_x).T
    low = plan.level_hu[row, view] - plan.width_hu[row, view] / 2
    shown = (np.clip((hu - low) / plan.width_hu[row, view], 0, 1) - MEAN) / STD
    return shown[:, :, ::-1] if plan.flip[row, view] else shown


# ------------------------------------------------------------------ drawing


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    aspect=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
    seed=st.integers(0, 1000),
)
def test_boxes_lie_inside_the_true_size(size: tuple[int, int], scale, aspect, seed: int) -> None:
    view_settings = ViewSettings(global_scale=tuple(scale), local_scale=tuple(scale), aspect=tuple(aspect))
    boxes = draw(view_settings, seed=seed, size=size).boxes
    assert (boxes[..., :2] >= 0).all()
    assert (boxes[..., 2:] >= 1).all()
    assert (boxes[..., :2] + boxes[..., 2:] <= size).all()
    assert np.array_equal(boxes * SUBPIXEL, np.round(boxes * SUBPIXEL))


def test_area_and_aspect_are_those_of_the_settings() -> None:
    boxes = draw(ViewSettings(), rows=2000, size=(512, 512)).boxes
    area = boxes[..., 2] * boxes[..., 3] / 512**2
    aspect = boxes[..., 3] / boxes[..., 2]
    assert aspect.min() >= 0.749
    assert aspect.max() <= 1.335
    for views, (low, high) in ((slice(0, 2), (0.32, 1.0)), (slice(2, 10), (0.05, 0.32))):
        assert area[:, views].min() >= low - 1e-4
        assert area[:, views].max() <= high
        # Uniform: no area is drawn less often because its box is hard to fit.
        quartiles = np.quantile(area[:, views], [0.25, 0.5, 0.75])
        assert quartiles == pytest.approx(low + (high - low) * np.array([0.25, 0.5, 0.75]), abs=0.02)
    assert np.median(np.log(aspect[:, 2:])) == pytest.approx(0, abs=0.01)


def test_a_slice_that_is_not_square_still_gets_the_whole_area() -> None:
    whole = ViewSettings(global_scale=(1.0, 1.0))
    boxes = draw(whole, size=(100, 400)).boxes[:, :2]
    assert boxes[..., 2:] == pytest.approx(np.broadcast_to([100.0, 400.0], (4, 2, 2)), abs=2 / SUBPIXEL)


def test_windows_and_flips_follow_the_settings() -> None:
    plan = draw(ViewSettings(flip_probability=0.25), rows=2000)
    assert plan.level_hu.min() >= -500
    assert plan.level_hu.max() <= 0
    assert np.median(plan.level_hu) == pytest.approx(-250, abs=15)
    assert plan.width_hu.min() >= 800
    assert plan.width_hu.max() <= 2000
    assert np.median(plan.width_hu) == pytest.approx(math.sqrt(800 * 2000), rel=0.03)  # log-uniform
    assert plan.flip.mean() == pytest.approx(0.25, abs=0.02)
    assert not draw().flip.any()


def test_mm_per_pixel_is_spacing_times_crop_over_size() -> None:
    plan = draw()
    sides = np.array([32, 32, 16, 16, 16])
    for row, view in itertools.product(range(4), range(5)):
        height, width = plan.boxes[row, view, 2:]
        expected = [0.7 * height / sides[view], 0.8 * width / sides[view]]
        assert plan.mm_per_pixel[row, view] == pytest.approx(expected)


def test_draws_are_equal_on_replay_and_differ_between_rows_positions_and_seeds() -> None:
    plan = draw()
    for name in ("boxes", "level_hu", "width_hu"):
        once = getattr(plan, name)
        assert np.array_equal(once, getattr(draw(), name))
        for other in (draw(position=1), draw(seed=1), draw(rows=np.arange(4, 8))):
            assert not np.any(np.all(np.atleast_3d(once == getattr(other, name)), axis=2))
        flat = once.reshape(4 * 5, -1)
        assert len(np.unique(flat, axis=0)) == 20  # also twins, two rows of one window, are seen differently


@settings(max_examples=30)
@given(cut=st.integers(0, 6), order=st.permutations(range(6)))
def test_draws_do_not_depend_on_the_cut_into_micro_batches(cut: int, order: list[int]) -> None:
    whole = draw(rows=6)
    parts = [draw(rows=np.arange(6)[part]) for part in (slice(0, cut), slice(cut, 6))]
    shuffled = draw(rows=order)
    for number, once in enumerate(numbers_of(whole)):
        assert np.array_equal(once, np.concatenate([numbers_of(part)[number] for part in parts]))
        assert np.array_equal(once[order], numbers_of(shuffled)[number])


def test_another_number_of_local_views_leaves_the_others_as_they_are() -> None:
    few, many = draw(), draw(ViewSettings(global_size=32, local_size=16, num_local=6))
    assert np.array_equal(few.boxes, many.boxes[:, :5])
    assert np.array_equal(few.level_hu, many.level_hu[:, :5])


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_scale": (0.5, 0.3)},
        {"local_scale": (0.0, 0.3)},
        {"local_scale": (0.1, 1.2)},
        {"width_hu": (0.0, 100.0)},
        {"num_global": 0},
        {"local_size": 0},
        {"flip_probability": 1.5},
    ],
)
def test_settings_that_describe_no_view_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        ViewSettings(**wrong)


# ------------------------------------------------------------------ rendering


def test_views_equal_the_slow_reference_view_by_view() -> None:
    flipping = ViewSettings(global_size=32, local_size=16, num_local=3, flip_probability=0.5)
    images, sizes = noise(4, 3, 70, 90), np.array([[70, 90], [41, 90], [70, 33], [12, 10]])
    plan = draw(flipping, size=sizes)
    assert 0 < plan.flip.mean() < 1
    global_views, local_views = render_views(images, plan, flipping, MEAN, STD)
    assert global_views.shape == (2 * 4, 3, 32, 32)
    assert local_views.shape == (3 * 4, 3, 16, 16)
    assert global_views.dtype == local_views.dtype == torch.float32
    views = [*global_views.split(4), *local_views.split(4)]
    for row, view in itertools.product(range(4), range(5)):
        expected = slow_view(images[row].numpy(), plan, row, view, 32 if view < 2 else 16)
        np.testing.assert_allclose(views[view][row].numpy(), expected, atol=2e-4)


def test_no_view_reads_beyond_its_slice() -> None:
    images, sizes = noise(3, 3, 64, 64), np.array([[64, 64], [37, 50], [20, 64]])
    images[1, :, 37:], images[1, :, :, 50:], images[2, :, 20:] = -1024, -1024, -1024
    poisoned = images.clone()
    poisoned[1, :, 37:], poisoned[1, :, :, 50:], poisoned[2, :, 20:] = 32767, 32767, 32767
    plan = draw(rows=3, size=sizes)
    for clean, poison in zip(
        *(render_views(pixels, plan, SMALL, MEAN, STD) for pixels in (images, poisoned)), strict=True
    ):
        assert torch.equal(clean, poison)
    whole = [render_whole_slices(pixels, sizes, 32, Preprocess()) for pixels in (images, poisoned)]
    assert torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("shape", [(5, 3, 64, 64), (5, 3, 61, 47), (5, 1, 33, 35)])
@pytest.mark.parametrize("cuts", [[5], [1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
def test_views_are_bit_equal_however_the_batch_is_cut(shape: tuple[int, ...], cuts: list[int]) -> None:
    images = noise(*shape)
    whole = render_views(images, draw(rows=5, size=shape[2:]), SMALL, MEAN, STD)
    parts, begin = [], 0
    for rows in cuts:
        plan = draw(rows=np.arange(begin, begin + rows), size=shape[2:])
        parts.append(render_views(images[begin : begin + rows].clone(), plan, SMALL, MEAN, STD))
        begin += rows
    for kind, num_views in ((0, 2), (1, 3)):
        for view in range(num_views):
            joined = torch.cat([part[kind].chunk(num_views)[view] for part in parts])
            assert torch.equal(whole[kind].chunk(num_views)[view], joined)


def test_twins_in_a_batch_are_seen_differently() -> None:
    images = noise(1, 3, 64, 64).expand(2, 3, 64, 64)
    global_views, local_views = render_views(images, draw(rows=2), SMALL, MEAN, STD)
    for views in (*global_views.split(2), *local_views.split(2)):
        assert (views[0] - views[1]).abs().mean() > 0.05


def test_views_need_int16_hu() -> None:
    with pytest.raises(TypeError, match="int16"):
        render_views(noise(4, 3, 64, 64).float(), draw(), SMALL, MEAN, STD)
    with pytest.raises(ValueError, match="b, k, Y, X"):
        render_whole_slices(noise(3, 64, 64), np.array([[64, 64]] * 3), 32, Preprocess())


def test_no_local_views() -> None:
    only_global = ViewSettings(global_size=32, num_local=0)
    global_views, local_views = render_views(noise(2, 3, 64, 64), draw(only_global, rows=2), only_global, MEAN, STD)
    assert global_views.shape == (4, 3, 32, 32)
    assert local_views.shape[0] == 0


def test_autocast_does_not_reach_hu() -> None:
    images, plan = noise(4, 3, 64, 64), draw()
    outside = render_views(images, plan, SMALL, MEAN, STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = render_views(images, plan, SMALL, MEAN, STD)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


# ------------------------------------------------------------------ gray levels


def two_tissues() -> Tensor:
    """Four windows: lung on the left half of every slice, soft tissue on the right."""
    images = torch.full((4, 3, 64, 64), LUNG_HU, dtype=torch.int16)
    images[..., 32:] = SOFT_HU
    return images


@pytest.mark.parametrize("level", [(-600.0, -600.0), (40.0, 40.0), (-600.0, 100.0)])
@pytest.mark.parametrize("width", [(400.0, 400.0), (2000.0, 2000.0), (400.0, 2000.0)])
def test_gray_levels_of_each_window_policy(level: tuple[float, float], width: tuple[float, float]) -> None:
    policy = ViewSettings(
        global_size=32, num_local=0, global_scale=(1.0, 1.0), aspect=(1.0, 1.0), level_hu=level, width_hu=width
    )
    plan = draw(policy)
    shown = gray(render_views(two_tissues(), plan, policy, MEAN, STD)[0])
    assert shown.min() >= -1e-6
    assert shown.max() <= 1 + 1e-6
    for view, (number, row) in zip(shown, itertools.product(range(2), range(4)), strict=True):
        low = plan.level_hu[row, number] - plan.width_hu[row, number] / 2
        for column, hu in ((4, LUNG_HU), (-4, SOFT_HU)):
            expected = np.clip((hu - low) / plan.width_hu[row, number], 0, 1)
            assert view[:, :, column].mean().item() == pytest.approx(expected, abs=1e-5)


def test_hu_at_a_tenth_of_their_size_would_be_seen() -> None:
    """A pipeline that stored HU / 10 once left lung and soft tissue 0.06 apart; windows of HU keep them far apart."""
    policy = ViewSettings(global_size=32, num_local=0, global_scale=(1.0, 1.0), aspect=(1.0, 1.0))

    def contrast(images: Tensor) -> float:
        shown = gray(render_views(images, draw(policy, rows=4), policy, MEAN, STD)[0])
        return float((shown[..., -4] - shown[..., 4]).mean())

    assert contrast(two_tissues()) > 0.5
    assert contrast(two_tissues()) > 5 * abs(contrast(two_tissues() // 10))


def test_whole_slices_are_what_the_preprocessing_shows() -> None:
    preprocess = Preprocess(level_hu=-400.0, width_hu=1600.0, mean=0.3, std=0.2)
    images = noise(2, 3, 32, 32)
    same = render_whole_slices(images, np.array([[32, 32]] * 2), 32, preprocess)
    torch.testing.assert_close(same, preprocess.apply(images), atol=1e-5, rtol=0)
    halved = render_whole_slices(two_tissues(), np.array([[64, 64]] * 4), 32, preprocess)
    expected = preprocess.apply(torch.full((1, 1, 16, 16), LUNG_HU, dtype=torch.int16))[0, 0, 0, 0]
    torch.testing.assert_close(halved[..., :14], expected.expand(4, 3, 32, 14), atol=1e-5, rtol=0)
