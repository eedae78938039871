"""The network that is probed: the newest checkpoint of a run, a checkpoint, or any folder of weights; read only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dinox_model
from dinox_model import VisionTransformer
from dinox_train.checkpoint import CheckpointError, DamagedCheckpoint, list_checkpoints, open_checkpoint
from probing.errors import ProbeError, UsageError


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A network on the CPU, and the state of the training it is from."""

    folder: Path
    model: VisionTransformer
    state: dict[str, Any] | None
    """train/state.json of its checkpoint; None for weights without one."""
    notes: tuple[str, ...]
    """For people: what was read."""

    @property
    def update(self) -> int | None:
        """Updates of the training."""
        return None if self.state is None else int(self.state["update"])


def open_source(path: Path) -> Source:
    """The network at `path`: a run's folder, a checkpoint's, or what `dinox_model.load_pretrained` reads.

    A checkpoint is verified byte for byte; of a run, damaged ones are left as they are, and the one before is taken.
    Raises UsageError where there is nothing of the name, ProbeError or WeightsError for what cannot be read.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; give a run, a checkpoint, or a folder of weights")
    if (path / "checkpoints").is_dir():
        return _of_run(path / "checkpoints")
    if (path / "train" / "state.json").is_file():
        try:
            return _of_checkpoint(path, [])
        except CheckpointError as error:
            raise ProbeError(str(error)) from None
    model, report = dinox_model.load_pretrained(path)
    return Source(folder=path, model=model, state=None, notes=tuple(report.lines()))


def _of_run(folder: Path) -> Source:
    notes: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return _of_checkpoint(checkpoint, notes)
        except DamagedCheckpoint as error:
            notes.append(f"left out: {error}")
        except CheckpointError as error:
            raise ProbeError(str(error)) from None
    raise ProbeError("\n".join([f"{folder} holds no whole checkpoint yet", *notes]))


def _of_checkpoint(folder: Path, notes: list[str]) -> Source:
    checkpoint = open_checkpoint(folder)
    model = dinox_model.load(folder)
    said = (*notes, f"{folder}: {checkpoint.update} updates")
    return Source(folder=folder, model=model, state=checkpoint.state, notes=said)
