"""The windows that a policy draws: presets by their weights, jitter within its bounds, names that are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_train.hu_windows import FREE, HU_WINDOWS, PRESET_NAMES, HuPolicy

FREE_RANGE = ((-500.0, 0.0), (800.0, 2000.0))
NUMBERS = np.random.default_rng(0).random((4000, 3))


def drawn(weights: dict[str, float] | None, jitter: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    policy = HuPolicy(*FREE_RANGE, weights, jitter)
    preset = policy.chosen(NUMBERS[:, 0])
    return preset, *policy.windows(preset, NUMBERS[:, 1:])


def test_presets_come_as_often_as_their_weights_say() -> None:
    preset, _, _ = drawn({"bone": 1, "lung": 2, "brain": 0, "wide": 1})
    share = {name: np.mean(preset == number) for number, name in enumerate(PRESET_NAMES)}
    assert share["lung"] == pytest.approx(0.5, abs=0.03)
    assert share["bone"] == pytest.approx(0.25, abs=0.03)
    assert share["wide"] == pytest.approx(0.25, abs=0.03)
    assert share["brain"] == share["liver"] == share["mediastinum"] == 0


@given(weights=st.dictionaries(st.sampled_from(PRESET_NAMES), st.floats(0, 1e6), min_size=1))
def test_a_preset_without_weight_is_never_drawn(weights: dict[str, float]) -> None:
    if not sum(weights.values()) > 0:
        weights[PRESET_NAMES[0]] = 1.0
    chosen = HuPolicy(*FREE_RANGE, weights, 0.0).chosen(np.array([0.0, 0.3, 1 - 2**-53]))
    assert all(weights.get(PRESET_NAMES[number], 0.0) > 0 for number in chosen)


def test_the_order_in_which_presets_are_named_changes_nothing() -> None:
    for one, other in zip(drawn({"bone": 1, "lung": 2}), drawn({"lung": 2, "bone": 1}), strict=True):
        assert np.array_equal(one, other)


def test_jitter_stays_around_its_preset_and_none_is_the_preset() -> None:
    for name, window in HU_WINDOWS.items():
        _, level, width = drawn({name: 1.0}, jitter=0.2)
        assert np.abs(level - window.level_hu).max() <= 0.2 * window.width_hu
        assert np.ptp(level) > 0.39 * window.width_hu
        assert 1 / 1.2 <= (width / window.width_hu).min() < 0.84
        assert 1.19 < (width / window.width_hu).max() <= 1.2
        _, level, width = drawn({name: 1.0}, jitter=0.0)
        assert set(level) == {window.level_hu}
        assert set(width) == {window.width_hu}


def test_the_free_range_is_no_preset() -> None:
    preset, level, width = drawn(None)
    assert set(preset) == {FREE}
    assert -500 <= level.min() < level.max() < 0
    assert 800 <= width.min() < width.max() < 2000


def test_presets_show_what_they_are_for() -> None:
    """The tissue that a preset is named for is neither black nor white in it."""
    hu = {"lung": -850, "mediastinum": 50, "bone": 700, "brain": 35, "liver": 55, "wide": -100}
    for name, window in HU_WINDOWS.items():
        assert 0.1 < (hu[name] - window.level_hu) / window.width_hu + 0.5 < 0.9, name
        assert window.source


def test_one_window_for_whole_slices() -> None:
    assert HuPolicy(*FREE_RANGE, None, 0.1).mean_window() == pytest.approx((-250.0, np.sqrt(800 * 2000)))
    assert HuPolicy(*FREE_RANGE, {"lung": 2.0}, 0.1).mean_window() == pytest.approx((-600.0, 1500.0))
    level, width = HuPolicy(*FREE_RANGE, {"lung": 1.0, "mediastinum": 1.0}, 0.1).mean_window()
    assert level == pytest.approx(-280)
    assert width == pytest.approx(np.sqrt(1500 * 400))


def test_unknown_presets_and_weights_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'lung'"):
        HuPolicy(*FREE_RANGE, {"lungs": 1.0}, 0.1)
    with pytest.raises(ValueError, match="weight of lung"):
        HuPolicy(*FREE_RANGE, {"lung": float("nan")}, 0.1)
    for none in ({}, {"lung": 0.0}):
        with pytest.raises(ValueError, match="at least one preset"):
            HuPolicy(*FREE_RANGE, none, 0.1)
    with pytest.raises(ValueError, match="preset_jitter"):
        HuPolicy(*FREE_RANGE, None, 1.0)
