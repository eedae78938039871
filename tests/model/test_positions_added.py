"""Positions that are added to tokens: learned ones and their resizing, fixed sines and cosines."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinox_model import ViTConfig
from dinox_model.positions import FOURIER_PERIODS, LearnedPositions, fourier_positions

WIDTH = 8


def learned(grid: tuple[int, int], *, cls_token: bool = True) -> LearnedPositions:
    config = ViTConfig(
        width=WIDTH,
        num_layers=1,
        num_heads=1,
        mlp_hidden=8,
        positions="learned",
        learned_grid=grid,
        cls_token=cls_token,
    )
    positions = LearnedPositions(config)
    with torch.no_grad():
        positions.embedding.copy_(torch.randn(positions.embedding.shape, generator=torch.Generator().manual_seed(0)))
    return positions


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.5."""
    d = abs(distance)
    if d < 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


def resize_by_loops(values: torch.Tensor, length: int) -> torch.Tensor:
    """(n, …) to (length, …) along the first axis: the kernel, stretched when shrinking, with weights that sum to 1."""
    scale = len(values) / length
    stretch = max(scale, 1.0)
    rows = []
    for place in range(length):
        centre = (place + 0.5) * scale
        weights = [cubic((index + 0.5 - centre) / stretch) for index in range(len(values))]
        rows.append(sum(weight / sum(weights) * value for weight, value in zip(weights, values.double(), strict=True)))
    return torch.stack(rows)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_resizing_is_the_definition(stored_h: int, stored_w: int, height: int, width: int) -> None:
    positions = learned((stored_h, stored_w))
    found = positions((height, width))
    grid = positions.embedding[0, 1:].unflatten(0, (stored_h, stored_w))
    expected = resize_by_loops(resize_by_loops(grid, height).transpose(0, 1), width).transpose(0, 1)
    torch.testing.assert_close(found.patches[0].double(), expected.flatten(0, 1), atol=1e-5, rtol=0)
    assert found.cls is not None
    assert torch.equal(found.cls, positions.embedding[:, :1]), "CLS's is not resized"


def test_at_the_stored_grid_no_bit_changes() -> None:
    positions = learned((3, 5))
    assert torch.equal(positions((3, 5)).patches, positions.embedding[:, 1:])
    assert not torch.equal(positions((5, 3)).patches, positions.embedding[:, 1:]), "as many patches, another grid"


def test_without_cls_there_are_patches_only() -> None:
    positions = learned((2, 3), cls_token=False)
    assert positions.embedding.shape == (1, 6, WIDTH)
    assert positions((2, 3)).cls is None
    assert torch.equal(positions((2, 3)).patches, positions.embedding)


def test_gradients_reach_every_vector() -> None:
    positions = learned((4, 4))
    found = positions((3, 6))
    assert found.cls is not None
    (found.patches.square().sum() + found.cls.square().sum()).backward()
    assert positions.embedding.grad is not None
    assert (positions.embedding.grad.abs().amax(dim=-1) > 0).all()


def test_resizing_is_fp32_under_autocast_and_in_bf16_networks() -> None:
    positions = learned((4, 4))
    expected = positions((6, 6)).patches
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(positions((6, 6)).patches, expected)
    assert positions.bfloat16()((6, 6)).patches.dtype == torch.float32


def test_initialise_fills_everything() -> None:
    positions = learned((3, 3))
    with torch.no_grad():
        positions.embedding.fill_(torch.nan)
    positions.initialise(torch.Generator().manual_seed(0))
    assert positions.embedding.isfinite().all()
    assert 0.01 < positions.embedding.std() < 0.03


@pytest.mark.parametrize("size", [(56, 56), (112, 84), (42, 140)])
def test_it_is_what_dinov2_with_registers_does(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEmbeddings

    settings = transformers.Dinov2WithRegistersConfig(
        hidden_size=WIDTH, num_attention_heads=1, image_size=84, patch_size=14
    )
    theirs = Dinov2WithRegistersEmbeddings(settings)
    ours = learned((6, 6))
    with torch.no_grad():
        theirs.position_embeddings.copy_(ours.embedding)
        grid = size[0] // 14, size[1] // 14
        expected = theirs.interpolate_pos_encoding(torch.zeros(1, 1 + math.prod(grid), WIDTH), *size)
        found = ours(grid)
    assert found.cls is not None
    assert torch.equal(torch.cat((found.cls, found.patches), dim=1), expected)


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([4, 16, 48]))
def test_fourier_is_the_definition(height: int, width: int, size: int) -> None:
    found = fourier_positions((height, width), size)
    assert found.cls is None
    assert found.patches.shape == (1, height * width, size)
    quarter = size // 4
    shortest, longest = FOURIER_PERIODS
    for row in range(height):
        for column in range(width):
            expected = []
            for c in ((row + 0.5) / height * 2 - 1, (column + 0.5) / width * 2 - 1):
                periods = [longest * (shortest / longest) ** (j / max(quarter - 1, 1)) for j in range(quarter)]
                expected += [math.sin(2 * math.pi * c / period) for period in periods]
                expected += [math.cos(2 * math.pi * c / period) for period in periods]
            token = found.patches[0, row * width + column].double()
            torch.testing.assert_close(token, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)


def test_fourier_tells_all_patches_apart_and_grids_of_one_view_agree() -> None:
    fine = fourier_positions((32, 32), 64).patches[0]
    distances = torch.cdist(fine, fine) + 100 * torch.eye(len(fine))
    assert distances.min() > 0.5
    coarse = fourier_positions((4, 4), 64).patches[0].view(4, 4, 64)
    thirds = fourier_positions((12, 12), 64).patches[0].view(12, 12, 64)
    torch.testing.assert_close(thirds[1::3, 1::3], coarse, atol=1e-4, rtol=0)


def test_fourier_refuses_a_width_that_two_axes_cannot_share() -> None:
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        fourier_positions((2, 2), 6)
