"""What the student's forward passes of one update draw: the rows that drop path keeps, moved coordinates, the views
whose physical scale it is not told.

Invariant: a function of (seed, position, row, view) and the global batch's size. Drop path chooses among all rows of
the global batch, so a micro-batch's draws are its part of that choice, however the batch is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dinox_model import ViTConfig
from dinox_model.draws import NUM_ROPE_UNIFORMS, Draws, draw, keep_rows, moves_coordinates, num_residuals
from dinox_train.keyed import uniform


@dataclass(frozen=True)
class PassDraws:
    """The draws of one pass (of the global views, say) over the whole batch of an update."""

    config: ViTConfig
    kept: np.ndarray | None
    """bool (V*B, residuals), view-major."""
    rope: np.ndarray | None
    batch_size: int
    num_views: int

    def of_rows(self, rows: np.ndarray) -> Draws:
        """Those of a micro-batch with these rows of the global batch: int (b,) to draws of V*b rows, view-major."""
        within = np.arange(self.num_views)[:, None] * self.batch_size + np.asarray(rows)
        return draw(self.config, self.kept, self.rope, within.ravel())


def draw_pass(
    config: ViTConfig, name: str, *, seed: int, position: int, batch_size: int, num_views: int
) -> PassDraws | None:
    """The draws of the pass `name` over `num_views` views of each image; None where nothing is drawn.

    position: number of the global batch. Streams `network.NAME.…`: another pass has other numbers.
    """
    moves = moves_coordinates(config)
    if num_views == 0 or not (config.drop_path > 0 or moves):
        return None
    kept = rope = None
    if config.drop_path > 0:
        numbers = uniform(
            seed, f"network.{name}.drop_path", position, np.arange(batch_size), num_views, num_residuals(config)
        )
        kept = keep_rows(numbers.swapaxes(0, 1).reshape(num_views * batch_size, -1), config.drop_path)
    if moves:
        rope = uniform(seed, f"network.{name}.rope", position, np.arange(1), 1, NUM_ROPE_UNIFORMS)[0, 0]
    return PassDraws(config, kept, rope, batch_size, num_views)


def draw_unknown_scale(share: float, *, seed: int, position: int, rows: np.ndarray, num_views: int) -> np.ndarray:
    """Of which views the student is not told the size of a pixel: bool (b, num_views), true with probability `share`.

    So a network that looks at it also learns to do without, for images of which nobody knows it.
    """
    return uniform(seed, "network.unknown_scale", position, rows, num_views, 1)[..., 0] < share
