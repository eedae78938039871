"""What one look leaves for the next ones: patch features and colours' axes to compare with, maps for later pictures.

    OUTPUT/first.safetensors, newest.safetensors, before.safetensors    patches float32 (s, n, d), scores (s·n, 3)
           step-XXXXXXXX/maps.safetensors     attention float32 (s, h, w), colours uint8 (s, h, w, 3)

Invariant: a file is whole and what was written (its sha256 is checked), or counts as absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dinox_io.atomic import write_atomically
from dinox_train.branch import Branch

FIRST, NEWEST, BEFORE = "first.safetensors", "newest.safetensors", "before.safetensors"
MAPS = "maps.safetensors"
_FACTS = "dinox-monitor"


@dataclass(frozen=True)
class Reference:
    """What a look saw on the fixed slices."""

    update: int
    digest: str
    """Of the checkpoint."""
    patches: np.ndarray
    """float32 (s, n, d)."""
    scores: np.ndarray
    """float32 (s·n, 3): of its colours, turned onto those before."""
    went_back_to: tuple[int, ...] = ()
    """Of the checkpoint (dinox_train/branch.py)."""

    @property
    def branch(self) -> Branch:
        """Where the checkpoint stood in its run."""
        return Branch(self.update, self.went_back_to)

    def write(self, path: Path) -> None:
        """Replace what is there."""
        facts = {"update": str(self.update), "digest": self.digest, "went_back_to": json.dumps(self.went_back_to)}
        write_arrays(path, {"patches": self.patches, "scores": self.scores}, facts)


def read_reference(path: Path, shape: tuple[int, ...]) -> Reference | None:
    """None where there is none, it is damaged, or its patches are not of that shape (s, n, d)."""
    found = read_arrays(path)
    if found is None:
        return None
    arrays, facts = found
    if arrays["patches"].shape != shape:
        return None
    went_back_to = tuple(json.loads(facts.get("went_back_to", "[]")))
    return Reference(int(facts["update"]), facts["digest"], arrays["patches"], arrays["scores"], went_back_to)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> None:
    """Write named arrays and texts. The same ones give the same bytes."""
    whole = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    # One member: several would be written in an order that changes from process to process.
    facts = {**facts, "sha256": _sha256(whole)}
    write_atomically(path, save(whole, {_FACTS: json.dumps(facts, sort_keys=True)}))


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
    """What `write_arrays` wrote; None where there is nothing, or something else."""
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            facts = json.loads((file.metadata() or {})[_FACTS])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    return (arrays, facts) if facts.pop("sha256", None) == _sha256(arrays) else None


def _sha256(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
