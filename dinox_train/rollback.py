"""Going back within a run folder: the newest whole checkpoint from before the trouble, and what came after it removed.

Invariant: a kill at any moment leaves a folder that resumes, and comes to the same rollback again: newer checkpoints go
first, and the older one is never touched.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from dinox_train.checkpoint import Checkpoint, DamagedCheckpoint, list_checkpoints, open_checkpoint, set_aside

log = logging.getLogger("dinox_train")


def checkpoint_before(root: Path, update: int) -> Checkpoint | None:
    """The newest whole checkpoint under `root` of fewer than `update` updates; None where there is none.

    Damaged ones on the way are set aside. Raises CheckpointError for one of another version, OSError.
    """
    for folder in reversed(list_checkpoints(root)):
        if int(folder.name[5:]) >= update:
            continue
        try:
            return open_checkpoint(folder)
        except DamagedCheckpoint as error:
            log.warning("a damaged checkpoint was set aside: %s", error)
            set_aside(folder)
    return None


def remove_after(root: Path, update: int) -> list[int]:
    """Delete the checkpoints under `root` of more than `update` updates, the newest first; returns their updates."""
    gone = [folder for folder in reversed(list_checkpoints(root)) if int(folder.name[5:]) > update]
    for folder in gone:
        # Renamed first: a deletion that is cut short must not leave a damaged folder of a checkpoint's name.
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.tmp")))
    return [int(folder.name[5:]) for folder in gone]
