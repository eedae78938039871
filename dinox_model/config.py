"""The shape of a network: one frozen dataclass, checked when it is made, and the presets.

Invariant: two networks with equal `ViTConfig`s have the same parameters, by name and shape. The presets have DINOv3's
shapes, so that Hugging Face's `DINOv3ViTModel` can hold their weights.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

NORM_EPS = 1e-5
"""Epsilon of every LayerNorm. DINOv3's released weights use it; 1e-6 would shift features by some 1e-3."""

_CHOICES = {"mlp": ("gelu", "swiglu"), "qkv_bias": ("none", "full", "k_masked")}


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer's shape. Raises ValueError for values that make no network."""

    width: int
    """Features of a token, d."""
    num_layers: int
    num_heads: int
    """Attention heads; each has width / num_heads features, a multiple of 4 (positions.py says why)."""
    mlp_hidden: int
    """Hidden features of the MLP (for SwiGLU: of each of the two branches)."""
    mlp: str = "gelu"
    """`gelu` (exact erf) or `swiglu`."""
    qkv_bias: str = "k_masked"
    """`none`, `full`, or `k_masked`: for queries and values only, as DINOv3 has it."""
    in_channels: int = 3
    """Slices in a window."""
    patch_size: int = 16
    """Side of a patch, pixels."""
    num_registers: int = 4
    layer_scale: float = 1e-5
    """First value of LayerScale on both residuals. 1e-5 is DINOv3's: each block starts by adding almost nothing."""

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("width", "num_layers", "num_heads", "mlp_hidden", "in_channels", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"ViTConfig.{name} must be at least 1, not {getattr(self, name)}")
        if self.num_registers < 0:
            raise ValueError(f"ViTConfig.num_registers must not be negative, but is {self.num_registers}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"ViTConfig.{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if not math.isfinite(self.layer_scale):
            raise ValueError(f"ViTConfig.layer_scale must be finite, not {self.layer_scale}")
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"ViTConfig.width must be a multiple of 4 x num_heads, because each head shares its features out "
                f"among two axes with two halves each; {self.width} is not one of 4 x {self.num_heads}"
            )

    def _check_types(self) -> None:
        for name, wanted in get_type_hints(type(self)).items():
            value = getattr(self, name)
            fits = type(value) in (int, float) if wanted is float else type(value) is wanted
            if not fits:
                raise ValueError(f"ViTConfig.{name} must be of type {wanted.__name__}, not {value!r}")

    @property
    def head_width(self) -> int:
        """Features of a token in one attention head."""
        return self.width // self.num_heads

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: CLS and registers. They have no position."""
        return 1 + self.num_registers

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """The inverse of `to_dict`. Raises ValueError for an unknown key (naming the nearest) or a missing one."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise ValueError(f"unknown key {key!r} of a ViTConfig{nearest(key, fields)}")
        required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"a ViTConfig needs {', '.join(missing)} too")
        return cls(**values)


def nearest(name: str, known: Mapping[str, Any]) -> str:
    """The rest of an error message about an unknown name: the known one it may have been meant to be, or all of
    them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


PRESETS: dict[str, ViTConfig] = {
    "vit_ti": ViTConfig(width=192, num_layers=12, num_heads=3, mlp_hidden=768),
    "vit_s": ViTConfig(width=384, num_layers=12, num_heads=6, mlp_hidden=1536),
    "vit_b": ViTConfig(width=768, num_layers=12, num_heads=12, mlp_hidden=3072),
    "vit_l": ViTConfig(width=1024, num_layers=24, num_heads=16, mlp_hidden=4096),
    "vit_h": ViTConfig(width=1280, num_layers=32, num_heads=20, mlp_hidden=5120, mlp="swiglu"),
    "vit_g": ViTConfig(width=1536, num_layers=40, num_heads=24, mlp_hidden=4096, mlp="swiglu"),
    "vit_7b": ViTConfig(width=4096, num_layers=40, num_heads=32, mlp_hidden=8192, mlp="swiglu"),
}
"""By the name that `model.preset` of a run's configuration takes. vit_h is the shape that DINOv3 calls H+."""
