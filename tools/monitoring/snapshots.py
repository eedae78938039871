"""The checkpoints of a run as somebody sees them who only reads: which are new, and what lies in one.

Invariant: nothing in the run's checkpoints/ is written, renamed or set aside here; what is read was verified by hash,
as the trainer does, and a checkpoint that is rotated away meanwhile is no error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

import dinox_model
from dinox_model import VisionTransformer, ViTConfig, WeightsError
from dinox_model.weights import CONFIG, PREPROCESS, WEIGHTS, empty_network
from dinox_train.checkpoint import (
    Checkpoint,
    CheckpointError,
    DamagedCheckpoint,
    checkpoint_digest,
    list_checkpoints,
    open_checkpoint,
)
from dinox_train.config import Config, ConfigError, validate

_GRAM = "gram_teacher"
_TIMES, _BESIDE_BYTES = 2.5, 256 << 20
"""Host memory that a network takes while it is read, in sizes of its file, and what a look takes beside it."""


class Gone(Exception):
    """The checkpoint was rotated away."""


class NoRoom(Exception):
    """Too little free memory to read a network just now without harm to the training."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint on disk that was not looked into yet."""

    folder: Path
    update: int
    digest: str | None
    """What its manifest calls itself; None where that cannot be read."""

    def open(self) -> Opened:
        """Verify what a look needs of it. Raises Gone, NoRoom, CheckpointError (DamagedCheckpoint is one), OSError."""
        self._need_room()
        try:
            checkpoint = open_checkpoint(self.folder, (CONFIG, WEIGHTS, PREPROCESS, f"train/{_GRAM}.safetensors"))
            return Opened(self, checkpoint, validate(checkpoint.state["config"]))
        except ConfigError as error:
            raise CheckpointError(
                f"{self.folder}: has a configuration that this DINOX does not know: {error}"
            ) from None
        except (CheckpointError, OSError) as error:
            raise self.why(error) from error

    def why(self, error: Exception) -> Exception:
        """Gone where the folder is no longer there, whatever was met on the way; else what was met."""
        return error if self.folder.is_dir() else Gone(str(self.folder))

    def _need_room(self) -> None:
        try:
            needed = _TIMES * (self.folder / WEIGHTS).stat().st_size + _BESIDE_BYTES
        except FileNotFoundError:
            return  # `open_checkpoint` finds out why
        free = psutil.virtual_memory().available
        if free < needed:
            raise NoRoom(f"a look takes {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free")


@dataclass(frozen=True)
class Opened:
    """A verified checkpoint, and the configuration that it was written with."""

    snapshot: Snapshot
    checkpoint: Checkpoint
    config: Config

    def network(self, device: torch.device) -> VisionTransformer:
        """The teacher's backbone, in evaluation mode. Raises Gone, DamagedCheckpoint, OSError."""
        try:
            return dinox_model.load(self.checkpoint.folder).to(device)
        except WeightsError as error:
            raise self.snapshot.why(DamagedCheckpoint(str(error))) from error
        except OSError as error:
            raise self.snapshot.why(error) from error

    def gram_teacher(self, config: ViTConfig, device: torch.device) -> VisionTransformer | None:
        """The frozen network that Gram anchoring holds on to, where the run has taken one. Errors as `network`."""
        try:
            if not self.checkpoint.has(_GRAM):
                if not self.checkpoint.folder.is_dir():
                    raise Gone(str(self.checkpoint.folder))  # else a teacher that is there would not be looked at
                return None
            tensors = self.checkpoint.tensors(_GRAM)
        except (CheckpointError, OSError) as error:
            raise self.snapshot.why(error) from error
        network = empty_network(config)
        network.load_state_dict(tensors)
        return network.to(device).eval()


def snapshots(checkpoints: Path) -> list[Snapshot]:
    """What lies in RUN/checkpoints, oldest first."""
    return [
        Snapshot(folder, int(folder.name[5:]), checkpoint_digest(folder)) for folder in list_checkpoints(checkpoints)
    ]
