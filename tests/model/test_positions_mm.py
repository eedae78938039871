"""Rotary positions in millimetres: the same distance has the same angle in views of any zoom."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinox_model import ViTConfig, build
from dinox_model.positions import UNIT_MM, RotaryPositions, Rotations, rotate, rotations

CONFIG = ViTConfig(width=48, num_layers=1, num_heads=3, mlp_hidden=8, num_registers=2, positions="rope_mm")
PREFIX = CONFIG.num_prefix_tokens
PATCH = CONFIG.patch_size


def by_of(grid: tuple[int, int], mm_per_pixel: list[list[float]], moved: torch.Tensor | None = None) -> Rotations:
    return RotaryPositions(CONFIG)(grid, mm_per_pixel=torch.tensor(mm_per_pixel), moved=moved)


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)), min_size=1, max_size=3),
)
def test_angles_are_the_definition(height: int, width: int, mm: list[tuple[float, float]]) -> None:
    by = by_of((height, width), [list(pair) for pair in mm])
    num_angles = CONFIG.head_width // 4
    assert by.cos.shape == (len(mm), 1, PREFIX + height * width, 4 * num_angles)
    assert torch.equal(by.sin[:, :, :PREFIX], torch.zeros(len(mm), 1, PREFIX, 4 * num_angles))
    for image, (mm_y, mm_x) in enumerate(mm):
        for row in range(height):
            for column in range(width):
                y_mm = (row + 0.5 - height / 2) * PATCH * mm_y
                x_mm = (column + 0.5 - width / 2) * PATCH * mm_x
                angles = torch.tensor(
                    [
                        2 * math.pi * c / UNIT_MM / 100 ** (j / num_angles)
                        for c in (y_mm, x_mm)
                        for j in range(num_angles)
                    ]
                )
                found = by.sin[image, 0, PREFIX + row * width + column]
                torch.testing.assert_close(found, torch.cat((-angles.sin(), angles.sin())), atol=2e-5, rtol=0)


def test_products_depend_on_the_distance_in_mm() -> None:
    query, key = torch.randn(2, 1, 1, 1, CONFIG.head_width, generator=torch.Generator().manual_seed(0))
    near, far = by_of((8, 8), [[0.5, 0.5]]), by_of((4, 4), [[1.0, 1.0]])

    def product(by: Rotations, grid: int, one: tuple[int, int], other: tuple[int, int]) -> float:
        tokens = [PREFIX + row * grid + column for row, column in (one, other)]
        places = [Rotations(by.cos[:, :, token : token + 1], by.sin[:, :, token : token + 1]) for token in tokens]
        return float((rotate(query, places[0]) * rotate(key, places[1])).sum())

    # two patches of 8 mm are one of 16 mm
    assert product(near, 8, (1, 3), (5, 1)) == pytest.approx(product(far, 4, (0, 2), (2, 1)), abs=1e-4)
    assert abs(product(near, 8, (1, 3), (5, 1)) - product(far, 4, (1, 3), (3, 1))) > 1e-2, "not the distance in patches"


def test_a_view_of_256_mm_has_the_plain_coordinates_and_so_has_one_of_unknown_scale() -> None:
    grid = (4, 8)
    of_256_mm = [256.0 / (grid[0] * PATCH), 256.0 / (grid[1] * PATCH)]
    plain = rotations(grid, CONFIG.head_width, PREFIX)
    by = by_of(grid, [of_256_mm, [math.nan, 1.0], [0.7, math.nan], [0.7, 0.7]])
    torch.testing.assert_close(by.sin[0, 0], plain.sin, atol=1e-5, rtol=0)
    assert torch.equal(by.sin[1, 0], plain.sin)
    assert torch.equal(by.sin[2, 0], plain.sin)
    assert (by.sin[3, 0] - plain.sin).abs().max() > 0.1


def test_each_image_is_turned_by_its_own() -> None:
    x = torch.randn(2, CONFIG.num_heads, PREFIX + 6, CONFIG.head_width, generator=torch.Generator().manual_seed(1))
    by = by_of((2, 3), [[0.5, 0.6], [1.5, 1.4]])
    rotated = rotate(x, by)
    for image in range(2):
        alone = Rotations(by.cos[image, 0], by.sin[image, 0])
        assert torch.equal(rotated[image], rotate(x[image], alone))
    assert torch.equal(rotated[:, :, :PREFIX], x[:, :, :PREFIX])
    rows = torch.tensor([1])
    assert torch.equal(rotate(x[rows], by.of_images(rows)), rotated[rows])
    plain = rotations((2, 3), CONFIG.head_width, PREFIX)
    assert plain.of_images(rows) is plain, "rotations that all images share are nobody's rows"


def test_moved_coordinates_stretch_millimetres_too() -> None:
    moved = torch.tensor([[0.0, 0.0], [2.0, 0.5]])
    torch.testing.assert_close(by_of((3, 3), [[1.0, 1.0]], moved).cos, by_of((3, 3), [[2.0, 0.5]]).cos)


def test_without_the_size_of_pixels_it_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="mm_per_pixel"):
        RotaryPositions(CONFIG)((2, 2))


@pytest.mark.parametrize("size", [0.0, -1.0, math.inf])
def test_a_size_that_is_none_is_seen_in_the_features(size: float) -> None:
    config = ViTConfig(width=32, num_layers=1, num_heads=2, mlp_hidden=64, positions="rope_mm")
    with torch.no_grad():
        features = build(config)(torch.zeros(1, 3, 32, 32), mm_per_pixel=torch.full((1, 2), size))
    assert features.patches.isnan().all()
