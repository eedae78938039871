"""What benchmarks/model.py measures: a network at a size and batch, with weights and an input that its peer gets too.

    scratch/case.json     settings of transformers' DINOv3ViTModel, precision, device, threads
            weights.npz   by their names
            input.npy     float32 (b, c, y, x)
    answers: hidden.npy, gradient.npy; the peer's features, and the gradient of its patch embedding's bias

Invariant: both sides have the same weights and the same input, and are compared before one of them is timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import parity
import torch
from torch import Tensor

import dinox_model
from dinox_model import VisionTransformer, ViTConfig
from dinox_model.convert.export import target_format, their_tensors
from dinox_train.platform import autocast

TOLERANCE = 1e-3
"""Largest difference of a feature, in fp32; features are of the size of 1. Weights at which every part matters make
the roundings of 24 blocks add up to some 1e-4; other mathematics would differ by 0.1."""


class CaseError(ValueError):
    """What is compared is not the same work."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, and what goes through it."""

    name: str
    """Of the network: a preset's, or the configuration file's."""
    config: ViTConfig
    size: int
    """Side of the input, pixels."""
    batch: int
    precision: str
    """fp32, or bf16 (autocast)."""
    device: torch.device
    threads: int

    @property
    def label(self) -> str:
        """In the names of contenders and figures."""
        return f"{self.name} {self.size}" + ("" if self.precision == "fp32" else f" {self.precision}")

    def described(self) -> dict[str, Any]:
        """For the result's `data`."""
        return {"name": self.label, "batch": self.batch, "config": self.config.to_dict()}

    def autocast(self) -> torch.autocast:
        """The context that the networks run in."""
        return autocast(self.device, self.precision)

    def model(self) -> VisionTransformer:
        """The network, with weights at which every part matters."""
        model = dinox_model.build(self.config)
        parity.perturb(model)
        return model.to(self.device)

    def input(self) -> Tensor:
        """float32 (b, c, y, x) on the device; the same for the same case."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.config.in_channels, self.size, self.size)
        return torch.randn(shape, generator=generator).to(self.device)

    def peer_cannot(self) -> str | None:
        """Why transformers' DINOv3ViTModel cannot be this network; None: it can."""
        if self.config.positions == "learned":
            return "it has rotary positions only"
        faults = target_format(self.model_without_memory(), "hf_dinov3").cannot_hold(self.config)
        return "; ".join(f"{option}: {why}" for option, why in faults.items()) or None

    def model_without_memory(self) -> VisionTransformer:
        """Shapes only."""
        with torch.device("meta"):
            return VisionTransformer(self.config)

    def write(self, folder: Path, model: VisionTransformer) -> dict[str, Any]:
        """Write what the peer needs; returns the arguments of its module."""
        target = target_format(model, "hf_dinov3")
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.numpy() for name, tensor in their_tensors(model, target).items()}
        np.savez(folder / "weights.npz", **weights)  # type: ignore[arg-type]
        np.save(folder / "input.npy", self.input().cpu().numpy())
        return {
            "folder": str(folder),
            "settings": target.settings_of(self.config),
            "precision": self.precision,
            "device": str(self.device),
            "threads": self.threads,
        }

    def compare(self, folder: Path, model: VisionTransformer) -> float:
        """The largest difference of the peer's answers from ours, both in fp32. Raises CaseError where it is large."""
        features = model(self.input())
        hidden = all_tokens(features)
        hidden.sum().backward()
        bias = model.patch_embed.bias.grad
        assert bias is not None
        ours = {"hidden": hidden.detach(), "gradient": bias / bias.abs().max()}
        model.zero_grad()
        furthest = 0.0
        for name, tensor in ours.items():
            theirs = torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False)).to(self.device)
            difference = float((tensor - theirs).abs().max())
            if not difference <= TOLERANCE:
                raise CaseError(f"{self.label}: {name} of transformers differ from ours by {difference:.2g}")
            furthest = max(furthest, difference)
        return furthest


def all_tokens(features: dinox_model.ViTFeatures) -> Tensor:
    """(b, t, d): CLS, registers, patches."""
    assert features.cls is not None
    return torch.cat((features.cls[:, None], features.registers, features.patches), dim=1)
