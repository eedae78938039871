"""Weights for three colours on windows of N slices: what is alike in all slices gives the same tokens."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import all_tokens

from dinox_model import load_pretrained, save_pretrained
from dinox_model.convert.channels import adapt_channels
from tests.model.foreign_weights import SMALL, perturbed


@pytest.mark.parametrize("slices", [1, 2, 3, 4, 5, 9])
def test_equal_slices_give_the_tokens_of_a_gray_image(tmp_path: Path, slices: int) -> None:
    rgb = perturbed(SMALL)
    save_pretrained(rgb, tmp_path / "out", format="hf")
    model, report = load_pretrained(tmp_path / "out", in_channels=slices)
    assert model.config.in_channels == slices
    assert (slices == 3) == (not report.adapted)
    gray = torch.randn(2, 1, 32, 48)
    found = all_tokens(model(gray.expand(-1, slices, -1, -1)))
    assert (found - all_tokens(rgb(gray.expand(-1, 3, -1, -1)))).abs().max() < 1e-5


def test_the_first_three_keep_their_filters_and_one_gets_the_sum() -> None:
    weight = torch.randn(8, 3 * 4)
    five = adapt_channels(weight, 3, 5).unflatten(1, (5, 4))
    rgb = weight.unflatten(1, (3, 4))
    assert torch.allclose(five[:, :3], rgb * 3 / 5)
    assert torch.allclose(five[:, 3], rgb.mean(1) * 3 / 5)
    assert torch.allclose(adapt_channels(weight, 3, 1), rgb.sum(1))
    assert adapt_channels(weight, 3, 3) is weight


@given(st.integers(1, 6), st.integers(1, 9))
def test_the_sum_over_channels_stays(old: int, new: int) -> None:
    weight = torch.randn(3, old * 4)
    wider = adapt_channels(weight, old, new)
    assert wider.shape == (3, new * 4)
    assert torch.allclose(wider.unflatten(1, (new, 4)).sum(1), weight.unflatten(1, (old, 4)).sum(1), atol=1e-5)


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be"):
        adapt_channels(torch.zeros(3, 10), 3, 5)
    with pytest.raises(ValueError, match="one of 0"):
        adapt_channels(torch.zeros(3, 12), 3, 0)
