"""The shape of a network: one frozen dataclass, checked when it is made, and the presets.

Invariant: two networks with equal `ViTConfig`s have the same parameters, by name and shape, and compute the same. The
presets have DINOv3's shapes, so that Hugging Face's `DINOv3ViTModel` can hold their weights. docs/networks.md says when
to choose what, and where each option comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from dinox_model import fields
from dinox_model.fields import Bounds
from dinox_model.fields import nearest as nearest

Length = Annotated[int, Bounds(minimum=1, maximum=2**16)]
"""Far beyond any network that could be trained: a slip of the keyboard is refused before torch runs over its sizes."""
RotaryRange = Annotated[float, Bounds(above=1.0)]


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer's shape and what it computes. Raises ValueError for values that make no network."""

    width: Length
    """Features of a token, d."""
    num_layers: Annotated[int, Bounds(minimum=1, maximum=1024)]
    """Blocks: attention and MLP each."""
    num_heads: Length
    """Attention heads; each has width / num_heads features, for rotary positions a multiple of 4."""
    mlp_hidden: Length
    """Hidden features of the MLP (for the gated ones: of each of the two branches)."""
    mlp: Literal["gelu", "swiglu", "relu2", "geglu"] = "gelu"
    """down(f(up x)) with f GELU (exact erf) or relu(x)^2, or down(f(gate x) up x) with f SiLU (swiglu) or GELU."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm: no mean taken off, no bias."""
    norm_eps: Annotated[float, Bounds(above=0.0)] = 1e-5
    """Epsilon of every norm. DINOv3's released weights have 1e-5; 1e-6 would shift their features by some 1e-3."""
    qk_norm: bool = False
    """A norm over the features of each head's queries and keys, before they are rotated."""
    qkv_bias: Literal["none", "full", "k_masked"] = "k_masked"
    """k_masked: for queries and values only, as DINOv3 has it (without rotation a bias of keys changes no softmax)."""
    layer_scale: float | None = 1e-5
    """First value of LayerScale on both residuals; 1e-5 is DINOv3's: each block starts by adding almost nothing. null:
    no LayerScale."""
    zero_init_residuals: bool = False
    """Each block starts by adding nothing: the last linear of attention and of the MLP begins at 0."""
    drop_path: Annotated[float, Bounds(minimum=0.0, below=1.0)] = 0.0
    """Share of a batch's images that skip each residual in training (`Draws` says which)."""
    in_channels: Length = 3
    """Slices in a window."""
    patch_size: Annotated[int, Bounds(minimum=1, maximum=1024)] = 16
    """Side of a patch, pixels."""
    cls_token: bool = True
    """A token for the whole image. Without it `ViTFeatures.cls` is None, and heads pool the patches."""
    num_registers: Annotated[int, Bounds(minimum=0, maximum=2**16)] = 4
    """Tokens for the network's own use, after CLS."""
    untied_cls_norm: bool = False
    """A final norm of its own, `cls_norm`, for CLS and registers of local crops in training."""
    positions: Literal["rope", "rope_mm", "learned", "fourier"] = "rope"
    """Axial rotary positions in the view's own coordinate (-1 to 1) or in millimetres; or a vector added to each patch:
    learned, resized to the grid, or fixed sines and cosines."""
    rope_period: Annotated[float, Bounds(minimum=1.0)] = 100.0
    """Bound of the slowest rotation's period, in units of the coordinate; the fastest has 1."""
    rope_shift: Annotated[float, Bounds(above=0.0)] | None = None
    """In training, both coordinates move by up to this much. null: not."""
    rope_jitter: RotaryRange | None = None
    """In training, each coordinate is stretched by its own factor between 1/this and this. null: not."""
    rope_rescale: RotaryRange | None = None
    """In training, both coordinates are stretched by one factor between 1/this and this. null: not."""
    rope_stored_periods: bool = False
    """Periods are part of the weights (`rope.periods`), as in Meta's files, which hold them rounded to bf16."""
    learned_grid: tuple[Length, Length] | None = None
    """Rows and columns of `positions.embedding` as stored; needed by learned positions."""
    scale_conditioning: bool = False
    """Tokens are told the physical size of the view's pixels, within bounds."""

    def __post_init__(self) -> None:
        fields.check(self)
        self._check_width()
        self._check_positions()
        if self.untied_cls_norm and not self.num_prefix_tokens:
            raise ValueError("ViTConfig.untied_cls_norm needs a CLS token or registers: they are what it norms")

    def _check_width(self) -> None:
        if self.is_rotary and self.width % (4 * self.num_heads):
            raise ValueError(
                f"ViTConfig.width must be a multiple of 4 x num_heads, because each head shares its features out "
                f"among two axes with two halves each; {self.width} is not one of 4 x {self.num_heads}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"ViTConfig.width {self.width} must be a multiple of num_heads {self.num_heads}")
        if self.positions == "fourier" and self.width % 4:
            raise ValueError(
                f"ViTConfig.width must be a multiple of 4 for fourier positions (sine and cosine of two axes), "
                f"not {self.width}"
            )

    def _check_positions(self) -> None:
        rotary = {"rope_shift": None, "rope_jitter": None, "rope_rescale": None, "rope_stored_periods": False}
        for name, off in (rotary | {"rope_period": 100.0}).items():
            if not self.is_rotary and getattr(self, name) != off:
                raise ValueError(f"ViTConfig.{name} is for positions rope or rope_mm, not {self.positions}")
        if (self.positions == "learned") != (self.learned_grid is not None):
            raise ValueError(
                f"ViTConfig.learned_grid belongs to positions learned, and only to them; it is {self.learned_grid} "
                f"with positions {self.positions}"
            )

    @property
    def head_width(self) -> int:
        """Features of a token in one attention head."""
        return self.width // self.num_heads

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: CLS and registers. They have no position."""
        return int(self.cls_token) + self.num_registers

    @property
    def is_rotary(self) -> bool:
        """Whether positions are rotations of queries and keys."""
        return self.positions in ("rope", "rope_mm")

    @property
    def uses_mm_per_pixel(self) -> bool:
        """Whether the network must be told the physical size of its input's pixels."""
        return self.positions == "rope_mm" or self.scale_conditioning

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return fields.to_mapping(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """The inverse of `to_dict`. Raises ValueError for an unknown key (naming the nearest) or a missing one."""
        return fields.from_mapping(cls, values)

    def to_yaml(self) -> str:
        """All fields as YAML."""
        return fields.to_yaml(self.to_dict())

    @classmethod
    def from_yaml(cls, text: str) -> ViTConfig:
        """The inverse of `to_yaml`. Raises ValueError for invalid YAML, and as `from_dict` does."""
        return cls.from_dict(fields.from_yaml(text))

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """A JSON schema of `to_dict`'s values: types, choices, limits, defaults, and what each means."""
        return fields.json_schema(cls)


PRESETS: dict[str, ViTConfig] = {
    "vit_ti": ViTConfig(width=192, num_layers=12, num_heads=3, mlp_hidden=768),
    "vit_s": ViTConfig(width=384, num_layers=12, num_heads=6, mlp_hidden=1536),
    "vit_b": ViTConfig(width=768, num_layers=12, num_heads=12, mlp_hidden=3072),
    "vit_l": ViTConfig(width=1024, num_layers=24, num_heads=16, mlp_hidden=4096),
    "vit_h": ViTConfig(width=1280, num_layers=32, num_heads=20, mlp_hidden=5120, mlp="swiglu"),
    "vit_g": ViTConfig(width=1536, num_layers=40, num_heads=24, mlp_hidden=4096, mlp="swiglu"),
    "vit_7b": ViTConfig(width=4096, num_layers=40, num_heads=32, mlp_hidden=8192, mlp="swiglu"),
}
"""By the name that `model.preset` of a run's configuration takes. vit_h is the shape that DINOv3 calls H+. The released
7B differs from vit_7b, which is as the others are: it has `qkv_bias` none and `untied_cls_norm`, and is read so."""
