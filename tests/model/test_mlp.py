"""The two MLPs against their formulae in float64."""

import math

import pytest
import torch

from dinox_model import ViTConfig
from dinox_model.mlp import GeluMLP, SwiGLU, make_mlp


def affine(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return x @ linear.weight.double().T + linear.bias.double()


def test_gelu_mlp_uses_the_exact_gelu() -> None:
    mlp = GeluMLP(8, 24)
    x = 3.0 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    hidden = affine(mlp.up, x.double())
    expected = affine(mlp.down, hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
    torch.testing.assert_close(mlp(x).double(), expected, atol=1e-6, rtol=1e-6)


def test_swiglu_gates_with_silu() -> None:
    mlp = SwiGLU(8, 24)
    x = 3.0 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    gate = affine(mlp.gate, x.double())
    expected = affine(mlp.down, gate / (1 + torch.exp(-gate)) * affine(mlp.up, x.double()))
    torch.testing.assert_close(mlp(x).double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("gelu", GeluMLP), ("swiglu", SwiGLU)])
def test_the_config_chooses(name: str, kind: type) -> None:
    mlp = make_mlp(ViTConfig(width=8, num_layers=1, num_heads=1, mlp_hidden=24, mlp=name))
    assert isinstance(mlp, kind)
    assert mlp.up.weight.shape == (24, 8)
