"""The section `views`: what is seen of a window."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dinox_train.sections.section import Fraction, Range, Section, Side
from dinox_train.view_plan import ViewSettings


class ViewsSection(Section):
    global_size: Side = 224
    """Side of a global crop, pixels, a multiple of the network's patch size."""
    local_size: Side = 96
    """Side of a local crop, pixels, a multiple of the network's patch size."""
    num_local: Annotated[int, Field(ge=0, le=1024)] = 8
    """Local crops of an image, beside its two global ones."""
    global_scale: Range = (0.32, 1.0)
    """Area of a global crop as a fraction of the slice's."""
    local_scale: Range = (0.05, 0.32)
    """Area of a local crop as a fraction of the slice's."""
    aspect: Range = (0.75, 4.0 / 3.0)
    """Width of a crop over its height, drawn log-uniformly."""
    level_hu: Range = (-500.0, 0.0)
    """Centre of a view's intensity window, HU, drawn uniformly for each view."""
    width_hu: Range = (800.0, 2000.0)
    """Width of a view's intensity window, HU, drawn log-uniformly for each view."""
    window_presets: dict[str, float] | None = None
    """Instead of that free range: windows that people read CT with, and how often each is drawn, e.g. {lung: 2,
    mediastinum: 1}. Known: lung, mediastinum, bone, brain, liver, wide (docs/views.md has their HU). null: free range.
    """
    preset_jitter: float = 0.1
    """Around a preset: the centre moves by up to this share of its width, the width by up to this factor."""
    flip_probability: Fraction = 0.0
    """Left-right flips. 0 by default: the side of an organ is anatomy."""
    blur_probability: tuple[Fraction, Fraction, Fraction] = (1.0, 0.1, 0.5)
    """Of a Gaussian blur: of the first global crop, of the second, of the local ones."""
    blur_sigma: Range = (0.1, 2.0)
    """Its standard deviation in pixels of the crop."""
    noise_probability: Fraction = 0.0
    """Of white noise on a crop's HU."""
    noise_hu: Range = (5.0, 30.0)
    """Its standard deviation, HU."""
    gamma_probability: Fraction = 0.0
    """Of a gamma curve on a crop's gray."""
    gamma: Range = (0.8, 1.25)
    """Its exponent, drawn log-uniformly."""

    @model_validator(mode="after")
    def _sensible(self) -> ViewsSection:
        ViewSettings(**self.model_dump())  # raises ValueError for what describes no view
        return self
