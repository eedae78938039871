"""Dense prediction: from the grid of patches (b, h, w, d) to a map at the input's resolution (b, classes, y, x).

A patch's side p is the product of its prime factors (16 = 2·2·2·2, 14 = 2·7): each stage of a decoder enlarges the map
by one of them, so that any patch size works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinox_model.config import ViTConfig
from dinox_model.features import ViTFeatures
from dinox_model.fields import Bounds, Count
from dinox_model.heads.head import Head, HeadConfig
from dinox_model.initialisation import materialise

FEWEST_CHANNELS = 16
"""Each stage halves the channels of the one before, but not below this."""


@dataclass(frozen=True, kw_only=True)
class TransposedConvolutionDecoderConfig(HeadConfig):
    """The shape of a `TransposedConvolutionDecoder`."""

    kind = "transposed_convolution"
    classes: Count
    hidden: Count = 256
    """Channels of the first stage; each further one has half of them, but not less than 16."""

    def build(self, network: ViTConfig, *, seed: int = 0) -> TransposedConvolutionDecoder:
        return TransposedConvolutionDecoder(self, network, seed=seed)


@dataclass(frozen=True, kw_only=True)
class UpsamplingDecoderConfig(HeadConfig):
    """The shape of an `UpsamplingDecoder`."""

    kind = "upsampling"
    classes: Count
    hidden: Count = 256
    """Channels of the first stage; each further one has half of them, but not less than 16."""
    num_stages: Annotated[int, Bounds(minimum=0)] = 2
    """Stages that learn; what is left of the enlargement is bilinear. At most the number of prime factors of the patch
    size. 0: one Linear on the patches, DINOv2's probe for segmentation."""

    def build(self, network: ViTConfig, *, seed: int = 0) -> UpsamplingDecoder:
        return UpsamplingDecoder(self, network, seed=seed)


class TransposedConvolutionDecoder(Head):
    """Stages of transposed convolution, norm over channels and GELU; then a Linear at each pixel.

    Kernels are a multiple of their stride and wider than it, so that neighbouring patches overlap evenly: no
    checkerboard (Odena et al., distill.pub 2016, doi 10.23915/distill.00003), no seams.
    """

    def __init__(self, config: TransposedConvolutionDecoderConfig, network: ViTConfig, *, seed: int = 0) -> None:
        super().__init__()
        stages, channels = [], network.width
        with torch.device("meta"):
            for factor, wanted in _stages(network.patch_size, config.hidden):
                stages += [enlarging_convolution(channels, wanted, factor), ChannelNorm(wanted), nn.GELU()]
                channels = wanted
            self.stages = nn.Sequential(*stages)
            self.classes = nn.Conv2d(channels, config.classes, 1)
        materialise(self, seed)

    def forward(self, features: ViTFeatures) -> Tensor:
        """(b, classes, y, x), y and x those of the network's input."""
        return self.classes(self.stages(_as_map(features)))


class UpsamplingDecoder(Head):
    """Stages of bilinear enlargement, 3 x 3 convolution, norm over channels and GELU; then a Linear at each pixel, and
    bilinear enlargement of its logits to the input's resolution."""

    def __init__(self, config: UpsamplingDecoderConfig, network: ViTConfig, *, seed: int = 0) -> None:
        """Raises ValueError for more stages than the patch size has prime factors."""
        super().__init__()
        self.patch_size = network.patch_size
        possible = _stages(network.patch_size, config.hidden)
        if config.num_stages > len(possible):
            factors = " x ".join(str(factor) for factor, _ in possible)
            raise ValueError(
                f"an upsampling decoder for patches of {network.patch_size} = {factors} pixels has at most "
                f"{len(possible)} stages, not {config.num_stages}"
            )
        stages, channels = [], network.width
        with torch.device("meta"):
            for factor, wanted in possible[: config.num_stages]:
                enlarge = nn.Upsample(scale_factor=factor, mode="bilinear")
                stages += [enlarge, nn.Conv2d(channels, wanted, 3, padding=1), ChannelNorm(wanted), nn.GELU()]
                channels = wanted
            self.stages = nn.Sequential(*stages)
            self.classes = nn.Conv2d(channels, config.classes, 1)
        materialise(self, seed)

    def forward(self, features: ViTFeatures) -> Tensor:
        """(b, classes, y, x), y and x those of the network's input."""
        logits = self.classes(self.stages(_as_map(features)))
        height, width = (side * self.patch_size for side in features.grid)
        return F.interpolate(logits, size=(height, width), mode="bilinear")


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of (b, c, y, x)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def enlarging_convolution(in_channels: int, out_channels: int, factor: int) -> nn.ConvTranspose2d:
    """A transposed convolution that makes (b, c, y, x) `factor` times as high and wide; each output pixel sees the same
    number of input pixels: 2 along an axis for an even factor, 3 for an odd one."""
    kernel, padding = (2 * factor, factor // 2) if factor % 2 == 0 else (3 * factor, factor)
    return nn.ConvTranspose2d(in_channels, out_channels, kernel, stride=factor, padding=padding)


def prime_factors(number: int) -> list[int]:
    """Ascending; of 1 none."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def _stages(patch_size: int, hidden: int) -> list[tuple[int, int]]:
    """Factor and channels of each stage that leads from patches to pixels."""
    fewest = min(hidden, FEWEST_CHANNELS)
    return [(factor, max(hidden >> stage, fewest)) for stage, factor in enumerate(prime_factors(patch_size))]


def _as_map(features: ViTFeatures) -> Tensor:
    """(b, d, h, w)."""
    return features.patches_as_grid.permute(0, 3, 1, 2)
