"""All randomness of one forward pass, drawn before it: the rows that drop path keeps, how RoPE's coordinates are moved.

A network draws nothing itself: a forward without `Draws` has no randomness, whatever train() or eval() says, and two
forwards with the same `Draws` are equal (recomputed activations, a second pass, a resumed run).

Invariant: `draw` is a function of the uniform numbers it is given. The rows that drop path keeps are a choice among all
rows of the global batch; a micro-batch keeps those of its rows that this choice keeps, so how a batch is cut changes
nothing.

Sources: drop path by a subset of the batch, DINOv2 (Oquab et al., arXiv 2304.07193, section 5) after stochastic depth
(Huang et al., arXiv 1603.09382); moved coordinates, DINOv3 (Siméoni et al., arXiv 2508.10104, section 3.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinox_model.config import ViTConfig
from dinox_model.host_to_device import to_device

RESIDUALS_PER_BLOCK = 2
"""Attention and MLP; residual number 2i is block i's attention, 2i + 1 its MLP."""
NUM_ROPE_UNIFORMS = 5
"""Uniform numbers of one forward: shift along y, x, jitter along y, x, rescale."""


@dataclass(frozen=True)
class Draws:
    """What was drawn for one forward of m rows (images). Each part is None where the network has no such randomness."""

    kept: tuple[Tensor, ...] | None = None
    """For each residual (2 a block: attention, MLP) the rows that it is computed for: int64 (k,), ascending, below m;
    k may be 0."""
    kept_scale: tuple[float, ...] | None = None
    """For each residual, all rows of the global batch / those that are kept: by it the kept rows' residual is
    multiplied, so that its expectation is that of no drop path."""
    rope: Tensor | None = None
    """float32 (2, 2): along y and x, what is added to RoPE's coordinates, then what they are multiplied by. One for the
    whole forward (all images, all blocks)."""

    def to(self, device: torch.device | str) -> Draws:
        """The same on `device`, in one copy for the rows, which nothing on the host waits for."""
        kept = None
        if self.kept is not None:
            lengths = [len(rows) for rows in self.kept]
            kept = to_device(torch.cat(self.kept), device).split(lengths)
        return Draws(kept, self.kept_scale, None if self.rope is None else to_device(self.rope, device))


def num_residuals(config: ViTConfig) -> int:
    """Residuals that drop path decides on: 2 a block."""
    return RESIDUALS_PER_BLOCK * config.num_layers


def keep_rows(uniforms: np.ndarray, drop_path: float) -> np.ndarray:
    """Which rows of the global batch each residual is computed for.

    uniforms: float64 (B, residuals) in [0, 1), B all rows that go through the network in this pass of an update (so
    twice the images for two global views). Returns bool (B, residuals): in each column the rows with the
    max(int(B·(1 - drop_path)), 1) smallest numbers, of equal ones the first. Raises ValueError for another shape, or no
    row.
    """
    if uniforms.ndim != 2 or len(uniforms) < 1:
        raise ValueError(f"uniforms must be (rows, residuals) with at least one row, not {uniforms.shape}")
    count = max(int(len(uniforms) * (1.0 - drop_path)), 1)
    kept = np.zeros(uniforms.shape, bool)
    np.put_along_axis(kept, np.argsort(uniforms, axis=0, kind="stable")[:count], True, axis=0)
    return kept


def draw(config: ViTConfig, kept: np.ndarray | None, rope_uniforms: np.ndarray | None, rows: np.ndarray) -> Draws:
    """The draws of one forward of a micro-batch, on the CPU.

    kept: `keep_rows` of the global batch, bool (B, 2·num_layers); None only if config.drop_path is 0.
    rope_uniforms: float64 (5,) in [0, 1), the same for all micro-batches of a pass; None only if the config moves no
    coordinate. What the config has no use for is not looked at. rows: integers (m,), the row of the global batch that
    each row of this forward is. Raises ValueError for a part that is needed and missing, or of another shape.
    """
    indices = scale = rope = None
    if config.drop_path > 0:
        kept = _checked("kept", kept, "bool", (None, num_residuals(config)))
        of_residuals = kept[rows].T
        indices = tuple(torch.from_numpy(np.flatnonzero(column)) for column in of_residuals)
        scale = tuple(len(kept) / int(count) for count in kept.sum(axis=0))
    if moves_coordinates(config):
        rope = _move(config, _checked("rope_uniforms", rope_uniforms, "float64", (NUM_ROPE_UNIFORMS,)))
    return Draws(indices, scale, rope)


def draw_from(config: ViTConfig, num_images: int, generator: torch.Generator) -> Draws:
    """The draws of one forward of a whole batch from a CPU generator: for use without dinox_train's keyed numbers."""
    residuals = torch.rand(num_images, num_residuals(config), dtype=torch.float64, generator=generator)
    rope = torch.rand(NUM_ROPE_UNIFORMS, dtype=torch.float64, generator=generator)
    return draw(config, keep_rows(residuals.numpy(), config.drop_path), rope.numpy(), np.arange(num_images))


def moves_coordinates(config: ViTConfig) -> bool:
    """Whether the config has RoPE's coordinates shifted, jittered or rescaled in training."""
    return any(value is not None for value in (config.rope_shift, config.rope_jitter, config.rope_rescale))


def _move(config: ViTConfig, uniforms: np.ndarray) -> Tensor:
    """Shift uniform in [-s, s] for each axis; factor log-uniform: [1/j, j] for each axis times [1/r, r] for both."""
    signed = 2.0 * uniforms - 1.0
    shift = (config.rope_shift or 0.0) * signed[0:2]
    jitter = math.log(config.rope_jitter or 1.0) * signed[2:4]
    rescale = math.log(config.rope_rescale or 1.0) * signed[4]
    return torch.from_numpy(np.stack((shift, np.exp(jitter + rescale))).astype(np.float32))


def _checked(name: str, value: np.ndarray | None, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
    wanted = f"{dtype} ({', '.join('rows' if size is None else str(size) for size in shape)})"
    if value is None:
        raise ValueError(f"this network's config has randomness that needs {name}: {wanted}")
    fits = value.ndim == len(shape) and all(size in (None, n) for size, n in zip(shape, value.shape, strict=True))
    if not fits or value.dtype != dtype:
        raise ValueError(f"{name} must be {wanted}, not {value.dtype} {value.shape}")
    return value
