"""The network: a vision transformer with DINOv3's layout, and `build`, which makes one with first weights.

    image ─▶ patches ─▶ Linear ─▶ [CLS, registers, patches] ─▶ blocks ─▶ LayerNorm ─▶ ViTFeatures
                          └ masked ones replaced        └ x + g1·attention(norm x), x + g2·mlp(norm x)

Legend: b images, c channels (a window's slices), y, x pixels, h, w grid rows and columns, n = h·w patches, r registers,
t = 1 + r + n tokens, d width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinox_model.attention import Attention
from dinox_model.config import NORM_EPS, PRESETS, ViTConfig, nearest
from dinox_model.initialisation import LINEAR_STD, Initialised, initialise_linear, materialise
from dinox_model.mlp import make_mlp
from dinox_model.positions import Rotations, rotations
from dinox_model.preprocess import Preprocess


class ViTFeatures(NamedTuple):
    """What a network says about b images; all after the final norm."""

    cls: Tensor
    """(b, d): one vector for each image."""
    registers: Tensor
    """(b, r, d): scratch tokens, of no use outside but for diagnosis."""
    patches: Tensor
    """(b, n, d): one vector for each patch, row by row."""
    grid: tuple[int, int]
    """(h, w): rows and columns of patches; n = h·w."""

    @property
    def patches_as_grid(self) -> Tensor:
        """(b, h, w, d)."""
        return self.patches.unflatten(1, self.grid)


class PatchEmbedding(nn.Linear):
    """Each patch of (b, c, y, x) to a token of (b, n, d): a convolution that does not overlap, as one GEMM.

    A convolution's weight (d, c, p, p) is `weight` (d, c·p·p) after a reshape.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config.in_channels * config.patch_size**2, config.width)
        self.patch_size = config.patch_size

    def forward(self, input: Tensor) -> Tensor:
        side = self.patch_size
        images, channels, height, width = input.shape
        patches = input.view(images, channels, height // side, side, width // side, side).permute(0, 2, 4, 1, 3, 5)
        return super().forward(patches.reshape(images, -1, self.in_features))


class Block(nn.Module):
    """Attention and MLP, each on the normed tokens, scaled by feature (LayerScale), added to the tokens."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attention = Attention(config)
        self.gamma1 = nn.Parameter(torch.empty(config.width))
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = make_mlp(config)
        self.gamma2 = nn.Parameter(torch.empty(config.width))

    def forward(self, x_BTD: Tensor, by: Rotations) -> Tensor:
        x_BTD = x_BTD + self.gamma1 * self.attention(self.norm1(x_BTD), by)
        return x_BTD + self.gamma2 * self.mlp(self.norm2(x_BTD))


class VisionTransformer(Initialised):
    """The network of a `ViTConfig`. Made by `build`, which gives it first weights."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocess = Preprocess()
        """How HU become this network's input; `save` writes it beside the weights."""
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_registers, config.width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> ViTFeatures:
        """Features of float images (b, c, y, x), y and x multiples of the patch size.

        `masks`: bool (b, n), row by row; where True the mask token stands in the patch's place.
        Raises ValueError for other shapes.
        """
        grid = self._grid_of(x)
        by = rotations(grid, self.config.head_width, self.config.num_prefix_tokens, x.device)
        tokens_BTD = self._tokens(x, grid, masks)
        for block in self.blocks:
            tokens_BTD = block(tokens_BTD, by)
        cls, registers, patches = self.norm(tokens_BTD).split((1, self.config.num_registers, math.prod(grid)), dim=1)
        return ViTFeatures(cls=cls.squeeze(1), registers=registers, patches=patches, grid=grid)

    def _grid_of(self, x: Tensor) -> tuple[int, int]:
        side, channels = self.config.patch_size, self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"input must be (b, {channels}, y, x) for this network, not {tuple(x.shape)}")
        height, width = x.shape[2:]
        if height < side or width < side or height % side or width % side:
            raise ValueError(f"input must be a multiple of {side} pixels high and wide, not {height} x {width}")
        return height // side, width // side

    def _tokens(self, x: Tensor, grid: tuple[int, int], masks: Tensor | None) -> Tensor:
        patches = self.patch_embed(x)
        num_images = x.shape[0]
        if masks is not None:
            if masks.dtype != torch.bool or masks.shape != patches.shape[:2]:
                wanted = f"bool {tuple(patches.shape[:2])} (grid {grid[0]} x {grid[1]})"
                raise ValueError(f"masks must be {wanted}, not {masks.dtype} {tuple(masks.shape)}")
            patches = torch.where(masks[:, :, None], self.mask_token.to(patches.dtype), patches)
        prefix = torch.cat((self.cls_token, self.register_tokens), dim=1).expand(num_images, -1, -1)
        return torch.cat((prefix, patches), dim=1)

    def initialise(self, generator: torch.Generator) -> None:
        """As DINOv3: truncated normal linears, identity norms, mask token 0, LayerScale as configured."""
        for module in self.modules():
            if isinstance(module, PatchEmbedding):
                bound = 1.0 / math.sqrt(module.in_features)
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
            elif isinstance(module, nn.Linear):
                initialise_linear(module, generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, Attention) and module.q_bias is not None and module.v_bias is not None:
                nn.init.zeros_(module.q_bias)
                nn.init.zeros_(module.v_bias)
            elif isinstance(module, Block):
                nn.init.constant_(module.gamma1, self.config.layer_scale)
                nn.init.constant_(module.gamma2, self.config.layer_scale)
        nn.init.normal_(self.cls_token, std=LINEAR_STD, generator=generator)
        nn.init.normal_(self.register_tokens, std=LINEAR_STD, generator=generator)
        nn.init.zeros_(self.mask_token)


def build(name_or_config: str | ViTConfig, *, in_channels: int | None = None, seed: int = 0) -> VisionTransformer:
    """A network with first weights and the default preprocessing, on torch's default device, in fp32.

    `name_or_config`: a preset ("vit_s") or a `ViTConfig`. `in_channels`: slices in a window; None keeps the config's
    (presets: 3). The weights are a function of config and `seed`; torch's global random state is neither read nor
    moved. Under
    `with torch.device("meta")` the network has shapes and no memory. Raises ValueError for an unknown preset.
    """
    config = preset(name_or_config) if isinstance(name_or_config, str) else name_or_config
    if in_channels is not None:
        config = dataclasses.replace(config, in_channels=in_channels)
    with torch.device("meta"):
        model = VisionTransformer(config)
    materialise(model, seed)
    return model


def preset(name: str) -> ViTConfig:
    """The preset of that name. Raises ValueError for an unknown one, naming the nearest."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]
