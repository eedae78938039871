"""The section `model`: the size of the network, and what of its shape training sets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dinox_train.sections.section import Fraction, Positive, Section


class ModelSection(Section):
    """Keys without a value keep what the preset has."""

    preset: Literal["vit_ti", "vit_s", "vit_b", "vit_l", "vit_h", "vit_g", "vit_7b"] = "vit_s"
    """The size of the network."""
    layer_scale: Annotated[float, Field(gt=0)] | None = 1e-5
    """First value of LayerScale; null: none. 1e-5 is DINOv3's, for long runs: at first no block adds anything. Short
    ones: 0.1."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the images that a block leaves out, in the student; saves their compute. Large networks: 0.1 to 0.4."""
    mlp: Literal["gelu", "swiglu", "relu2", "geglu"] | None = None
    """The MLP's activation."""
    norm: Literal["layer", "rms"] | None = None
    """LayerNorm or RMSNorm."""
    norm_eps: Annotated[float, Field(gt=0)] | None = None
    """Epsilon of the norms."""
    patch_size: Positive | None = None
    """Side of a patch, pixels; all sizes of views are multiples of it."""
    qkv_bias: Literal["none", "full", "k_masked"] | None = None
    """Biases of queries, keys and values."""
    qk_norm: bool | None = None
    """Queries and keys are normed in each head."""
    num_registers: Annotated[int, Field(ge=0)] | None = None
    """Tokens beside CLS and patches."""
    untied_cls_norm: bool | None = None
    """CLS and registers of local views have a final norm of their own."""
    zero_init_residuals: bool | None = None
    """Blocks begin by adding nothing."""
    positions: Literal["rope", "rope_mm", "learned", "fourier"] | None = None
    """How a patch knows where it lies: rope in shares of the view, rope_mm in mm."""
    learned_grid: tuple[Positive, Positive] | None = None
    """Rows and columns of learned positions as stored; null: those of a global view."""
    rope_period: Annotated[float, Field(ge=1)] | None = None
    """Bound of the slowest rotation's period."""
    rope_stored_periods: bool | None = None
    """Periods are part of the weights, as in Meta's files."""
    rope_shift: Annotated[float, Field(gt=0)] | None = None
    """Augmentation of positions in the student: largest shift, in half views; null: off."""
    rope_jitter: Annotated[float, Field(gt=1)] | None = None
    """Largest factor that stretches one axis of them; null: off."""
    rope_rescale: Annotated[float, Field(gt=1)] | None = None
    """Largest factor that stretches both; null: off."""
    scale_conditioning: bool | None = None
    """Tokens learn how many mm a pixel of their view is, within bounds."""
    unknown_scale: Fraction = 0.1
    """With scale_conditioning or rope_mm: share of the student's views whose mm it is not told (NaN), so that it also
    learns to do without."""
