"""Mean and standard deviation under the window policy against views that are really drawn."""

import numpy as np
import pytest
import torch

from dinox_model.preprocess import HISTOGRAM_BIN_HU, HISTOGRAM_BINS, Preprocess
from dinox_train.view_statistics import statistics_under_policy
from dinox_train.views import ViewSettings, draw_views, render_views

CHEST = {-1000: 40, -850: 25, -100: 10, 40: 20, 300: 4, 900: 1}
SHARP = {"blur_probability": (0.0, 0.0, 0.0)}


def histogram(parts: dict[int, int]) -> np.ndarray:
    counts = np.zeros(HISTOGRAM_BINS, np.int64)
    for hu, count in parts.items():
        counts[(hu + 32768) // HISTOGRAM_BIN_HU] += count
    return counts


def middles(parts: dict[int, int]) -> np.ndarray:
    """The HU that the histogram stands for, each as often as it counts."""
    hu = np.repeat(list(parts), list(parts.values()))
    return -32768 + HISTOGRAM_BIN_HU * ((hu + 32768) // HISTOGRAM_BIN_HU) + (HISTOGRAM_BIN_HU - 1) / 2


@pytest.mark.parametrize(
    "settings",
    [
        ViewSettings(**SHARP),
        ViewSettings(**SHARP, gamma_probability=0.5, gamma=(0.5, 2.0)),
        ViewSettings(**SHARP, window_presets={"lung": 3, "mediastinum": 2, "bone": 1}, preset_jitter=0.2),
        ViewSettings(**SHARP, window_presets={"brain": 1}, gamma_probability=1.0),
        ViewSettings(**SHARP, level_hu=(-100, -100), width_hu=(1000, 1000)),
    ],
)
def test_against_monte_carlo(settings: ViewSettings) -> None:
    plan = draw_views(
        settings, seed=0, position=0, rows=np.arange(4000), sizes=np.full((4000, 2), 64), spacing_mm=np.ones((4000, 3))
    )
    hu = middles(CHEST)[None, :]
    level, width, gamma = (one.reshape(-1, 1) for one in (plan.level_hu, plan.width_hu, plan.gamma))
    shown = np.clip((hu - level + width / 2) / width, 0, 1) ** gamma
    mean, std = statistics_under_policy(histogram(CHEST), settings)
    assert mean == pytest.approx(shown.mean(), abs=3e-3)
    assert std == pytest.approx(shown.std(), abs=3e-3)


def test_views_have_mean_0_and_standard_deviation_1() -> None:
    """The whole way: pixels of which a tenth of the slice each has one tissue, in crops of all of it."""
    policy = ViewSettings(global_size=20, num_local=0, global_scale=(1, 1), aspect=(1, 1), **SHARP)
    tissues = np.repeat(middles({-1000: 4, -850: 3, 40: 2, 300: 1}), 2).astype(np.int16)
    images = torch.from_numpy(tissues).expand(400, 1, 20, 20)
    counts = histogram({-1000: 4, -850: 3, 40: 2, 300: 1})
    sizes = np.full((400, 2), 20)
    plan = draw_views(policy, seed=1, position=0, rows=np.arange(400), sizes=sizes, spacing_mm=np.ones((400, 3)))
    views, _ = render_views(images, plan, policy, *statistics_under_policy(counts, policy))
    assert views.mean().item() == pytest.approx(0, abs=0.03)
    assert views.std().item() == pytest.approx(1, abs=0.03)


def test_a_single_window_is_the_histogram_under_it() -> None:
    counts = histogram(CHEST)
    expected = Preprocess.from_histogram(counts, -100.0, 1000.0)
    found = statistics_under_policy(counts, ViewSettings(level_hu=(-100, -100), width_hu=(1000, 1000)))
    assert found == pytest.approx((expected.mean, expected.std), abs=1e-9)


def test_windows_that_differ_spread_the_values() -> None:
    """One tissue has a spread under windows that differ; the middle of the windows alone would say none."""
    counts = histogram({-300: 10})
    assert statistics_under_policy(counts, ViewSettings())[1] > 0.05


def test_what_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="look alike"):
        statistics_under_policy(histogram({-20000: 5}), ViewSettings())
    with pytest.raises(ValueError, match="4096 integers"):
        statistics_under_policy(np.zeros(4096), ViewSettings())
    with pytest.raises(ValueError, match="look alike"):
        statistics_under_policy(np.zeros(4096, np.int64), ViewSettings())
