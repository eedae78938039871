"""Resampling against torch's own antialiased interpolation, and rows in one product against rows alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_train.resample import resample


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(-1024, 3000, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int16)


def whole(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the whole images, and their sizes."""
    sizes = np.tile(images.shape[2:], (len(images), 1))
    return np.concatenate((np.zeros_like(sizes), sizes), axis=1).astype(float), sizes


@settings(max_examples=40)
@given(
    size=st.integers(1, 48),
    edges=st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 60), st.integers(1, 50)),
    flip=st.booleans(),
)
def test_boxes_of_whole_pixels_are_torchs_antialiased_bilinear(
    size: int, edges: tuple[int, int, int, int], flip: bool
) -> None:
    top, left, height, width = edges
    images = noise(1, 2, 100, 90)
    ours = resample(images, np.array([edges], float), np.array([flip]), np.array([[100, 90]]), size)
    crop = images[:, :, top : top + height, left : left + width].float()
    theirs = torch.nn.functional.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(ours, theirs.flip(3) if flip else theirs, rtol=1e-4, atol=0.05)


def test_a_box_of_its_own_size_is_the_image() -> None:
    images = noise(3, 2, 32, 32)
    boxes, sizes = whole(images)
    assert torch.equal(resample(images, boxes, np.zeros(3, bool), sizes, 32), images.float())
    assert torch.equal(resample(images, boxes, np.ones(3, bool), sizes, 32), images.float().flip(3))


@settings(max_examples=40)
@given(data=st.data(), size=st.integers(1, 40))
def test_rows_in_one_product_equal_rows_alone(data: st.DataObject, size: int) -> None:
    images, rows = noise(4, 2, 80, 100), 4
    sizes = np.array(data.draw(st.lists(st.tuples(st.integers(3, 80), st.integers(3, 100)), min_size=4, max_size=4)))
    fractions = np.array(data.draw(st.lists(st.floats(0, 1), min_size=16, max_size=16))).reshape(4, 4)
    sides = 1 + fractions[:, 2:] * (sizes - 1)
    boxes = np.floor(np.concatenate((fractions[:, :2] * (sizes - sides), sides), axis=1) * 1024) / 1024
    flip = np.array(data.draw(st.lists(st.booleans(), min_size=4, max_size=4)))
    alone = resample(images, boxes, flip, sizes, size)
    for row in range(rows):  # what is beyond a slice must not be read in a shared product either
        images[row, :, sizes[row, 0] :], images[row, :, :, sizes[row, 1] :] = 32767, 32767
    for rows_at_once in (3, 4):
        together = resample(images, boxes, flip, sizes, size, rows_at_once=rows_at_once)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=0.02)


def test_a_ramp_keeps_its_values_between_pixels() -> None:
    """Bilinear means exact on a plane: a box at a fraction of a pixel must sample the ramp there."""
    ramp = (torch.arange(64)[:, None] * 100 + torch.arange(64) * 7).to(torch.int16)[None, None]
    box = np.array([[10.25, 20.5, 24.0, 24.0]])
    got = resample(ramp, box, np.array([False]), np.array([[64, 64]]), 24)[0, 0]
    middle = torch.arange(24) + 0.5
    expected = (10.25 + middle - 0.5)[:, None] * 100 + (20.5 + middle - 0.5) * 7
    torch.testing.assert_close(got[1:-1, 1:-1], expected[1:-1, 1:-1], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("value", [-32768, 0, 32767])
def test_a_constant_stays_that_constant(value: int) -> None:
    images = torch.full((2, 1, 50, 60), value, dtype=torch.int16)
    boxes = np.array([[0.5, 0.25, 49.5, 20.75], [3.0, 2.0, 1.0, 1.0]])
    got = resample(images, boxes, np.array([True, False]), np.array([[50, 60]] * 2), 13)
    torch.testing.assert_close(got, torch.full_like(got, value), rtol=1e-6, atol=0)
