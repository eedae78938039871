"""Resampling against torch's own antialiased interpolation, and rows in one product against rows alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_train import resample as resampling


def resample(
    images: torch.Tensor, boxes: np.ndarray, flip: np.ndarray, sizes: np.ndarray, size: int,
    *, blur_sigma: np.ndarray | None = None, rows_at_once: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """One box (4,) of each image."""
    blur = None if blur_sigma is None else blur_sigma[:, None]
    return resampling.resample(
        images, boxes[:, None], flip[:, None], sizes, size, blur_sigma=blur, rows_at_once=rows_at_once
    )[0]


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


# ------------------------------------------------------------------ blocks and blur


def mirrored_gaussian(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """A Gaussian blur of (k, y, x) in fp64, tap by tap, of the image continued by its mirror images."""
    reach = math.ceil(4 * sigma)
    taps = [math.exp(-(step**2) / (2 * sigma**2)) for step in range(-reach, reach + 1)]
    for axis in (1, 2):
        length = image.shape[axis]
        period = torch.cat((image, image.flip(axis)), dim=axis)
        places = torch.arange(length)
        shifted = [period.index_select(axis, (places + step) % (2 * length)) for step in range(-reach, reach + 1)]
        image = sum(tap * one for tap, one in zip(taps, shifted, strict=True)) / sum(taps)
    return image


@settings(max_examples=40)
@given(
    size=st.integers(1, 100),
    sigma=st.floats(0.05, 6),
    edges=st.tuples(st.floats(0, 60), st.floats(0, 40), st.floats(1, 130), st.floats(1, 100)),
    flip=st.booleans(),
)
def test_a_blur_is_that_of_the_sharp_result(
    size: int, sigma: float, edges: tuple[float, float, float, float], flip: bool
) -> None:
    box = np.floor(np.array([edges]) * 1024) / 1024
    images, sizes = noise(1, 2, 200, 150), np.array([[200, 150]])
    sharp = resample(images, box, np.array([flip]), sizes, size)[0]
    blurred = resample(images, box, np.array([flip]), sizes, size, blur_sigma=np.array([sigma]))[0]
    torch.testing.assert_close(blurred.double(), mirrored_gaussian(sharp.double(), sigma), rtol=1e-4, atol=0.05)


@settings(max_examples=40)
@given(
    size=st.integers(1, 150),
    edges=st.tuples(st.floats(0, 60), st.floats(0, 40), st.floats(1, 200), st.floats(1, 160)),
    flip=st.booleans(),
    sigma=st.sampled_from([0.0, 0.7, 3.0]),
)
def test_blocks_leave_out_nothing_but_zeros(
    size: int, edges: tuple[float, float, float, float], flip: bool, sigma: float
) -> None:
    """An image alone is computed block by block, two in one product are not; more blocks than one, and odd ones."""
    box = np.floor(np.array([edges, edges]) * 1024) / 1024
    images, sizes = noise(1, 2, 260, 200).expand(2, -1, -1, -1), np.array([[260, 200]] * 2)
    given_flip, blur = np.array([flip] * 2), np.array([sigma, 0.0])
    alone = resample(images, box, given_flip, sizes, size, blur_sigma=blur)
    together = resample(images, box, given_flip, sizes, size, blur_sigma=blur, rows_at_once=2)
    # Places in the slice are rounded to float32, those in a block less: 1e-5 pixel of noise of 4,000 HU.
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0.1)


def test_no_blur_is_no_blur_beside_one() -> None:
    """A row without a blur keeps its bits where another row of the same product has one."""
    images = noise(2, 2, 64, 64)
    boxes, sizes = whole(images)
    kept = np.zeros(2, bool)
    sharp = resample(images, boxes, kept, sizes, 48, rows_at_once=2)
    mixed = resample(images, boxes, kept, sizes, 48, blur_sigma=np.array([2.0, 0.0]), rows_at_once=2)
    torch.testing.assert_close(mixed[1], sharp[1], rtol=1e-6, atol=1e-3)
    assert (mixed[0] - sharp[0]).abs().mean() > 100
    alone = resample(images, boxes, kept, sizes, 48, blur_sigma=np.zeros(2))
    assert torch.equal(alone, resample(images, boxes, kept, sizes, 48))


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_boxes_of_an_image_beside_each_other_are_those_alone(rows_at_once: int) -> None:
    """Their bands have one breadth, and the widest blur of them decides how far weights are computed."""
    images, sizes = noise(3, 2, 90, 120), np.array([[90, 120], [60, 120], [90, 33]])
    chance = np.random.default_rng(0)
    sides = 1 + chance.random((3, 5, 2)) * (sizes[:, None] - 1)
    boxes = np.floor(np.concatenate((chance.random((3, 5, 2)) * (sizes[:, None] - sides), sides), axis=2) * 1024) / 1024
    flip, blur = chance.random((3, 5)) < 0.5, np.where(chance.random((3, 5)) < 0.5, chance.random((3, 5)) * 3, 0.0)
    together = resampling.resample(images, boxes, flip, sizes, 40, blur_sigma=blur, rows_at_once=rows_at_once)
    assert together.shape == (5, 3, 2, 40, 40)
    for number in range(5):
        alone = resample(images, boxes[:, number], flip[:, number], sizes, 40, blur_sigma=blur[:, number])
        torch.testing.assert_close(together[number], alone, rtol=1e-5, atol=0.1)
