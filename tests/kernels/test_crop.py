"""Views by the kernel: against loops in fp64, with at most twice the error of the reference in float32; and alone."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinox_train.kernels import crop as module
from dinox_train.kernels.crop import crop, traffic, traffic_compiled, traffic_reference
from dinox_train.resample import resample
from dinox_train.view_plan import ViewPlan, ViewSettings, draw_views
from dinox_train.views import render_global_undistorted, render_views
from tests.kernels.eager_traffic import eager_traffic
from tests.train.test_views import MEAN, STD, slow_view

SETTINGS = ViewSettings(
    num_global=2, num_local=1, global_size=16, local_size=7, flip_probability=0.5, blur_probability=(0.5, 0.5, 0.5),
    noise_probability=0.5, gamma_probability=0.5, window_presets={"lung": 1, "mediastinum": 1, "bone": 1},
)  # fmt: skip
SIZES = np.array([(30, 34), (25, 20)])


def draw(view_settings: ViewSettings = SETTINGS, sizes: np.ndarray = SIZES, seed: int = 0) -> ViewPlan:
    spacing = np.tile([2.5, 0.7, 0.8], (len(sizes), 1))
    return draw_views(view_settings, seed=seed, position=0, rows=np.arange(len(sizes)), sizes=sizes, spacing_mm=spacing)


def noise(*shape: int) -> Tensor:
    return torch.randint(-1000, 1000, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int16)


def exact(images: Tensor, plan: ViewPlan, views: range, size: int, *, distorted: bool = True) -> Tensor:
    rows = range(len(images))
    slow = [
        slow_view(images[row].numpy(), plan, row, view, size, distorted=distorted) for view in views for row in rows
    ]
    return torch.from_numpy(np.stack(slow))


def check(found: Tensor, reference: Tensor, true: Tensor) -> None:
    """At most twice the reference's error, or what float32 rounds at values of up to 4."""
    assert found.dtype == torch.float32
    error, its = ((one.double() - true).abs().max().item() for one in (found, reference))
    assert error <= 2 * its + 1e-6


@cache
def distorted_views() -> tuple[Tensor, ViewPlan, tuple[Tensor, Tensor]]:
    images, plan = noise(2, 2, 32, 36), draw()
    return images, plan, render_views(images, plan, SETTINGS, MEAN, STD, crop=crop)


def test_views_are_those_of_the_reference() -> None:
    images, plan, found = distorted_views()
    for values in (plan.blur_sigma, plan.noise_hu, plan.gamma - 1, plan.flip):
        assert 0 < np.count_nonzero(values) < values.size, "the plan must have views with and without it"
    reference = render_views(images, plan, SETTINGS, MEAN, STD, rows_at_once=2)
    for mine, theirs, views, size in zip(found, reference, (range(2), range(2, 3)), (16, 7), strict=True):
        assert mine.shape == theirs.shape
        check(mine, theirs, exact(images, plan, views, size))


def test_a_row_is_its_own_and_reads_nothing_beyond_its_slice() -> None:
    """Bit for bit: alone in its batch, and with other values everywhere but in the crop's own pixels."""
    images, plan, (found, _) = distorted_views()
    second: dict[str, Any] = {
        name: value[1:] if isinstance(value, np.ndarray) else value for name, value in vars(plan).items()
    }
    other = torch.full_like(images[1:], 32767)
    top, left = np.floor(plan.boxes[1, 0, :2]).astype(int)
    bottom, right = np.minimum(np.ceil(plan.boxes[1, 0, :2] + plan.boxes[1, 0, 2:]).astype(int), SIZES[1])
    other[..., top:bottom, left:right] = images[1:, :, top:bottom, left:right]
    alone = crop(other, ViewPlan(**second), range(1), 16, MEAN, STD)
    assert torch.equal(alone[0], found[1])


def test_more_than_one_tile_and_nothing_but_the_window() -> None:
    """40 results a side in tiles of 32, sharp, of one channel: as the Gram teacher sees a view."""
    images, plan = noise(1, 1, 24, 25), draw(sizes=np.array([(24, 25)]))
    one = replace(plan, num_global=1)
    found = render_global_undistorted(images, one, 40, MEAN, STD, crop=crop)
    reference = render_global_undistorted(images, one, 40, MEAN, STD)
    check(found, reference, exact(images, one, range(1), 40, distorted=False))


@settings(max_examples=5)
@given(
    size=st.integers(1, 12),
    edges=st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(1, 20), st.floats(1, 20)),
    flip=st.booleans(),
    sigma=st.sampled_from([0.0, 0.6, 2.0]),
)
def test_any_box(size: int, edges: tuple[float, float, float, float], flip: bool, sigma: float) -> None:
    """Shrunk, enlarged, one result only, a blur that reaches farther than the view is wide."""
    images = noise(1, 1, 40, 35)
    box = np.floor(np.array(edges) * 1024) / 1024
    plan = _sharp_plan(box, flip, sigma)
    low_hu, width_hu = -1100.0, 2200.0
    found = crop(images, plan, range(1), size, 0.0, 1.0).double() * width_hu + low_hu
    blur = np.array([[sigma]])
    sizes, given_flip = np.array([(40, 35)]), np.array([[flip]])
    expected = resample(images, box[None, None], given_flip, sizes, size, blur_sigma=blur)[0]
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=0.02)


def _sharp_plan(box: np.ndarray, flip: bool, sigma: float) -> ViewPlan:
    """One view of one window whose HU window clamps nothing."""
    of_view = {"level_hu": 0.0, "width_hu": 2200.0, "noise_hu": 0.0, "gamma": 1.0, "blur_sigma": sigma}
    numbers: dict[str, Any] = {name: np.full((1, 1), value) for name, value in of_view.items()}
    return ViewPlan(
        boxes=box[None, None], flip=np.array([[flip]]), preset=np.full((1, 1), -1), mm_per_pixel=np.ones((1, 1, 2)),
        noise_key=np.zeros((1, 1, 2), np.uint32), num_global=1, sizes=np.array([(40, 35)]), **numbers,
    )  # fmt: skip


def test_no_views_are_no_pixels() -> None:
    none = crop(noise(2, 2, 48, 56), draw(), range(3, 3), 9, MEAN, STD)
    assert none.shape == (0, 2, 9, 9)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.zeros(1, 1, 8, 8), TypeError, "int16"),
        (torch.zeros(1, 8, 8, dtype=torch.int16), ValueError, "contiguous"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int16).mT[..., :4], ValueError, "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(images: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        crop(images, draw(), range(1), 8, MEAN, STD)


def test_without_triton_on_a_device_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "can_run_on", lambda _device: False)
    with pytest.raises(RuntimeError, match=r"kernels\.crop"):
        crop(noise(2, 2, 48, 56), draw(), range(1), 8, MEAN, STD)


def test_it_is_an_operator_of_torch() -> None:
    numbers = torch.tensor([[0.0, 0.5, 1.0, 1.5, 1e-3, -1000.0, 2000.0, 1.0, 0.0]])
    places = torch.tensor([[1, 0, 3, 5, 2, 3, 0, 0, 0]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.dinox.crop.default, (noise(1, 1, 8, 8), numbers, places, 3, 3, 0.5, 0.25))


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_the_references_traffic_is_what_torch_moves(sigma: float) -> None:
    """And the kernel's is what the issue asks: less than a compiler would leave."""
    view_settings = replace(SETTINGS, num_global=1, num_local=0, global_size=48, noise_probability=0.0,
        gamma_probability=0.0, blur_probability=(1.0, 1.0, 1.0) if sigma else (0.0, 0.0, 0.0), blur_sigma=(1.0, 1.0),
        global_scale=(1.0, 1.0))  # fmt: skip
    plan, images = draw(view_settings, np.array([(96, 96)] * 3)), noise(3, 3, 128, 128)
    counted = eager_traffic(lambda: render_views(images, plan, view_settings, MEAN, STD, rows_at_once=3))
    shape = (3, 3, 96, 48, int(4 * sigma))
    assert counted.bytes == pytest.approx(traffic_reference(*shape).bytes, rel=0.05)
    assert traffic(*shape).bytes < traffic_compiled(*shape).bytes < traffic_reference(*shape).bytes
