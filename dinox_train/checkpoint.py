"""Checkpoints: whole or absent, verified by hash, never a pickle.

    checkpoints/step-00000040/          40 updates are done
        config.json  model.safetensors  preprocess.json      the teacher's network, as `dinox_model.save` writes it
        train/state.json                counters, loader position, resolved configuration, digest of the shard set
        train/NAME.safetensors          student, heads, optimizer state
        train/shards/                   of a run of several ranks instead of those: version 2 (sharded_checkpoint.py)
        MANIFEST.json                   size and sha256 of every file above, and of itself

A checkpoint is written into a hidden temporary folder, synced, and renamed: a folder of the final name is complete.
What is found damaged all the same (a flipped bit, a lost file) is set aside as `step-XXXXXXXX.damaged`, and the one
before it used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import dinox_model
from dinox_io.atomic import replace_folder
from dinox_model import VisionTransformer

FORMAT = "dinox-checkpoint"
VERSION, SHARDED_VERSION = 1, 2
"""What one process writes, and what several do."""
MANIFEST = "MANIFEST.json"
STATE = "train/state.json"
_SHARDS = "train/shards"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: which, why, what to do."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk: its folder, the number of updates done, and train/state.json."""

    folder: Path
    update: int
    state: dict[str, Any]

    def has(self, name: str) -> bool:
        """Whether there is a train/NAME.safetensors, or a NAME in shards."""
        return (self.folder / "train" / f"{name}.safetensors").is_file() or bool(_shards_of(self.folder, name))

    def tensors(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The whole tensors of NAME, in shards or not. Raises DamagedCheckpoint where it is of another kind."""
        if (self.folder / _SHARDS).is_dir():
            from dinox_train.sharded_checkpoint import read

            return {key: value.to(device) for key, value in read(self.folder, name).items()}
        try:
            return load_file(self.folder / "train" / f"{name}.safetensors", device=str(device))
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{self.folder}: train/{name}.safetensors is none ({error}).") from error


def checkpoint_folder(root: Path, update: int) -> Path:
    """Where the checkpoint after `update` updates lies under `root` (RUN/checkpoints)."""
    return root / f"step-{update:08d}"


def save_checkpoint(
    root: Path,
    update: int,
    *,
    teacher: VisionTransformer,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint and return its folder.

    `tensors`: file name (without ending) to named tensors; `state`: JSON values. On an error (a full disk, say)
    nothing of it stays and earlier checkpoints are untouched. Raises OSError, and CheckpointError where that
    checkpoint exists already.
    """
    temporary, final = begin_checkpoint(root, update)
    try:
        for name, named in tensors.items():
            # safetensors refuses views that share memory; a checkpoint must not depend on how tensors lie in it.
            separate = {key: value.detach().to("cpu").contiguous() for key, value in named.items()}
            save_file(separate, temporary / "train" / f"{name}.safetensors")
        finish_checkpoint(temporary, final, teacher, state)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise _as_os_error(error, temporary) from error
        raise
    return final


def begin_checkpoint(root: Path, update: int) -> tuple[Path, Path]:
    """The folder that a checkpoint is written in, empty, and the one it becomes. Raises OSError, CheckpointError."""
    final = checkpoint_folder(root, update)
    if final.exists():
        raise CheckpointError(f"{final}: exists already; a checkpoint is never overwritten.")
    temporary = root / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "train").mkdir(parents=True)
    return temporary, final


def finish_checkpoint(
    temporary: Path, final: Path, teacher: VisionTransformer | None, state: Mapping[str, Any], *, sharded: bool = False
) -> None:
    """Write what makes the checkpoint in `temporary` whole, once its tensors are there, and give it its name."""
    assert teacher is not None
    dinox_model.save(teacher, temporary)
    (temporary / "train" / "state.json").write_bytes(_json(state))
    (temporary / MANIFEST).write_bytes(_json(_manifest(temporary, SHARDED_VERSION if sharded else VERSION)))
    replace_folder(temporary, final)


def _as_os_error(error: SafetensorError, folder: Path) -> OSError:
    """safetensors tells of a full disk in words only: `I/O error: No space left on device (os error 28)`."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number) if found else str(error), str(folder))


def list_checkpoints(root: Path) -> list[Path]:
    """Folders under `root` with a checkpoint's name, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def open_checkpoint(folder: Path, only: Sequence[str] | None = None) -> Checkpoint:
    """Verify every byte of a checkpoint and read its state.

    only: names of the files that will be read, for a reader of a part: they alone, and the state, are verified. Where
    train/NAME.safetensors is in shards, those are.
    Raises DamagedCheckpoint that names what is wrong; CheckpointError where another version of DINOX wrote it, and
    OSError where it cannot be read just now: neither is damage.
    """
    manifest = _read_manifest(folder)
    if manifest.get("format") != FORMAT or manifest.get("version") not in (VERSION, SHARDED_VERSION):
        raise CheckpointError(
            f"{folder}: has format {manifest.get('format')!r} version {manifest.get('version')!r}; this program reads "
            f"{FORMAT!r} versions {VERSION} and {SHARDED_VERSION}. Use the release of DINOX that wrote it."
        )
    names = list(manifest["files"])
    if only is not None:
        index = [name for name in names if name.startswith(f"{_SHARDS}/") and name.endswith(".json")]
        _verify(folder, manifest, index)
        parts = [part for name in only for part in _shards_of(folder, Path(name).stem)] if index else []
        names = [name for name in names if name in (STATE, *only, *parts)]
    _verify(folder, manifest, names)
    state = json.loads((folder / "train" / "state.json").read_bytes())
    return Checkpoint(folder, int(state["update"]), state)


def _verify(folder: Path, manifest: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        file, entry = folder / name, manifest["files"][name]
        if not file.is_file():
            raise DamagedCheckpoint(f"{folder}: {name} is missing.")
        if file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
            raise DamagedCheckpoint(f"{folder}: {name} is not what was written (size or sha256 differs).")


def _shards_of(folder: Path, name: str) -> list[str]:
    """The files in train/shards that hold `name`."""
    if not (folder / _SHARDS).is_dir():
        return []
    from dinox_train.sharded_checkpoint import shards_of

    return shards_of(folder, name)


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint under `root`, and a message for each newer one, which is damaged and set aside.

    Raises CheckpointError where checkpoints exist and none is whole, leaving all as they are: starting afresh would
    throw a run away without a word.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(list_checkpoints(root)):
        try:
            checkpoint = open_checkpoint(folder)
        except DamagedCheckpoint as error:
            damaged[folder] = str(error)
            continue
        for other in damaged:
            set_aside(other)
        return checkpoint, list(damaged.values())
    if damaged:
        raise CheckpointError(
            "no checkpoint is whole:\n  "
            + "\n  ".join(damaged.values())
            + "\nRestore one from a copy, or give another run.folder."
        )
    return None, []


def checkpoint_digest(folder: Path) -> str | None:
    """A checkpoint's digest, by which it is told from any other; None where its manifest cannot be read.

    Nothing is verified.
    """
    try:
        return str(json.loads((folder / MANIFEST).read_bytes())["self"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is neither resumed from nor in the way, and stays as evidence."""
    number = 0
    while (target := folder.with_name(f"{folder.name}.damaged" + (f"-{number}" if number else ""))).exists():
        number += 1
    return folder.rename(target)


def remove_leftovers(root: Path) -> None:
    """Remove temporary folders that a killed run left behind."""
    for path in root.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def rotate(root: Path, *, keep_last: int, keep_every: int | None) -> list[Path]:
    """Delete old checkpoints and return them: all but the last `keep_last` and those of every `keep_every`-th update.

    The newest by number of updates is never deleted (`keep_last` is at least 1).
    """
    folders = list_checkpoints(root)
    old = folders[: -max(keep_last, 1)]
    gone = [folder for folder in old if not (keep_every and int(folder.name[5:]) % keep_every == 0)]
    for folder in gone:
        # Renamed first: a deletion that is cut short must not leave a damaged folder of a checkpoint's name.
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.tmp")))
    return gone


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The optimizer's state as `KIND.PARAMETER` tensors (exp_avg, exp_avg_sq, step); empty before the first update."""
    return {
        f"{kind}.{name}": value
        for name, parameter in named
        for kind, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, Tensor]], tensors: Mapping[str, Tensor]
) -> None:
    """Put the tensors of `optimizer_tensors` back. Raises CheckpointError where names do not fit the parameters."""
    parameters = dict(named)
    foreign = sorted(key for key in tensors if key.partition(".")[2] not in parameters)
    if foreign:
        raise CheckpointError(f"optimizer state for parameters that this model has not: {', '.join(foreign[:5])}")
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value.to(parameter.device).clone()


def _manifest(folder: Path, version: int = VERSION) -> dict[str, Any]:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    body = {"format": FORMAT, "version": version, "files": files}
    return {**body, "self": hashlib.sha256(_json(body)).hexdigest()}


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} is missing.") from None
    try:
        manifest = json.loads(data)
        body = {key: value for key, value in manifest.items() if key != "self"}
        whole = hashlib.sha256(_json(body)).hexdigest() == manifest["self"]
    except (ValueError, KeyError, AttributeError, RecursionError):
        whole, manifest = False, {}
    if not whole:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} was changed after it was written.")
    return manifest


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
