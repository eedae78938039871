"""The network: a vision transformer with DINOv3's layout by default, and `build`, which makes one with first weights.

    image ─▶ patches ─▶ Linear ─▶ [CLS, registers, patches] ─▶ blocks ─▶ norm ─▶ ViTFeatures
                          ├ masked ones replaced        └ x + g1·attention(norm x), x + g2·mlp(norm x)
                          └ + physical scale, + positions, where these are not rotations

Legend: b images, c channels (a window's slices), y, x pixels, h, w grid rows and columns, n = h·w patches, p prefix
tokens (CLS, if there is one, and r registers), t = p + n tokens, d width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinox_model.block import Block, KeptRows
from dinox_model.config import PRESETS, ViTConfig, nearest
from dinox_model.draws import Draws, moves_coordinates, num_residuals
from dinox_model.features import ViTFeatures
from dinox_model.initialisation import LINEAR_STD, Initialised, materialise
from dinox_model.norm import make_norm
from dinox_model.positions import AddedPositions, LearnedPositions, RotaryPositions, Rotations, fourier_positions
from dinox_model.preprocess import Preprocess
from dinox_model.scale import ScaleConditioning


class BlockInput(NamedTuple):
    """What the first block is given."""

    tokens: Tensor
    """(b, t, d): CLS, registers, patches, in the dtype of the parameters whatever autocast says, as the sum that all
    residuals are added to must not be rounded to bf16."""
    by: Rotations | None
    """The rotations of every block; None without rotary positions."""
    grid: tuple[int, int]
    """(h, w)."""


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

    def initialise(self, generator: torch.Generator) -> None:
        """Uniform within 1 / sqrt(inputs of an output), as torch's convolutions are: what DINOv3 leaves them at."""
        bound = 1.0 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -bound, bound, generator=generator)


class VisionTransformer(Initialised):
    """The network of a `ViTConfig`. Made by `build`, which gives it first weights.

    It draws no random numbers itself: what is random in training comes in as `Draws`, and without them a forward has no
    randomness, whatever train() or eval() says.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocess = Preprocess()
        """How HU become this network's input; `save` writes it beside the weights."""
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width)) if config.cls_token else None
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_registers, config.width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.norm = make_norm(config, config.width)
        self.cls_norm = make_norm(config, config.width) if config.untied_cls_norm else None
        self.rope = RotaryPositions(config) if config.is_rotary else None
        self.positions = LearnedPositions(config) if config.positions == "learned" else None
        self.scale = ScaleConditioning(config) if config.scale_conditioning else None

    def forward(
        self,
        x: Tensor,
        masks: Tensor | None = None,
        *,
        layers: Sequence[int] = (),
        draws: Draws | None = None,
        mm_per_pixel: Tensor | None = None,
        local_crops: bool = False,
    ) -> ViTFeatures:
        """Features of float images (b, c, y, x), y and x multiples of the patch size.

        `masks`: bool (b, n), row by row; where True the mask token stands in the patch's place. `layers`: numbers of
        blocks (from 0; negative from the end) whose output is returned too, as `ViTFeatures.layers`. `draws`: the
        randomness of training, on the device of `x`; None: none. `mm_per_pixel`: float32 (b, 2), millimetres of a pixel
        of `x` along y and x (NaN: unknown); needed by networks that look at it (`config.uses_mm_per_pixel`), refused by
        all others. `local_crops`: with `config.untied_cls_norm`, CLS and registers go through `cls_norm`.
        Raises ValueError for other shapes, dtypes (outside autocast the weights' is the input's), numbers or parts.
        """
        wanted = block_numbers(layers, self.config.num_layers)
        self._check_draws(draws)
        tokens, by, grid = self.embed(x, masks, draws=draws, mm_per_pixel=mm_per_pixel)
        outputs: dict[int, ViTFeatures] = {}
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, by, _kept_rows(draws, number))
            if number in wanted:
                outputs[number] = self._features(tokens, grid, local_crops)
        last = self._features(tokens, grid, local_crops)
        return last._replace(layers=tuple(outputs[number] for number in wanted))

    def intermediate(self, x: Tensor, layers: Sequence[int]) -> tuple[ViTFeatures, ...]:
        """The features after these blocks, through the final norm: `forward`'s `layers`."""
        return self(x, layers=layers).layers

    def embed(
        self,
        x: Tensor,
        masks: Tensor | None = None,
        *,
        draws: Draws | None = None,
        mm_per_pixel: Tensor | None = None,
    ) -> BlockInput:
        """The first block's input; arguments and errors are those of `forward`."""
        grid = self._grid_of(x)
        self._check_dtype(x)
        self._check_mm_per_pixel(mm_per_pixel, x.shape[0])
        patches = self.patch_embed(x).to(self.mask_token.dtype)
        scale = None if self.scale is None or mm_per_pixel is None else self.scale(mm_per_pixel, patches)
        if masks is not None:
            if masks.dtype != torch.bool or masks.shape != patches.shape[:2]:
                expected = f"bool {tuple(patches.shape[:2])} (grid {grid[0]} x {grid[1]})"
                raise ValueError(f"masks must be {expected}, not {masks.dtype} {tuple(masks.shape)}")
            patches = torch.where(masks[:, :, None], self.mask_token, patches)
        if scale is not None:
            patches = patches + scale
        by = None
        if self.rope is not None:
            moved = None if draws is None else draws.rope
            by = self.rope(grid, x.device, mm_per_pixel=mm_per_pixel, moved=moved)
        return BlockInput(self._with_prefix(patches, grid), by, grid)

    def _with_prefix(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """CLS and registers before the patches (b, n, d); positions that are no rotations are added."""
        cls, added = self.cls_token, self._added_positions(grid, patches.device)
        if added is not None:
            patches = patches + added.patches.to(patches.dtype)
            cls = cls if cls is None or added.cls is None else cls + added.cls.to(cls.dtype)
        prefix = self.register_tokens if cls is None else torch.cat((cls, self.register_tokens), dim=1)
        return torch.cat((prefix.expand(patches.shape[0], -1, -1), patches), dim=1)

    def _added_positions(self, grid: tuple[int, int], device: torch.device) -> AddedPositions | None:
        if self.positions is not None:
            return self.positions(grid)
        return fourier_positions(grid, self.config.width, device) if self.config.positions == "fourier" else None

    def _features(self, tokens_BTD: Tensor, grid: tuple[int, int], local_crops: bool) -> ViTFeatures:
        num_prefix = self.config.num_prefix_tokens
        if local_crops and self.cls_norm is not None:
            prefix, patches = self.cls_norm(tokens_BTD[:, :num_prefix]), self.norm(tokens_BTD[:, num_prefix:])
        else:
            prefix, patches = self.norm(tokens_BTD).split((num_prefix, math.prod(grid)), dim=1)
        if self.config.cls_token:
            return ViTFeatures(prefix[:, 0], prefix[:, 1:], patches, grid)
        return ViTFeatures(None, prefix, patches, grid)

    def _grid_of(self, x: Tensor) -> tuple[int, int]:
        side, channels = self.config.patch_size, self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"input must be (b, {channels}, y, x) for this network, not {tuple(x.shape)}")
        height, width = x.shape[2:]
        if height < side or width < side or height % side or width % side:
            raise ValueError(f"input must be a multiple of {side} pixels high and wide, not {height} x {width}")
        return height // side, width // side

    def _check_dtype(self, x: Tensor) -> None:
        """What torch would say of it names neither the input nor the network."""
        if not x.is_floating_point():
            raise ValueError(f"input must be floats, not {x.dtype}: dinox_model.encode makes them of HU as in training")
        own = self.patch_embed.weight.dtype
        if x.dtype != own and own.is_floating_point and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"input is {x.dtype} and this network's weights are {own}: give it x.to({own}), bring the network to "
                f"the input's dtype, or run both under torch.autocast"
            )

    def _check_mm_per_pixel(self, mm_per_pixel: Tensor | None, num_images: int) -> None:
        if not self.config.uses_mm_per_pixel:
            if mm_per_pixel is not None:
                raise ValueError(
                    "this network does not look at mm_per_pixel (its config has neither positions rope_mm nor "
                    "scale_conditioning): leave it out"
                )
            return
        wanted = f"mm_per_pixel, float32 ({num_images}, 2): millimetres of a pixel of its input along y and x"
        if mm_per_pixel is None:
            raise ValueError(f"this network needs {wanted}")
        if mm_per_pixel.dtype != torch.float32 or tuple(mm_per_pixel.shape) != (num_images, 2):
            found = f"{mm_per_pixel.dtype} {tuple(mm_per_pixel.shape)}"
            raise ValueError(f"this network needs {wanted}, not {found}")

    def _check_draws(self, draws: Draws | None) -> None:
        if draws is None:
            return
        kept, moved = self.config.drop_path > 0, moves_coordinates(self.config)
        residuals = None if draws.kept is None else len(draws.kept)
        if residuals != (num_residuals(self.config) if kept else None) or (draws.rope is not None) != moved:
            raise ValueError(
                f"draws are not of this network's config: drop_path {self.config.drop_path} needs kept rows of "
                f"{num_residuals(self.config) if kept else 'no'} residuals, there are {residuals or 'none'}; RoPE "
                f"coordinates are {'' if moved else 'not '}moved, there are {'none' if draws.rope is None else 'some'}"
            )

    def initialise(self, generator: torch.Generator) -> None:
        """As DINOv3: truncated normal linears, identity norms, mask token 0, LayerScale as configured."""
        self.patch_embed.initialise(generator)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.initialise(generator, self.config)
        for norm in (self.norm, self.cls_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=LINEAR_STD, generator=generator)
        nn.init.normal_(self.register_tokens, std=LINEAR_STD, generator=generator)
        nn.init.zeros_(self.mask_token)
        # What an option adds is drawn last, so that it changes no other first weight.
        if self.rope is not None:
            self.rope.initialise()
        if self.positions is not None:
            self.positions.initialise(generator)
        if self.scale is not None:
            self.scale.initialise(generator)


def block_numbers(layers: Sequence[int], num_layers: int) -> list[int]:
    """The blocks that are meant, counted from 0. Raises ValueError for one that there is not."""
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"layer {layer} is none of this network's: they are 0 to {num_layers - 1}, or negative")
    return [layer % num_layers for layer in layers]


def _kept_rows(draws: Draws | None, block: int) -> KeptRows | None:
    if draws is None or draws.kept is None or draws.kept_scale is None:
        return None
    attention, mlp = 2 * block, 2 * block + 1
    return KeptRows(draws.kept[attention], draws.kept[mlp], draws.kept_scale[attention], draws.kept_scale[mlp])


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
