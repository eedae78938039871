"""Views: boxes inside their slices, keyed draws, HU windows that keep what they should show, and rows left alone."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinox_model.preprocess import Preprocess
from dinox_train.keyed_normal import keyed_normal
from dinox_train.views import (
    SUBPIXEL,
    ViewPlan,
    ViewSettings,
    draw_views,
    render_global_undistorted,
    render_views,
    render_whole_slices,
)

SMALL = ViewSettings(global_size=32, local_size=16, num_local=3)
ALL_ON = ViewSettings(
    global_size=32, local_size=16, num_local=3, flip_probability=0.5, blur_probability=(0.5, 0.5, 0.5),
    noise_probability=0.5, gamma_probability=0.5, window_presets={"lung": 1, "mediastinum": 1, "bone": 1},
)  # fmt: skip
SHARP = {"blur_probability": (0.0, 0.0, 0.0)}
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
    fields = (plan.boxes, plan.level_hu, plan.width_hu, plan.preset, plan.flip, plan.mm_per_pixel)
    return [*fields, plan.blur_sigma, plan.noise_hu, plan.noise_key, plan.gamma]


def gray(view: Tensor) -> Tensor:
    """Back from normalised to [0, 1]."""
    return view * STD + MEAN


def slow_blur(length: int, sigma: float) -> np.ndarray:
    """Gaussian weights (length, length), cut at four standard deviations; what leaves an edge comes back mirrored."""
    weights = np.eye(length)
    if sigma > 0:
        weights = np.zeros((length, length))
        reach = math.ceil(4 * sigma)
        for i, step in itertools.product(range(length), range(-reach, reach + 1)):
            j = i + step
            while not 0 <= j < length:
                j = -1 - j if j < 0 else 2 * length - 1 - j
            weights[i, j] += math.exp(-(step**2) / (2 * sigma**2))
    return weights / weights.sum(axis=1, keepdims=True)


def slow_view(
    image: np.ndarray, plan: ViewPlan, row: int, view: int, size: int, *, distorted: bool = True
) -> np.ndarray:
    """One view in plain loops and fp64: triangle weights of the touched pixels, flip, blur, noise, window, gamma."""
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
    hu = hu[:, :, ::-1] if plan.flip[row, view] else hu
    if distorted:
        blur = slow_blur(size, plan.blur_sigma[row, view])
        hu = blur @ hu @ blur.T
        keys = torch.from_numpy(plan.noise_key[row, view].view(np.int32))[None]
        hu = hu + plan.noise_hu[row, view] * keyed_normal(keys, hu.size).numpy().reshape(hu.shape)
    low = plan.level_hu[row, view] - plan.width_hu[row, view] / 2
    shown = np.clip((hu - low) / plan.width_hu[row, view], 0, 1)
    shown = shown ** plan.gamma[row, view] if distorted else shown
    return (shown - MEAN) / STD


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
        {"blur_probability": (1.0, 1.1, 0.0)},
        {"blur_probability": (1.0, 0.5)},
        {"blur_sigma": (0.0, 1.0)},
        {"noise_probability": -0.1},
        {"noise_hu": (30.0, 5.0)},
        {"gamma": (0.0, 1.0)},
        {"window_presets": {"lungs": 1.0}},
        {"window_presets": {"lung": -1.0}},
        {"window_presets": {"lung": 0.0}},
        {"preset_jitter": 1.0},
    ],
)
def test_settings_that_describe_no_view_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        ViewSettings(**wrong)


# ------------------------------------------------------------------ rendering


@pytest.mark.parametrize("rows_at_once", [None, 4])
def test_views_equal_the_slow_reference_view_by_view(rows_at_once: int | None) -> None:
    images, sizes = noise(4, 3, 70, 90), np.array([[70, 90], [41, 90], [70, 33], [12, 10]])
    plan = draw(ALL_ON, size=sizes)
    for drawn in (plan.flip, plan.blur_sigma > 0, plan.noise_hu > 0, plan.gamma != 1):
        assert 0 < drawn.mean() < 1
    assert len(np.unique(plan.preset)) == 3
    global_views, local_views = render_views(images, plan, ALL_ON, MEAN, STD, rows_at_once=rows_at_once)
    assert global_views.shape == (2 * 4, 3, 32, 32)
    assert local_views.shape == (3 * 4, 3, 16, 16)
    assert global_views.dtype == local_views.dtype == torch.float32
    views = [*global_views.split(4), *local_views.split(4)]
    for row, view in itertools.product(range(4), range(5)):
        expected = slow_view(images[row].numpy(), plan, row, view, 32 if view < 2 else 16)
        tolerance = 1e-3 if plan.gamma[row, view] < 1 else 3e-4  # a gamma below 1 is steep at black
        np.testing.assert_allclose(views[view][row].numpy(), expected, atol=tolerance)


@pytest.mark.parametrize("side", [32, 80])
def test_the_gram_teachers_views_are_the_global_ones_undistorted(side: int) -> None:
    images, sizes = noise(4, 3, 70, 90), np.array([[70, 90], [41, 90], [70, 33], [12, 10]])
    plan = draw(ALL_ON, size=sizes)
    views = render_global_undistorted(images, plan, side, MEAN, STD)
    assert views.shape == (2 * 4, 3, side, side)
    for row, view in itertools.product(range(4), range(2)):
        expected = slow_view(images[row].numpy(), plan, row, view, side, distorted=False)
        np.testing.assert_allclose(views[4 * view + row].numpy(), expected, atol=3e-4)
    plain = draw(ViewSettings(global_size=side, num_local=0, **SHARP), size=sizes)
    shown = render_views(images, plain, ViewSettings(global_size=side, num_local=0, **SHARP), MEAN, STD)[0]
    assert torch.equal(shown, render_global_undistorted(images, plain, side, MEAN, STD))


def test_no_view_reads_beyond_its_slice() -> None:
    images, sizes = noise(3, 3, 64, 64), np.array([[64, 64], [37, 50], [20, 64]])
    images[1, :, 37:], images[1, :, :, 50:], images[2, :, 20:] = -1024, -1024, -1024
    poisoned = images.clone()
    poisoned[1, :, 37:], poisoned[1, :, :, 50:], poisoned[2, :, 20:] = 32767, 32767, 32767
    plan = draw(ALL_ON, rows=3, size=sizes)
    for rows_at_once in (1, 3):
        rendered = [
            render_views(pixels, plan, ALL_ON, MEAN, STD, rows_at_once=rows_at_once) for pixels in (images, poisoned)
        ]
        for clean, poison in zip(*rendered, strict=True):
            assert torch.equal(clean, poison)
    whole = [render_whole_slices(pixels, sizes, 32, Preprocess()) for pixels in (images, poisoned)]
    assert torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("shape", [(5, 3, 64, 64), (5, 3, 61, 47), (5, 1, 33, 35)])
@pytest.mark.parametrize("cuts", [[5], [1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
def test_views_are_bit_equal_however_the_batch_is_cut(shape: tuple[int, ...], cuts: list[int]) -> None:
    images = noise(*shape)
    whole = render_views(images, draw(ALL_ON, rows=5, size=shape[2:]), ALL_ON, MEAN, STD)
    parts, begin = [], 0
    for rows in cuts:
        plan = draw(ALL_ON, rows=np.arange(begin, begin + rows), size=shape[2:])
        parts.append(render_views(images[begin : begin + rows].clone(), plan, ALL_ON, MEAN, STD))
        begin += rows
    for kind, num_views in ((0, 2), (1, 3)):
        for view in range(num_views):
            joined = torch.cat([part[kind].chunk(num_views)[view] for part in parts])
            assert torch.equal(whole[kind].chunk(num_views)[view], joined)


@pytest.mark.gpu
def test_a_gpu_shows_the_same_and_is_never_waited_for() -> None:
    images, sizes = noise(5, 3, 70, 90), np.array([[70, 90], [41, 90], [70, 33], [12, 10], [70, 90]])
    plan, on_gpu = draw(ALL_ON, rows=5, size=sizes), images.cuda()
    expected = (*render_views(images, plan, ALL_ON, MEAN, STD), render_global_undistorted(images, plan, 80, MEAN, STD))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = (*render_views(on_gpu, plan, ALL_ON, MEAN, STD), render_global_undistorted(on_gpu, plan, 80, MEAN, STD))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found, wanted in zip(views, expected, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, atol=2e-3, rtol=0)


def test_twins_in_a_batch_are_seen_differently() -> None:
    images = noise(1, 3, 64, 64).expand(2, 3, 64, 64)
    global_views, local_views = render_views(images, draw(rows=2), SMALL, MEAN, STD)
    for views in (*global_views.split(2), *local_views.split(2)):
        assert (views[0] - views[1]).abs().mean() > 0.05


def test_no_view_equals_its_twin_and_no_epoch_the_one_before() -> None:
    images = noise(2, 3, 64, 64)
    first, later = (render_views(images, draw(rows=2, position=at), SMALL, MEAN, STD)[0] for at in (3, 4))
    assert ((first[:2] - first[2:]).abs().mean(dim=(1, 2, 3)) > 0.05).all()  # the two global views of a window
    assert ((first - later).abs().mean(dim=(1, 2, 3)) > 0.05).all()


def test_blur_is_of_the_view_that_it_is_meant_for() -> None:
    """Released trainers keep a probability's complement: the view that was to be always blurred never is."""
    plan = draw(ViewSettings(num_global=3, num_local=4, blur_probability=(1.0, 0.0, 0.3)), rows=2000)
    blurred = plan.blur_sigma > 0
    assert blurred[:, 0].all()
    assert not blurred[:, 1:3].any()
    assert blurred[:, 3:].mean() == pytest.approx(0.3, abs=0.02)
    assert plan.blur_sigma[:, 0].min() >= 0.1
    assert plan.blur_sigma[:, 0].max() < 2.0
    assert np.mean(plan.blur_sigma[:, 0]) == pytest.approx(1.05, abs=0.05)


def roughness(views: Tensor) -> Tensor:
    """Mean difference of neighbours along x, of each view."""
    return views.diff(dim=3).abs().mean(dim=(1, 2, 3))


def test_a_blurred_view_is_smoother_and_an_unblurred_one_is_not_touched() -> None:
    whole = {"global_size": 32, "local_size": 16, "num_local": 2, "global_scale": (1, 1), "aspect": (1, 1)}
    images, plain = noise(4, 3, 64, 64), ViewSettings(**whole, **SHARP)
    some = ViewSettings(**whole, blur_probability=(1.0, 0.0, 0.0), blur_sigma=(1.0, 2.0))
    sharp, mixed = (render_views(images, draw(one), one, MEAN, STD) for one in (plain, some))
    assert (roughness(mixed[0][:4]) < 0.5 * roughness(sharp[0][:4])).all()
    assert torch.equal(mixed[0][4:], sharp[0][4:])
    assert torch.equal(mixed[1], sharp[1])


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"blur_probability": (0.0, 0.0, 0.0)}, {"boxes", "level_hu", "noise_hu", "noise_key", "gamma", "flip"}),
        ({"noise_probability": 0.0}, {"boxes", "level_hu", "blur_sigma", "gamma", "flip", "preset"}),
        ({"gamma_probability": 0.0}, {"boxes", "level_hu", "blur_sigma", "noise_hu", "noise_key", "flip"}),
        ({"window_presets": None}, {"boxes", "blur_sigma", "noise_hu", "noise_key", "gamma", "flip"}),
        ({"window_presets": {"liver": 1}}, {"boxes", "blur_sigma", "noise_hu", "noise_key", "gamma", "flip"}),
        ({"flip_probability": 0.0}, {"boxes", "level_hu", "blur_sigma", "noise_hu", "noise_key", "gamma", "preset"}),
    ],
)
def test_switching_one_thing_leaves_the_numbers_of_the_others(changed: dict, same: set[str]) -> None:
    before, after = draw(ALL_ON, rows=8), draw(replace(ALL_ON, **changed), rows=8)
    for name in same:
        assert np.array_equal(getattr(before, name), getattr(after, name)), name
    assert not all(np.array_equal(a, b) for a, b in zip(numbers_of(before), numbers_of(after), strict=True))


def test_a_ruler_has_its_length_in_every_view() -> None:
    """A rod of 30 x 20 mm at a known place: as long in each view as pixels x mm_per_pixel say, flipped or not."""
    spacing_y, spacing_x = 0.7, 0.8
    images = torch.full((6, 1, 256, 256), -1000, dtype=torch.int16)
    low, high = (100, 110), (100 + round(30 / spacing_y), 110 + round(20 / spacing_x))
    images[:, :, low[0] : high[0], low[1] : high[1]] = 1000
    flips = ViewSettings(
        global_size=96, local_size=48, num_local=8, local_scale=(0.2, 0.6), flip_probability=0.5,
        level_hu=(0, 0), width_hu=(2000, 2000), **SHARP,
    )  # fmt: skip
    plan = draw(flips, rows=6, size=(256, 256))
    assert 0 < plan.flip.mean() < 1
    global_views, local_views = render_views(images, plan, flips, 0.0, 1.0)
    views, measured = [*global_views.split(6), *local_views.split(6)], 0
    for row, view in itertools.product(range(6), range(10)):
        top, left, height, width = plan.boxes[row, view]
        inside = top <= low[0] and left <= low[1] and top + height >= high[0] and left + width >= high[1]
        if inside:
            shown = views[view][row, 0]
            lengths = np.array([float(shown.max(dim=1 - axis).values.sum()) for axis in (0, 1)])
            true_mm = np.array([(high[0] - low[0]) * spacing_y, (high[1] - low[1]) * spacing_x])
            mm = plan.mm_per_pixel[row, view]
            assert np.abs(lengths * mm - true_mm).max() <= mm.max(), (row, view)
            column = (low[1] - left) / width * views[view].shape[-1]
            centre = float((shown.sum(dim=0) * (torch.arange(shown.shape[1]) + 0.5)).sum() / shown.sum())
            half = (high[1] - low[1]) / width * views[view].shape[-1] / 2
            expected = shown.shape[1] - column - half if plan.flip[row, view] else column + half
            assert centre == pytest.approx(expected, abs=0.5)
            measured += 1
    assert measured > 15


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
