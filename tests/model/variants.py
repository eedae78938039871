"""Small networks with options on, each parameter of which matters, for tests."""

import dataclasses

import torch

import dinox_model
from dinox_model import VisionTransformer, ViTConfig, ViTFeatures

TINY = ViTConfig(width=32, num_layers=3, num_heads=2, mlp_hidden=64, layer_scale=0.5, num_registers=2)
MM = torch.tensor([[0.7, 0.7], [1.3, 1.1]])
VARIANTS = {
    "plain": {},
    "rms": {"norm": "rms", "qk_norm": True, "mlp": "swiglu"},
    "bare": {"layer_scale": None, "cls_token": False, "num_registers": 0, "mlp": "relu2", "qkv_bias": "full"},
    "no cls": {"cls_token": False},
    "rope_mm": {"positions": "rope_mm"},
    "learned": {"positions": "learned", "learned_grid": (3, 2)},
    "learned, no cls": {"positions": "learned", "learned_grid": (3, 2), "cls_token": False},
    "fourier": {"positions": "fourier", "mlp": "geglu"},
    "scale": {"scale_conditioning": True},
    "stored periods": {"rope_stored_periods": True},
    "untied": {"untied_cls_norm": True},
    "drop path": {"drop_path": 0.5, "rope_shift": 0.2, "rope_jitter": 1.3, "rope_rescale": 1.5},
}


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def perturbed(config: ViTConfig) -> VisionTransformer:
    """A network in which every parameter matters."""
    model = dinox_model.build(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def variant(name: str) -> ViTConfig:
    return dataclasses.replace(TINY, **VARIANTS[name])


def mm_for(config: ViTConfig) -> torch.Tensor | None:
    return MM if config.uses_mm_per_pixel else None


def joined(features: ViTFeatures) -> torch.Tensor:
    cls = [] if features.cls is None else [features.cls[:, None]]
    return torch.cat([*cls, features.registers, features.patches], dim=1)
