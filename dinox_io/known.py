"""What a set knows of the volumes that it holds, so that a series of it can be told from one that changed since.

Invariant: two volumes count as the same only if patient, shape, spacing, positions, directions and every voxel are
equal, exactly as they were packed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinox_io.canonical import canonical_json
from dinox_io.errors import ShardError
from dinox_io.hounsfield import volume_digest
from dinox_io.index import SetIndex, load_index, rebuild_index
from dinox_io.storage import LocalFile, LocalFolder
from dinox_io.volume import Volume


@dataclass(frozen=True)
class KnownVolume:
    """One volume of a set."""

    patient: str
    """Pseudonym."""
    geometry: str
    """sha256 of shape, spacing, positions and directions."""
    digest: str
    """sha256 of the voxels."""

    @classmethod
    def of(cls, volume: Volume) -> KnownVolume:
        """A volume as it was just read."""
        where = volume.hu.shape, volume.spacing_mm, volume.z_positions_mm, volume.orientation
        return cls(volume.patient, _geometry_digest(*where), volume_digest(volume.hu))


def known_volumes(folder: Path, manifest: Mapping[str, Any] | None) -> dict[str, dict[str, KnownVolume]]:
    """Series pseudonym -> {volume id: what is known of it}, of the set in `folder`; nothing without a manifest.

    Positions and directions are those of the index, or of the shards where it is missing or damaged. ShardError: these
    are damaged too.
    """
    known: dict[str, dict[str, KnownVolume]] = {}
    if manifest is None:
        return known
    index = _index(folder, manifest)
    for number, volume in enumerate(manifest["volumes"]):
        z_mm = index.z_mm[index.first[number] : index.first[number + 1]].tolist()
        geometry = _geometry_digest(volume["shape"], volume["spacing_mm"], z_mm, index.orientation[number].tolist())
        one = KnownVolume(volume["patient"], geometry, volume["digest"])
        known.setdefault(volume["series"], {})[volume["id"]] = one
    return known


def what_changed(volumes: Sequence[Volume], known: Mapping[str, KnownVolume]) -> str:
    """What of a series is no longer as the set has it, in closed words; empty if all is."""
    if {volume.id for volume in volumes} != known.keys():
        return "cut into other volumes"
    now = {volume.id: KnownVolume.of(volume) for volume in volumes}
    for name, words in (("patient", "of another patient"), ("geometry", "other geometry"), ("digest", "other voxels")):
        if any(getattr(now[id], name) != getattr(known[id], name) for id in known):
            return words
    return ""


def _index(folder: Path, manifest: Mapping[str, Any]) -> SetIndex:
    try:
        return load_index(LocalFolder(folder), manifest)
    except ShardError:
        with ExitStack() as stack:
            names = [shard["name"] for shard in manifest["shards"]]
            return rebuild_index([stack.enter_context(closing(LocalFile(folder / name))) for name in names], manifest)


def _geometry_digest(
    shape: Sequence[int], spacing_mm: Sequence[float], z_mm: Sequence[float], direction: Sequence[float]
) -> str:
    numbers = [
        [int(size) for size in shape],
        *([float(one) for one in list_] for list_ in (spacing_mm, z_mm, direction)),
    ]
    return hashlib.sha256(canonical_json({"geometry": numbers})).hexdigest()
