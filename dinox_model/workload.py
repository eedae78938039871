"""What one update of self-supervised training puts through the networks: views, heads, masked patches. A DINOv3 update
by default; FLOPs and memory are planned from it, without any data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dinox_model import fields
from dinox_model.config import ViTConfig
from dinox_model.fields import Bounds, Count
from dinox_model.heads.prototype import PrototypeHeadConfig

DINOV3_HEAD = PrototypeHeadConfig(hidden=2048, bottleneck=256, prototypes=65536)
"""The heads of DINOv3's ViT-L recipe, for CLS tokens and for patches alike."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """An update, or one micro-batch of it. Raises ValueError for values that make none.

    The teacher sees the global views, the student all views; a Gram teacher sees the global views at another size.
    """

    images: Count
    """Windows."""
    num_global: Count = 2
    global_size: Count = 224
    """Side of a global view, pixels."""
    num_local: Annotated[int, Bounds(minimum=0)] = 8
    local_size: Count = 96
    """Side of a local view, pixels."""
    masked_patches: Annotated[int, Bounds(minimum=0)] = 0
    """Patches of all global views together whose tokens go through the iBOT head (of student and teacher)."""
    dino_head: PrototypeHeadConfig | None = DINOV3_HEAD
    """The head of the CLS tokens of all views; None: no such head."""
    ibot_head: PrototypeHeadConfig | None = DINOV3_HEAD
    """The head of masked patches; None: no such head."""
    gram_size: Count | None = None
    """Side of the Gram teacher's views, pixels; None: no Gram teacher."""
    num_gram: Count = 2
    """Of an image's global views, how many it sees."""

    def __post_init__(self) -> None:
        fields.check(self)
        if self.masked_patches and self.ibot_head is None:
            raise ValueError(f"Workload.masked_patches is {self.masked_patches}, and there is no ibot_head for them")

    @property
    def global_views(self) -> int:
        """Views that the teacher sees."""
        return self.images * self.num_global

    @property
    def gram_views(self) -> int:
        """Views that a Gram teacher sees."""
        return self.images * self.num_gram if self.gram_size is not None else 0

    @property
    def local_views(self) -> int:
        """Views that the student alone sees."""
        return self.images * self.num_local


def grid_of(config: ViTConfig, size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of a view of `size` pixels (a side, or height and width).

    Raises ValueError unless both are multiples of the patch size.
    """
    height, width = (size, size) if isinstance(size, int) else size
    side = config.patch_size
    if height < side or width < side or height % side or width % side:
        raise ValueError(f"a view must be a multiple of {side} pixels high and wide, not {height} x {width}")
    return height // side, width // side


def num_tokens(config: ViTConfig, size: int | tuple[int, int]) -> int:
    """Tokens of a view: CLS, registers and patches. Raises ValueError as `grid_of`."""
    rows, columns = grid_of(config, size)
    return config.num_prefix_tokens + rows * columns


def masked_patches(num_views: int, num_patches: int) -> int:
    """Patches that DINOv3's iBOT masks in all global views of a batch together: a constant.

    Half of the views are masked, the i-th of m of them to the share 0.1 + 0.4 i/m, rounded down
    (Siméoni et al., arXiv 2508.10104; iBOT: Zhou et al., arXiv 2111.07832).
    """
    masked_views = num_views // 2
    return sum(int(num_patches * (0.1 + 0.4 * i / masked_views)) for i in range(1, masked_views + 1))
