"""HU to floats: against numpy, on tissues with known HU, and what `encode` checks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dinox_model
from dinox_model import Preprocess, ViTConfig, window_hu

TINY = ViTConfig(width=32, num_layers=1, num_heads=2, mlp_hidden=64, layer_scale=0.5)


def random_hu(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1100, 1500, size=shape, dtype=np.int16)


def reference(hu: np.ndarray, preprocess: Preprocess, multiple: int) -> np.ndarray:
    """In float64, voxel by voxel."""
    images, slices, height, width = hu.shape
    shape = (images, slices, math.ceil(height / multiple) * multiple, math.ceil(width / multiple) * multiple)
    padded = np.full(shape, -1024.0)
    padded[:, :, :height, :width] = hu
    low = preprocess.level_hu - preprocess.width_hu / 2
    windowed = np.clip((padded - low) / preprocess.width_hu, 0, 1)
    return (windowed - preprocess.mean) / preprocess.std


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    level=st.floats(-2000, 2000),
    width=st.floats(1, 5000),
    multiple=st.sampled_from([1, 14, 16]),
)
def test_apply_is_the_formula(shape: tuple[int, ...], level: float, width: float, multiple: int) -> None:
    preprocess = Preprocess(level_hu=level, width_hu=width, mean=0.4, std=0.3)
    hu = random_hu(*shape)
    found = preprocess.apply(torch.from_numpy(hu), multiple)
    assert found.dtype == torch.float32
    # fp32 rounds the window's lower edge, up to 4500 HU, to 1/4096 HU: of a width of 1 HU that is much.
    np.testing.assert_allclose(found.numpy(), reference(hu, preprocess, multiple), atol=2e-5 + 2e-3 / width, rtol=0)


def test_tissues_are_told_apart_in_the_default_window() -> None:
    tissue = torch.tensor([-1024, -1000, -850, 40, 400, 1500], dtype=torch.int16).view(6, 1, 1, 1)
    preprocess = Preprocess(mean=0.0, std=1.0)
    air, edge, lung, soft, top, bone = preprocess.apply(tissue, multiple=1).flatten().tolist()
    assert air == edge == 0.0
    assert bone == top == 1.0
    assert soft - lung > 0.4
    assert 0 < lung < soft < 1


def test_windows_may_differ_from_image_to_image() -> None:
    hu = torch.from_numpy(random_hu(2, 3, 4, 5)).float()
    level, width = torch.tensor([-600.0, 40.0]), torch.tensor([1500.0, 400.0])
    found = window_hu(hu, level.view(2, 1, 1, 1), width.view(2, 1, 1, 1))
    for image in range(2):
        assert torch.equal(found[image], window_hu(hu[image], float(level[image]), float(width[image])))


def test_extremes_of_int16_stay_finite() -> None:
    hu = torch.tensor([[[[-32768, 32767]]]], dtype=torch.int16)
    assert Preprocess(mean=0.0, std=1.0).apply(hu, multiple=1).flatten().tolist() == [0.0, 1.0]


def test_the_original_is_left_alone_and_padding_lies_below_and_right() -> None:
    hu = torch.from_numpy(random_hu(1, 1, 17, 15))
    before = hu.clone()
    found = Preprocess().apply(hu)
    assert found.shape == (1, 1, 32, 16)
    assert torch.equal(hu, before)
    air = Preprocess().apply(torch.full((1, 1, 1, 1), -1024, dtype=torch.int16), multiple=1).item()
    assert (found[:, :, 17:] == air).all()
    assert (found[:, :, :, 15:] == air).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.uint8])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="HU must be int16"):
        Preprocess().apply(torch.zeros(1, 1, 4, 4, dtype=dtype))


@pytest.mark.parametrize("shape", [(3, 4, 4), (0, 1, 4, 4), (1, 1, 0, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"HU must be \(b, k, y, x\)"):
        Preprocess().apply(torch.zeros(shape, dtype=torch.int16))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width_hu": 0.0}, "width_hu must be positive"),
        ({"std": -1.0}, "std must be positive"),
        ({"mean": math.inf}, "mean must be a finite number"),
        ({"level_hu": "lung"}, "level_hu must be a finite number"),
        ({"depth": 0}, "depth must be a whole number"),
        ({"depth": 3.0}, "depth must be a whole number"),
        ({"step": True}, "step must be a whole number"),
        ({"step_mm": 0.0}, "step_mm must be positive"),
        ({"edge": "error"}, "edge must be clamp, reflect or null, not 'error'"),
        ({"step_mm": math.nan}, "step_mm must be a finite number"),
        ({"step": 1, "step_mm": 2.5}, "step 1 and step_mm 2.5"),
    ],
)
def test_nonsense_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**values)


def histogram(hu: np.ndarray) -> np.ndarray:
    return np.bincount((hu.astype(np.int64).ravel() + 32768) // 16, minlength=4096)


def test_from_histogram_has_the_voxels_mean_and_deviation() -> None:
    hu = random_hu(40, 64, 64)
    found = Preprocess.from_histogram(histogram(hu), level_hu=-300.0, width_hu=1400.0)
    windowed = np.clip((hu.astype(np.float64) + 1000) / 1400, 0, 1)
    assert found.mean == pytest.approx(windowed.mean(), abs=1e-4)
    assert found.std == pytest.approx(windowed.std(), abs=1e-4)
    normal = found.apply(torch.from_numpy(hu)[None], multiple=1)
    assert abs(normal.mean().item()) < 1e-3
    assert abs(normal.std().item() - 1) < 1e-3


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones(100, dtype=np.int64), "4096 integers"),
        (np.ones(4096), "4096 integers"),
        (np.full(4096, -1), "none negative"),
        (np.zeros(4096, dtype=np.int64), "look alike"),
        (np.eye(1, 4096, 10, dtype=np.int64)[0], "look alike"),
    ],
)
def test_histograms_that_say_nothing_are_refused(counts: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess.from_histogram(counts, -300.0, 1400.0)


def test_encode_is_preprocessing_and_network_without_gradients() -> None:
    model = dinox_model.build(TINY)
    model.preprocess = Preprocess(level_hu=40.0, width_hu=400.0)
    hu = random_hu(2, 3, 50, 33)
    spacing = np.array([[2.5, 0.7, 0.7], [0.0, 0.5, 0.5]])
    features = dinox_model.encode(model, hu, spacing)
    expected = model(torch.from_numpy(reference(hu, model.preprocess, 16)).float())
    torch.testing.assert_close(features.patches, expected.patches, atol=1e-4, rtol=0)
    assert features.grid == (4, 3)
    assert not features.cls.requires_grad
    assert model.training, "encode must leave the mode as it was"
    again = dinox_model.encode(model, torch.from_numpy(hu), torch.from_numpy(spacing))
    assert torch.equal(again.cls, features.cls)


def test_encode_takes_a_read_only_view() -> None:
    hu = random_hu(2, 3, 32, 32)
    hu.setflags(write=False)
    features = dinox_model.encode(dinox_model.build(TINY), hu[:1], np.ones((1, 3)))
    assert features.cls.shape == (1, 32)


@pytest.mark.parametrize(
    ("hu", "spacing", "message"),
    [
        (random_hu(1, 2, 32, 32), np.ones((1, 3)), r"\(b, 3, y, x\)"),
        (random_hu(2, 3, 32, 32), np.ones((1, 3)), r"spacing_mm must be \(2, 3\)"),
        (random_hu(1, 3, 32, 32), np.array([[1.0, 0.0, 1.0]]), "spacing_mm must be finite"),
        (random_hu(1, 3, 32, 32), np.array([[np.nan, 1.0, 1.0]]), "spacing_mm must be finite"),
        (random_hu(1, 3, 32, 32), np.array([[-1.0, 1.0, 1.0]]), "spacing_mm must be finite"),
        (random_hu(3, 32, 32), np.ones((3, 3)), r"HU must be \(b, k, y, x\)"),
    ],
)
def test_encode_refuses_other_shapes_and_spacings(hu: np.ndarray, spacing: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dinox_model.encode(dinox_model.build(TINY), hu, spacing)


def test_encode_refuses_floats() -> None:
    with pytest.raises(TypeError, match="HU must be int16"):
        dinox_model.encode(dinox_model.build(TINY), random_hu(1, 3, 32, 32).astype(np.float32), np.ones((1, 3)))
