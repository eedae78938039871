"""Keyed normal numbers: the bits against plain integers, and what noise must be: normal, uncorrelated, keyed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinox_train.keyed_normal import keyed_bits, keyed_normal


def keys(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count, 2), generator=generator).to(torch.int32)


def mixed(value: int) -> int:
    """lowbias32 on Python's integers."""
    value ^= value >> 16
    value = value * 0x7FEB352D % 2**32
    value ^= value >> 15
    value = value * 0x846CA68B % 2**32
    return value ^ value >> 16


@given(key=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), count=st.integers(1, 40))
def test_the_bits_are_those_of_the_formula(key: tuple[int, int], count: int) -> None:
    given_keys = torch.from_numpy(np.array([key], np.uint32).view(np.int32))
    expected = [mixed((mixed(index ^ key[0]) + key[1]) % 2**32) for index in range(count)]
    assert keyed_bits(given_keys, count)[0].numpy().view(np.uint32).tolist() == expected


def test_numbers_are_box_and_mullers() -> None:
    bits = keyed_bits(keys(3), 50).numpy().view(np.uint32).astype(np.float64)
    radius = np.sqrt(-2 * np.log((bits // 2**16 + 0.5) / 2**16))
    angle = 2 * math.pi * (bits % 2**16) / 2**16
    expected = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), axis=1)
    np.testing.assert_allclose(keyed_normal(keys(3), 100).numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(keyed_normal(keys(3), 99).numpy(), expected[:, :99], atol=2e-6)


def test_they_are_normal() -> None:
    numbers = keyed_normal(keys(20), 50_000).double().flatten()
    assert numbers.mean().item() == pytest.approx(0, abs=0.004)
    assert numbers.var().item() == pytest.approx(1, abs=0.006)
    assert (numbers**3).mean().item() == pytest.approx(0, abs=0.015)
    assert (numbers**4).mean().item() == pytest.approx(3, abs=0.04)
    assert numbers.abs().max() < 4.9
    ordered = numbers.sort().values
    normal = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    steps = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert (normal - steps).abs().max() < 1.63 / math.sqrt(len(ordered))  # Kolmogorov-Smirnov, 1 %


@pytest.mark.parametrize("given_keys", [[[7, 9], [7, 10], [8, 10], [6, 11], [7 + 2**16, -9]], keys(5).tolist()])
def test_neighbours_and_rows_have_nothing_in_common(given_keys: list[list[int]]) -> None:
    side = 128
    near = torch.tensor(given_keys, dtype=torch.int32)
    pictures = keyed_normal(near, side * side).view(len(near), side, side)
    bound = 4.5 / side
    correlations = np.corrcoef(pictures.flatten(1).numpy()) - np.eye(len(near))
    assert np.abs(correlations).max() < bound
    for y, x in ((0, 1), (1, 0), (1, 1), (0, 2), (0, 64), (64, 0)):
        shifted = pictures.roll((y, x), (1, 2))
        assert ((pictures * shifted).mean(dim=(1, 2)).abs() < bound).all()
        assert ((pictures[0] * shifted[1:]).mean(dim=(1, 2)).abs() < bound).all()


def test_a_row_does_not_depend_on_the_others() -> None:
    whole = keyed_normal(keys(4), 1001)
    for row in range(4):
        torch.testing.assert_close(keyed_normal(keys(4)[row : row + 1], 1001)[0], whole[row], rtol=0, atol=1e-6)
