"""What all looks at a run have in common, beside the set and the slices themselves.

Invariant: whatever gives other figures of the same checkpoint is another VERSION, or stands in figures.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from dinox_train.view_plan import ViewSettings

FORMAT, VERSION = "dinox-monitor", 1
SEED = 0
"""Of every choice: one for all runs, so that runs on one set are looked at through the same slices and views."""
SLICES, GALLERY = 4, 256
"""Defaults of --slices and --gallery."""
RUN_LENGTH = 4
"""Slices in a row, of one volume, that stand in the gallery together: a query's slice and its three neighbours."""
ASKED = 1
"""Which of them the query is of: it has a neighbour on either side."""
VIEW_POSITION = 2**63
"""The views' place in the stream of random numbers, which no batch of a training and no evaluation reaches."""
PICTURE_TIMES = 2
"""Slices of pictures and Gram matrices are shown at so many times the training's global size."""


@dataclass(frozen=True)
class Sizes:
    """Sides of what a network is shown, pixels: of the views, and of whole slices in pictures."""

    view: int
    picture: int

    @classmethod
    def of(cls, global_size: int) -> Sizes:
        """Of a run with global views of that size."""
        return cls(global_size, PICTURE_TIMES * global_size)


def view_settings(size: int) -> ViewSettings:
    """The two views of retrieval: the same for all runs but for their size, and milder than a training's.

    The defaults' HU windows; half of the slice or more, neither blurred nor noisy, since whether a network tells
    neighbouring slices apart is asked, and not whether it sees through a blur.
    """
    return ViewSettings(
        num_global=2, num_local=0, global_size=size, global_scale=(0.5, 1.0), blur_probability=(0.0, 0.0, 0.0)
    )
