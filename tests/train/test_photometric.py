"""Noise in HU and gamma on gray: of the rows that are meant, of the size that is asked for, equal on replay."""

import numpy as np
import pytest
import torch

from dinox_train.keyed import uniform
from dinox_train.photometric import add_noise_, apply_gamma_


def keys(rows: int) -> np.ndarray:
    return np.floor(uniform(0, "noise", 0, np.arange(rows), 1, 2)[:, 0] * 2.0**32).astype(np.uint32)


def test_noise_has_its_standard_deviation_and_leaves_other_rows_alone() -> None:
    hu = torch.full((4, 3, 64, 64), -850.0)
    add_noise_(hu, np.array([0.0, 10.0, 0.0, 30.0]), keys(4))
    assert (hu[[0, 2]] == -850).all()
    for row, sigma in ((1, 10), (3, 30)):
        assert hu[row].mean().item() == pytest.approx(-850, abs=5 * sigma / 110)
        assert hu[row].std().item() == pytest.approx(sigma, rel=0.03)
    assert not torch.equal((hu[1] + 850) / 10, (hu[3] + 850) / 30)


def test_noise_is_a_function_of_key_and_place() -> None:
    sigma = np.array([5.0, 6.0, 7.0])
    whole = torch.zeros(3, 2, 33, 17)
    add_noise_(whole, sigma, keys(3))
    for row in range(3):
        alone = torch.zeros(1, 2, 33, 17)
        add_noise_(alone, sigma[row : row + 1], keys(3)[row : row + 1])
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-5)
    assert (whole[0, 0] - whole[0, 1]).abs().mean() > 1  # slices of a window have noise of their own


def test_gamma_is_a_power_and_leaves_other_rows_alone() -> None:
    shown = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    curved = shown.clone()
    apply_gamma_(curved, np.array([1.0, 0.8, 1.25]))
    assert torch.equal(curved[0], shown[0])
    torch.testing.assert_close(curved[1], shown[1] ** 0.8)
    torch.testing.assert_close(curved[2], shown[2] ** 1.25)
    ends = torch.tensor([[0.0, 1.0]])
    apply_gamma_(ends, np.array([0.7]))
    assert ends.tolist() == [[0.0, 1.0]]


def test_nothing_is_done_where_nothing_is_asked() -> None:
    hu = torch.randn(2, 1, 4, 4)
    before = hu.clone()
    add_noise_(hu, np.zeros(2), keys(2))
    apply_gamma_(hu, np.ones(2))
    assert torch.equal(hu, before)
