"""Floating-point operations, counted from a network's shape: 2 for each multiplication with addition of a matrix
product, pass by pass.

Counted is what matrix products and attention do, as torch's own FlopCounterMode does; norms, activations, positions and
the optimizer are not (they cost bytes, not operations). A backward counts twice its forward, one product for the
weights and one for the input; attention's has four products for the forward's two. An attention kernel that computes
its scores again in the backward does half a forward of attention more: that is the kernel's choice, and not counted.

Invariant: all numbers are exact integers, also under drop path, which skips whole images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dinox_model import scale
from dinox_model.config import ViTConfig
from dinox_model.execution import Execution
from dinox_model.heads.prototype import PrototypeHeadConfig
from dinox_model.workload import Workload, grid_of, num_tokens

GATED = ("swiglu", "geglu")
_SCALE_INPUTS = 2 * 2 * len(scale.WAVES)


@dataclass(frozen=True)
class FlopsRow:
    """What a part of a network does in a pass."""

    step: str
    """`teacher`, `gram teacher`, `student forward`, `student backward` or `recomputation`."""
    part: str
    flops: int


@dataclass(frozen=True)
class TrainingFlops:
    """The operations of a `Workload`, row by row."""

    rows: tuple[FlopsRow, ...]
    images: int

    @property
    def total(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def per_image(self) -> float:
        return self.total / self.images

    def of(self, *, step: str | None = None, part: str | None = None) -> int:
        """The sum over the rows of a step, of a part, or of both."""
        return sum(row.flops for row in self.rows if step in (None, row.step) and part in (None, row.part))


def forward_flops(config: ViTConfig, size: int | tuple[int, int]) -> dict[str, int]:
    """The forward pass of one view, by part of the network. Raises ValueError for a size that is not one of patches."""
    rows, columns = grid_of(config, size)
    patch_values = config.in_channels * config.patch_size**2
    parts = {"patch_embed": 2 * rows * columns * patch_values * config.width}
    if config.scale_conditioning:
        parts["scale"] = 2 * scale.HIDDEN * (_SCALE_INPUTS + config.width)
    for part, flops in block_flops(config, size).items():
        parts[part] = config.num_layers * flops
    return parts


def block_flops(config: ViTConfig, size: int | tuple[int, int]) -> dict[str, int]:
    """The forward pass of one view through one block, by part."""
    tokens, width = num_tokens(config, size), config.width
    linears = 3 if config.mlp in GATED else 2
    return {
        "qkv": 2 * tokens * width * 3 * width,
        "attention": 2 * 2 * tokens * tokens * width,
        "projection": 2 * tokens * width * width,
        "mlp": 2 * tokens * linears * width * config.mlp_hidden,
    }


def head_flops(in_features: int, head: PrototypeHeadConfig) -> int:
    """The forward pass of one token through a `PrototypeHead`."""
    return 2 * (
        in_features * head.hidden
        + head.hidden * head.hidden
        + head.hidden * head.bottleneck
        + head.bottleneck * head.prototypes
    )


def kept_rows(rows: int, drop_path: float) -> int:
    """Of how many of `rows` images a residual is computed: max(rows (1 - drop_path) rounded down, 1)."""
    return max(int(rows * (1.0 - drop_path)), 1) if drop_path else rows


def training_flops(config: ViTConfig, workload: Workload, execution: Execution | None = None) -> TrainingFlops:
    """The operations of an update's networks, with what checkpointing computes again.

    Raises ValueError for a view that is not a multiple of the patch size. Drop path keeps rows of the global batch, so
    `workload.images` should be the whole update's where config.drop_path is not 0.
    """
    execution = execution or Execution()
    teacher = _times(forward_flops(config, workload.global_size), workload.global_views)
    rows = _rows("teacher", teacher | _heads(config, workload, workload.global_views))
    if workload.gram_size is not None:
        rows += _rows("gram teacher", _times(forward_flops(config, workload.gram_size), workload.gram_views))
    student = _heads(config, workload, workload.global_views + workload.local_views)
    again: dict[str, int] = {}
    for views, size in _student_views(workload):
        student = _sum(student, _student_forward(config, size, views))
        again = _sum(again, _recomputed(config, size, views, execution))
    rows += _rows("student forward", student)
    # Images and physical scale need no gradient: of the layer that reads them only the weights' product is computed.
    views = workload.global_views + workload.local_views
    spared = {"patch_embed": student["patch_embed"], "scale": views * 2 * scale.HIDDEN * _SCALE_INPUTS}
    rows += _rows("student backward", {part: 2 * flops - spared.get(part, 0) for part, flops in student.items()})
    rows += _rows("recomputation", again)
    return TrainingFlops(rows, workload.images)


def _student_views(workload: Workload) -> list[tuple[int, int]]:
    """Number and side of the views that go through the student together."""
    views = [(workload.global_views, workload.global_size), (workload.local_views, workload.local_size)]
    return [(number, size) for number, size in views if number]


def _student_forward(config: ViTConfig, size: int, views: int) -> dict[str, int]:
    blocks = block_flops(config, size)
    kept = kept_rows(views, config.drop_path)
    parts = forward_flops(config, size)
    return {part: flops * (kept if part in blocks else views) for part, flops in parts.items()}


def _recomputed(config: ViTConfig, size: int, views: int, execution: Execution) -> dict[str, int]:
    if execution.checkpointing != "block":
        return {}
    parts = block_flops(config, size)
    if config.layer_scale is None:
        # Recomputing stops at the last activation that the backward needs: nothing needs the MLP's result then.
        linears = 3 if config.mlp in GATED else 2
        parts["mlp"] = parts["mlp"] * (linears - 1) // linears
    blocks = execution.num_checkpointed(config.num_layers)
    return _times(parts, blocks * kept_rows(views, config.drop_path))


def _heads(config: ViTConfig, workload: Workload, cls_tokens: int) -> dict[str, int]:
    parts: dict[str, int] = {}
    if workload.dino_head is not None:
        parts["dino_head"] = cls_tokens * head_flops(config.width, workload.dino_head)
    if workload.ibot_head is not None and workload.masked_patches:
        parts["ibot_head"] = workload.masked_patches * head_flops(config.width, workload.ibot_head)
    return parts


def _times(parts: Mapping[str, int], factor: int) -> dict[str, int]:
    return {part: flops * factor for part, flops in parts.items()}


def _sum(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {part: first.get(part, 0) + second.get(part, 0) for part in dict.fromkeys((*first, *second))}


def _rows(step: str, parts: Mapping[str, int]) -> tuple[FlopsRow, ...]:
    return tuple(FlopsRow(step, part, flops) for part, flops in parts.items())
