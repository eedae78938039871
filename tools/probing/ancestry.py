"""A run, the run whose weights it began with, and so on: their checkpoints' states, as far as there is a record.

Invariant: an earlier run is read from the very checkpoint that the later one began with. Its digest is noted in the
later one's checkpoints, as `began_with`; where another lies in its place by now, there is no record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinox_train.checkpoint import CheckpointError, checkpoint_digest, open_checkpoint
from probing.errors import RefusedError

ANCESTORS_MAX = 32
"""Runs that began from each other's weights; more is a circle of folders that were moved."""


@dataclass
class Ancestry:
    """What is on record."""

    runs: list[tuple[dict[str, Any], Path]] = field(default_factory=list)
    """State and folder of the checkpoint of each, the network's own first."""
    weights: str | None = None
    """The name of weights without a record that the first of these runs began with."""
    why: str | None = None
    """Why there is none, in words."""
    notes: list[str] = field(default_factory=list)
    """What is taken to be so, in words."""


def ancestry_of(state: dict[str, Any], folder: Path) -> Ancestry:
    """Of the network of a checkpoint. Raises RefusedError where the runs began with each other's weights."""
    found = Ancestry()
    for _ in range(ANCESTORS_MAX):
        found.runs.append((state, folder))
        began = state["config"]["run"].get("init_from")
        if began is None:
            return found
        noted, folder = state.get("began_with"), Path(began)
        try:
            state = open_checkpoint(folder).state
        except (CheckpointError, OSError):
            found.why = f"it began with the weights at {folder.name}, of whose training there is no record"
        if noted is not None and found.why is None and noted["digest"] != checkpoint_digest(folder):
            found.why = f"it began with weights that are no longer at {folder.name}: another checkpoint lies there now"
        if found.why is not None:
            found.weights = folder.name
            return found
        if noted is None:
            found.notes.append(f"the checkpoint that is at {folder.name} now is taken for the one that it began with")
    raise RefusedError(f"{found.runs[0][1]}: more than {ANCESTORS_MAX} runs that began with each other's weights")
