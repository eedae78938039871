"""The MLPs against their formulae in float64."""

import math
from collections.abc import Callable

import pytest
import torch

from dinox_model import ViTConfig
from dinox_model.mlp import MLP, GatedMLP, make_mlp

GELU = lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))  # noqa: E731
RELU2 = lambda h: torch.where(h > 0, h * h, 0.0)  # noqa: E731
SILU = lambda h: h / (1 + torch.exp(-h))  # noqa: E731


def affine(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return x @ linear.weight.double().T + linear.bias.double()


def made(name: str) -> MLP | GatedMLP:
    return make_mlp(ViTConfig(width=8, num_layers=1, num_heads=1, mlp_hidden=24, mlp=name))  # type: ignore[arg-type]


def inputs() -> torch.Tensor:
    return 3.0 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "function"), [("gelu", GELU), ("relu2", RELU2)])
def test_mlp_is_its_formula(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    mlp, x = made(name), inputs()
    assert isinstance(mlp, MLP)
    expected = affine(mlp.down, function(affine(mlp.up, x.double())))
    torch.testing.assert_close(mlp(x).double(), expected, atol=1e-6, rtol=1e-6)
    assert mlp.up.weight.shape == (24, 8)


@pytest.mark.parametrize(("name", "function"), [("swiglu", SILU), ("geglu", GELU)])
def test_gated_mlp_is_its_formula(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    mlp, x = made(name), inputs()
    assert isinstance(mlp, GatedMLP)
    hidden = function(affine(mlp.gate, x.double())) * affine(mlp.up, x.double())
    torch.testing.assert_close(mlp(x).double(), affine(mlp.down, hidden), atol=1e-6, rtol=1e-6)
    assert mlp.up.weight.shape == mlp.gate.weight.shape == (24, 8)
