"""The physical size of a view's pixels, told to a network within bounds.

Legend: b images, n patches, d width.

    mm per pixel ─▶ log2, clamped ─▶ sines and cosines ─▶ MLP ─▶ tanh · a share of the image's spread ─▶ + patches

The spread of an image is the RMS of what its patch tokens differ by from their mean: what depends on the image and on
nothing else. Invariant: the RMS of what is added is at most `MOST_OF_IMAGE` of that spread, whatever the weights are;
for an image of unknown scale it is exactly 0, and a network that has just been made adds exactly 0 everywhere.

Why the bound: DINO-X normed the same embedding after its last layer. After one update it was nine times as large as
what the tokens said of the image, and as both views of a window had the same spacing, the network told windows apart
by it alone. So here no norm stands behind the MLP, and the input is the size of the view's own pixels (spacing times
crop over side), which differs from view to view. Dropping the scale of some views in training is the trainer's (NaN).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinox_model.config import ViTConfig
from dinox_model.initialisation import initialise_linear

MOST_OF_IMAGE = 0.1
"""Largest RMS of what is added, as a share of the image's spread. It is the same for all patches, so that averaging n
patches, as CLS does, leaves it while their spread falls by sqrt(n): at 0.1 the two are alike at 100 patches."""
CLAMP_OCTAVES = 4.0
"""Sizes from 1/16 to 16 mm a pixel are told apart: micro-CT to the smallest preview. 1 mm lies in the middle."""
WAVES = (0.5, 1.0, 2.0, 4.0)
"""Cycles over the whole range of 8 octaves: the slowest tells its ends apart, and with the fastest a pixel twice as
large is half a cycle away."""
HIDDEN = 64


class ScaleConditioning(nn.Module):
    """A vector for each image that is added to all its patch tokens, masked ones too; CLS and registers get none."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(2 * 2 * len(WAVES), HIDDEN)
        self.down = nn.Linear(HIDDEN, config.width)

    def forward(self, mm_per_pixel: Tensor, patches: Tensor) -> Tensor:
        """What to add to the patch tokens: (b, 1, d), in their dtype; computed in fp32, but for the two linears, which
        autocast casts as all others: eight bits of a tenth of the image's spread, and the bound stays fp32.

        `mm_per_pixel`: float32 (b, 2) along y and x, of the view that the network sees. NaN: unknown, nothing is added.
        A size that is not positive gives NaN, which nothing after it can hide. `patches`: (b, n, d), the embedded
        patches before any is masked; their spread sets the bound, and gets no gradient from here. Where there is
        none (one patch, or all alike) nothing is added.
        """
        unknown = mm_per_pixel.isnan().any(dim=1)[:, None]
        known_mm = torch.where(unknown, 1.0, mm_per_pixel.float())
        waves = scale_waves(known_mm).to(self.up.weight.dtype)
        direction = torch.tanh(self.down(F.gelu(self.up(waves))).float())
        added = torch.where(unknown, 0.0, MOST_OF_IMAGE * spread(patches)[:, None] * direction)
        return added.to(patches.dtype)[:, None]

    def initialise(self, generator: torch.Generator) -> None:
        """As other linears, but the last one 0."""
        initialise_linear(self.up, generator)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)


def spread(patches: Tensor) -> Tensor:
    """RMS of what an image's patch tokens (b, n, d) differ by from their mean: fp32 (b,), without gradient."""
    patches = patches.detach().float()
    return (patches - patches.mean(dim=1, keepdim=True)).square().mean(dim=(1, 2)).sqrt()


def scale_waves(mm_per_pixel: Tensor) -> Tensor:
    """Sines, then cosines, of log2(mm) at each of `WAVES`, of y and x: float32 (b, 2) to (b, 4·waves). NaN where a size
    is not positive."""
    octaves = torch.where(mm_per_pixel > 0, mm_per_pixel, math.nan).log2().clamp(-CLAMP_OCTAVES, CLAMP_OCTAVES)
    angles = torch.cat([octaves * (math.pi / CLAMP_OCTAVES * wave) for wave in WAVES], dim=1)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
