"""Where a patch lies: rotary (RoPE, axial or in millimetres), learned, or Fourier positions, always computed in fp32.

Legend: b images, h, w grid rows and columns, n = h·w patches row by row, t tokens (prefix, then patches), e features of
one attention head, d width of the network.
Invariant: a rotation changes no norm; the product of a rotated query and a rotated key depends on their distance only.
The prefix (CLS, registers) is never rotated.

Sources: Su et al., RoFormer (arXiv 2104.09864), in DINOv3's axial form (Siméoni et al., arXiv 2508.10104, section 3.2);
learned positions and their resizing as DINOv2 with registers has them (Darcet et al., arXiv 2309.16588); fixed axial
sines and cosines as MAE adds them (He et al., arXiv 2111.06377), on coordinates that do not depend on the grid's size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinox_model.config import ViTConfig
from dinox_model.initialisation import LINEAR_STD

LONGEST_PERIOD = 100.0
"""Bound of the slowest rotation's period, in units of the coordinate (-1 to 1 over an axis); the fastest has 1."""
UNIT_MM = 128.0
"""Millimetres of one unit of the coordinate where positions are in mm: a view of 256 mm reaches from -1 to 1, as every
view does for the networks whose weights a run may start from."""
FOURIER_PERIODS = (1 / 16, 4.0)
"""Shortest and longest period of Fourier positions, in units of the coordinate: the shortest is a patch and its
neighbour in a grid of 64, the longest twice the axis, so that both ends differ."""


class Rotations(NamedTuple):
    """Cosines and sines of every token's e/2 angles, for both halves of its features, the first half's sines negative:
    fp32 (t, e) each, the same for all images, or (b, 1, t, e), the 1 for the heads."""

    cos: Tensor
    sin: Tensor

    def of_images(self, rows: Tensor) -> Rotations:
        """The rotations of these images only: int64 (k,) indices into b."""
        return self if self.cos.ndim == 2 else Rotations(self.cos[rows], self.sin[rows])


class AddedPositions(NamedTuple):
    """What is added to the first tokens of an image, fp32. Registers have no position."""

    cls: Tensor | None
    """(1, 1, d), or None: nothing is added to the CLS token."""
    patches: Tensor
    """(1, n, d)."""


def patch_coordinates(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Centres of `length` patches along an axis that reaches from -1 to 1: fp32 (length,)."""
    return (torch.arange(length, dtype=torch.float32, device=device) + 0.5) / length * 2.0 - 1.0


def grid_coordinates(
    grid: tuple[int, int], device: torch.device | str = "cpu", *, mm_per_patch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The patches' coordinates along y and x: fp32 (h,) and (w,).

    With `mm_per_patch`, float32 (b, 2), a patch's side along y and x: (b, h) and (b, w), the distance of a patch's
    centre from the view's middle in units of `UNIT_MM`. An image with a NaN there has an unknown scale: its coordinates
    are those without it, -1 to 1.
    """
    axes = [patch_coordinates(length, device) for length in grid]
    if mm_per_patch is None:
        return axes[0], axes[1]
    unknown = mm_per_patch.isnan().any(dim=1)
    reaches = [mm_per_patch[:, i].float() * (length / 2.0 / UNIT_MM) for i, length in enumerate(grid)]
    y, x = (axis * torch.where(unknown, 1.0, reach)[:, None] for axis, reach in zip(axes, reaches, strict=True))
    return y, x


def formula_periods(
    head_width: int, longest_period: float = LONGEST_PERIOD, device: torch.device | str = "cpu"
) -> Tensor:
    """Periods of an axis' e/4 angles in units of the coordinate, fp32: 1 to nearly `longest_period`, geometric."""
    num_angles = head_width // 4
    return longest_period ** (torch.arange(num_angles, dtype=torch.float32, device=device) / num_angles)


def rotations(
    grid: tuple[int, int],
    head_width: int,
    num_prefix: int,
    device: torch.device | str = "cpu",
    *,
    periods: Tensor | None = None,
    mm_per_patch: Tensor | None = None,
    moved: Tensor | None = None,
) -> Rotations:
    """The rotations for a grid of (h, w) patches behind `num_prefix` tokens, which are not rotated (angle 0).

    Angle j of the e/4 of an axis is 2 pi c / period_j with c the patch's coordinate (`grid_coordinates`); a token has
    its row's angles, then its column's. `periods`: (e/4,), None for `formula_periods`. `moved`: `Draws.rope`, float32
    (2, 2): c becomes (c + moved[0]) · moved[1], by axis. With `mm_per_patch` each image has rotations of its own.
    """
    periods = formula_periods(head_width, device=device) if periods is None else periods.float()
    frequencies = 2.0 * math.pi / periods
    y, x = grid_coordinates(grid, device, mm_per_patch=mm_per_patch)
    if moved is not None:
        y, x = (y + moved[0, 0]) * moved[1, 0], (x + moved[0, 1]) * moved[1, 1]
    rows, columns = y[..., :, None, None] * frequencies, x[..., None, :, None] * frequencies
    shape = (*rows.shape[:-3], *grid, head_width // 4)
    angles = torch.cat((rows.expand(shape), columns.expand(shape)), dim=-1).flatten(-3, -2)
    angles = F.pad(angles, (0, 0, num_prefix, 0))
    if mm_per_patch is not None:
        angles = angles[:, None]
    cos, sin = angles.cos(), angles.sin()
    return Rotations(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def rotate(x: Tensor, by: Rotations) -> Tensor:
    """Rotate queries or keys (…, b, a, t, e) of a heads: features i and i + e/2 of a token form a plane, turned by the
    token's angle i.

    Computed in fp32 (fp64 stays) and returned in the dtype of `x`: angles rounded to bf16 are wrong by up to a patch's
    step.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Each half times its cosine, plus the other half times its sine: as few passes over memory as whole tensors allow.
    rotated = torch.addcmul(wide * by.cos, wide.roll(x.shape[-1] // 2, dims=-1), by.sin)
    return rotated.to(x.dtype)


class RotaryPositions(nn.Module):
    """What a network with positions `rope` or `rope_mm` has of them.

    With `rope_stored_periods` the periods are a buffer, `periods`, that is saved and loaded: Meta's files hold periods
    that were rounded to bf16, and exact ones give angles that differ from theirs by up to 1e-2.
    """

    periods: Tensor | None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        stored = torch.empty(config.head_width // 4) if config.rope_stored_periods else None
        self.register_buffer("periods", stored)

    def forward(
        self,
        grid: tuple[int, int],
        device: torch.device | str = "cpu",
        *,
        mm_per_pixel: Tensor | None = None,
        moved: Tensor | None = None,
    ) -> Rotations:
        """`rotations` of this network. `mm_per_pixel`: float32 (b, 2) of the input's pixels along y and x, with
        `rope_mm` only, which raises ValueError without it (NaN: unknown; not positive: NaN comes out). `moved`:
        `Draws.rope`."""
        config = self.config
        mm_per_patch = None
        if config.positions == "rope_mm":
            if mm_per_pixel is None:
                raise ValueError("positions in millimetres (rope_mm) need mm_per_pixel: float32 (b, 2), along y and x")
            # A size that is none makes features NaN, as in scale.py: the host cannot look at it without waiting.
            mm_per_patch = torch.where(mm_per_pixel <= 0, math.inf, mm_per_pixel.float()) * config.patch_size
        periods = self.periods
        if periods is None:
            periods = formula_periods(config.head_width, config.rope_period, device)
        return rotations(
            grid,
            config.head_width,
            config.num_prefix_tokens,
            device,
            periods=periods,
            mm_per_patch=mm_per_patch,
            moved=moved,
        )

    def initialise(self) -> None:
        """The formula's periods, until others are loaded."""
        if self.periods is not None:
            self.periods.copy_(formula_periods(self.config.head_width, self.config.rope_period, self.periods.device))


class LearnedPositions(nn.Module):
    """A vector for each patch of a grid (and one for CLS), resized to the grid of the input."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        if config.learned_grid is None:
            raise ValueError("learned positions need ViTConfig.learned_grid: the rows and columns that are stored")
        self.stored_grid = config.learned_grid
        self.cls_token = config.cls_token
        num_positions = int(config.cls_token) + math.prod(self.stored_grid)
        self.embedding = nn.Parameter(torch.empty(1, num_positions, config.width))
        """CLS's first if there is one, then the patches' row by row."""

    def forward(self, grid: tuple[int, int]) -> AddedPositions:
        """Resized bicubically with antialiasing, as Dinov2WithRegisters does it."""
        embedding = self.embedding.float()
        cls = embedding[:, :1] if self.cls_token else None
        patches = embedding[:, int(self.cls_token) :]
        if grid != self.stored_grid:
            as_image = patches.unflatten(1, self.stored_grid).permute(0, 3, 1, 2)
            as_image = F.interpolate(as_image, size=grid, mode="bicubic", align_corners=False, antialias=True)
            patches = as_image.flatten(2).transpose(1, 2)
        return AddedPositions(cls, patches)

    def initialise(self, generator: torch.Generator) -> None:
        """Truncated normal, as the tokens that it is added to."""
        nn.init.trunc_normal_(self.embedding, std=LINEAR_STD, generator=generator)


def fourier_positions(grid: tuple[int, int], width: int, device: torch.device | str = "cpu") -> AddedPositions:
    """Sines and cosines of the patches' coordinates at d/4 periods an axis, added to the patches; no parameters.

    Features: sines of y, cosines of y, sines of x, cosines of x, each from the longest period to the shortest. Raises
    ValueError unless `width` is a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"Fourier positions need a width that is a multiple of 4, not {width}")
    shortest, longest = FOURIER_PERIODS
    steps = torch.linspace(0.0, 1.0, width // 4, dtype=torch.float32, device=device)
    frequencies = 2.0 * math.pi / (longest * (shortest / longest) ** steps)
    parts = []
    for axis, coordinates in enumerate(grid_coordinates(grid, device)):
        angles = coordinates[:, None] * frequencies
        waves = torch.cat((angles.sin(), angles.cos()), dim=-1)
        parts.append((waves[:, None] if axis == 0 else waves[None]).expand(*grid, -1))
    return AddedPositions(None, torch.cat(parts, dim=-1).flatten(0, 1)[None])
