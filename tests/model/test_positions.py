"""Rotary positions, in the view's coordinate: against plain loops, and what a rotation must keep."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinox_model import ViTConfig
from dinox_model.positions import RotaryPositions, Rotations, formula_periods, patch_coordinates, rotate, rotations

PREFIX = 5


def rotate_by_loops(token: torch.Tensor, row: int, column: int, grid: tuple[int, int]) -> torch.Tensor:
    """One token's rotation in float64, plane by plane, from the definition."""
    size = len(token)
    angles = []
    for index, length in ((row, grid[0]), (column, grid[1])):
        coordinate = (index + 0.5) / length * 2 - 1
        angles += [2 * math.pi * coordinate / 100 ** (2 * j / (size / 2)) for j in range(size // 4)]
    turned = torch.empty(size, dtype=torch.float64)
    for i, angle in enumerate(angles):
        a, b = float(token[i]), float(token[i + size // 2])
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
    return turned


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([4, 8, 64]))
def test_rotation_is_the_definition_and_leaves_the_prefix(height: int, width: int, size: int) -> None:
    x = torch.randn(PREFIX + height * width, size, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x, rotations((height, width), size, PREFIX))
    assert torch.equal(rotated[:PREFIX], x[:PREFIX])
    for row in range(height):
        for column in range(width):
            token = PREFIX + row * width + column
            expected = rotate_by_loops(x[token], row, column, (height, width))
            torch.testing.assert_close(rotated[token].double(), expected, atol=2e-6, rtol=0)


def test_rotation_keeps_norms() -> None:
    x = torch.randn(3, 2, PREFIX + 14 * 9, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotate(x, rotations((14, 9), 64, PREFIX)).norm(dim=-1), x.norm(dim=-1))


def test_products_depend_on_the_distance_only() -> None:
    height, width, size = 7, 9, 64
    query, key = torch.randn(2, size, generator=torch.Generator().manual_seed(2))
    by = rotations((height, width), size, 0)
    query_HWE, key_HWE = (rotate(x.expand(height * width, size), by).view(height, width, size) for x in (query, key))
    products = torch.einsum("hwe,HWe->hwHW", query_HWE, key_HWE)
    down, right = 2, 3
    shifted = products[down:, right:, down:, right:]
    torch.testing.assert_close(shifted, products[:-down, :-right, :-down, :-right], atol=1e-4, rtol=0)
    assert (products[0, 0, 0, 0] - products[0, 0, 1, 0]).abs() > 1e-2, "the distance must matter"


def test_rows_and_columns_are_told_apart() -> None:
    by = rotations((6, 6), 16, 0)
    cos = by.cos.view(6, 6, 16)[..., :8]
    assert torch.equal(cos[2, 0, :4], cos[2, 5, :4])
    assert torch.equal(cos[0, 3, 4:], cos[5, 3, 4:])
    assert not torch.equal(cos[2, 0], cos[0, 2])


def test_coordinates_are_symmetric_centres() -> None:
    torch.testing.assert_close(patch_coordinates(4), torch.tensor([-0.75, -0.25, 0.25, 0.75]))


def test_angles_are_fp32_whatever_the_dtype_of_tokens_and_autocast() -> None:
    x = torch.randn(PREFIX + 256 * 2, 64, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        by = rotations((256, 2), 64, PREFIX)
        rotated = rotate(x.bfloat16(), by)
    assert by.cos.dtype == by.sin.dtype == torch.float32
    assert rotated.dtype == torch.bfloat16
    exact = rotate(x.bfloat16().double(), Rotations(*(table.double() for table in by)))
    assert torch.equal(rotated, exact.bfloat16()), "one rounding at the end, none before"


@given(
    st.tuples(st.floats(-1, 1), st.floats(-1, 1)), st.tuples(st.floats(0.5, 2), st.floats(0.5, 2)), st.integers(1, 5)
)
def test_moved_coordinates_are_shifted_then_stretched(
    shift: tuple[float, float], factor: tuple[float, float], height: int
) -> None:
    size, width = 8, 3
    by = rotations((height, width), size, PREFIX, moved=torch.tensor([shift, factor]))
    assert torch.equal(by.cos[:PREFIX], torch.ones(PREFIX, size)), "the prefix does not move"
    for row in range(height):
        for column in range(width):
            places = ((row + 0.5) / height * 2 - 1, (column + 0.5) / width * 2 - 1)
            moved = [(place + shift[axis]) * factor[axis] for axis, place in enumerate(places)]
            angles = torch.tensor([2 * math.pi * c / 100 ** (j / (size // 4)) for c in moved for j in range(size // 4)])
            token = PREFIX + row * width + column
            cos, sin = angles.cos(), angles.sin()
            torch.testing.assert_close(by.cos[token], torch.cat((cos, cos)), atol=1e-5, rtol=0)
            torch.testing.assert_close(by.sin[token], torch.cat((-sin, sin)), atol=1e-5, rtol=0)


def test_a_move_by_nothing_changes_no_bit() -> None:
    plain, moved = (
        rotations((5, 7), 64, PREFIX),
        rotations((5, 7), 64, PREFIX, moved=torch.tensor([[0.0] * 2, [1.0] * 2])),
    )
    assert torch.equal(plain.cos, moved.cos)
    assert torch.equal(plain.sin, moved.sin)


CONFIG = ViTConfig(width=64, num_layers=1, num_heads=4, mlp_hidden=8, rope_period=50.0)


def test_the_networks_positions_are_the_functions_of_its_config() -> None:
    by = RotaryPositions(CONFIG)((3, 4))
    expected = rotations((3, 4), 16, CONFIG.num_prefix_tokens, periods=formula_periods(16, 50.0))
    assert torch.equal(by.cos, expected.cos)
    assert torch.equal(by.sin, expected.sin)
    assert not torch.equal(by.cos, rotations((3, 4), 16, CONFIG.num_prefix_tokens).cos), "the period must matter"
    assert not RotaryPositions(CONFIG).state_dict(), "periods by formula are no part of the weights"


def test_stored_periods_are_loaded_and_used() -> None:
    config = dataclasses.replace(CONFIG, rope_stored_periods=True)
    positions = RotaryPositions(config)
    with torch.no_grad():
        positions.periods.fill_(torch.nan)
    positions.initialise()
    assert torch.equal(positions.periods, formula_periods(16, 50.0))
    rounded = formula_periods(16, 50.0).bfloat16().float()
    positions.load_state_dict({"periods": rounded})
    exact, by = RotaryPositions(CONFIG)((14, 14)), positions((14, 14))
    assert torch.equal(by.cos, rotations((14, 14), 16, config.num_prefix_tokens, periods=rounded).cos)
    difference = (by.cos - exact.cos).abs().max()
    assert 1e-4 < difference < 2e-2, "rounding periods to bf16 is seen, and is small"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_of_another_dtype_has_fp32_angles(dtype: torch.dtype) -> None:
    positions = RotaryPositions(dataclasses.replace(CONFIG, rope_stored_periods=True))
    positions.initialise()
    assert positions.to(dtype)((3, 3)).cos.dtype == torch.float32
