"""Which looks at checkpoints are of the run as it is now: a rollback undoes checkpoints, and looks at them stay.

Invariant: the answer depends on what was noted of each look, and on the checkpoints on disk, alone; a checkpoint that
was rotated away is no reason to leave out a look at it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinox_train.checkpoint import STATE, checkpoint_digest, checkpoint_folder, list_checkpoints


@dataclass(frozen=True)
class Branch:
    """Where a checkpoint stands in its run."""

    update: int
    """Updates that were done."""
    went_back_to: tuple[int, ...] = ()
    """The update that each rollback until then had led back to, in their order."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Branch:
        """From a checkpoint's state, or what was noted of it (one from before this was noted: as if of no rollback)."""
        return cls(int(record["update"]), tuple(record.get("went_back_to", ())))

    def leads_to(self, newest: Branch) -> bool:
        """Whether a run with that newest checkpoint went on from this one: no rollback since has undone it."""
        known = len(self.went_back_to)
        before, since = newest.went_back_to[:known], newest.went_back_to[known:]
        return (
            self.update <= newest.update and before == self.went_back_to and self.update <= min(since, default=1 << 62)
        )


def newest_branch(checkpoints: Path) -> Branch | None:
    """Of the newest checkpoint in RUN/checkpoints whose state can be read; None where there is none."""
    for folder in reversed(list_checkpoints(checkpoints)):
        try:
            return Branch.of(json.loads((folder / STATE).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # removed meanwhile, or damaged: the run goes on from the one before
    return None


def of_this_run(looks: Sequence[dict[str, Any]], checkpoints: Path) -> list[dict[str, Any]]:
    """Those of the looks that are at checkpoints of the run as it is now, in their order.

    looks: each with `update`, `went_back_to`, and in `checkpoint` the `digest`. Left out are those newer than the
    newest checkpoint in RUN/checkpoints, those that a rollback undid, and those at another checkpoint than the one that
    is there. All stay where no checkpoint is there: then nothing is known.
    """
    newest = newest_branch(checkpoints)
    if newest is None:
        return list(looks)
    return [look for look in looks if Branch.of(look).leads_to(newest) and not _is_of_another(look, checkpoints)]


def _is_of_another(look: Mapping[str, Any], checkpoints: Path) -> bool:
    there = checkpoint_digest(checkpoint_folder(checkpoints, look["update"]))
    noted = (look.get("checkpoint") or {}).get("digest")
    return None not in (there, noted) and there != noted
