"""The norms against their formulae in float64."""

import dataclasses

import pytest
import torch

from dinox_model import ViTConfig
from dinox_model.norm import make_norm

CONFIG = ViTConfig(width=24, num_layers=1, num_heads=1, mlp_hidden=8)


def expected(x: torch.Tensor, kind: str, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5])
def test_norm_is_its_formula(kind: str, eps: float) -> None:
    norm = make_norm(dataclasses.replace(CONFIG, norm=kind, norm_eps=eps), 24)
    x = 0.1 + 0.01 * torch.randn(7, 3, 24, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        norm.weight.copy_(weight)
        if isinstance(norm, torch.nn.LayerNorm):
            norm.bias.copy_(bias)
        else:
            bias = torch.zeros(24)
        found = norm(x).double()
    reference = expected(x.double(), kind, eps) * weight.double() + bias.double()
    torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_statistics_are_fp32_under_autocast(kind: str) -> None:
    norm = make_norm(dataclasses.replace(CONFIG, norm=kind), 24)
    # Squares of these lose all that differs between features when they are added up in bf16.
    x = 300.0 + torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    torch.testing.assert_close(found.double(), expected(x.double(), kind, 1e-5), atol=1e-3, rtol=1e-3)
