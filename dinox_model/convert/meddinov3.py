"""MedDINOv3's ViT-B/16 (Li et al., arXiv 2509.02379): Meta's names, no bias in attention's first linear, epsilon 1e-6.

Its file is a training checkpoint whose network lies in `teacher`, with heads beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dinox_model.config import ViTConfig
from dinox_model.convert.meta_dinov3 import MetaDINOv3
from dinox_model.tensor_files import StoredTensors, WeightsError


class MedDINOv3(MetaDINOv3):
    name = "meddinov3"
    title = "MedDINOv3's state dict"
    norm_eps = 1e-6

    def config_of(self, settings: Mapping[str, Any], tensors: StoredTensors) -> ViTConfig:
        config = super().config_of(settings, tensors)
        faults = self.cannot_hold(config)
        if faults:
            raise WeightsError("not a network of MedDINOv3: " + "; ".join(f"{k}: {v}" for k, v in faults.items()))
        return config

    def cannot_hold(self, config: ViTConfig) -> dict[str, str]:
        faults = super().cannot_hold(config)
        if config.qkv_bias != "none":
            faults["qkv_bias"] = f"its queries, keys and values have no bias, and these are {config.qkv_bias}"
        if config.norm_eps != self.norm_eps:
            faults["norm_eps"] = f"its norms have an epsilon of {self.norm_eps:g}, not {config.norm_eps:g}"
        return faults
