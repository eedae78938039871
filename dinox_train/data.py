"""What a run trains and validates on: a shard set (or a made-up one), and which of its sides serve as what."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io import ShardSet, VolumeRecord, open_shards
from dinox_io.manifest import dense_histogram
from dinox_train.config import ConfigError, DataSection
from dinox_train.fake import write_fake_set


class LeakError(ValueError):
    """A patient or a volume stands on both sides of what a run trains and validates on."""


@dataclass(frozen=True)
class Dataset:
    """An open shard set and the sides a run uses.

    train_side: "train", or "val" where that is all there is, or None for all volumes; val_side: "val", or None where
    there is nothing to validate on. The `test` side is never among them.
    """

    shards: ShardSet
    train_side: str | None
    val_side: str | None

    @property
    def hu_histogram(self) -> np.ndarray:
        """int64 (4096,): voxels of the whole set in bins of 16 HU from -32768."""
        return dense_histogram(self.shards.manifest["hu_histogram"])

    @property
    def provenance(self) -> dict[str, Any]:
        """What a run notes of its data: `digest` of the set, `about` (what `--about` said, or None), `counts`."""
        manifest = self.shards.manifest
        return {"digest": self.shards.digest, "about": manifest.get("about"), "counts": manifest.get("counts")}

    @property
    def sides_in_words(self) -> str:
        count = Counter(volume.split for volume in self.shards.volumes)
        closed = f"; {count['test']} test volumes stay closed" if count["test"] else ""
        if self.val_side:
            return f"{count['train']} volumes to train on, {count['val']} of other patients to validate on{closed}"
        used = count[self.train_side] if self.train_side else len(self.shards.volumes)
        return (
            f"all {used} volumes to train on and nothing to validate on, since a side of the split is empty "
            f"(train {count['train']}, val {count['val']}): loss_val, knn_z and knn_label stay null{closed}"
        )


def open_dataset(data: DataSection, run_folder: Path, digest: str | None, say: Callable[[str], None]) -> Dataset:
    """Open what `data.shards` names. `digest`: the manifest a resumed run began with; None for a new run.

    Raises ShardError for a damaged set, ConfigError where the set is another one than the run began with or a patient
    was removed from it since, LeakError.
    """
    folder = write_fake_set(run_folder / "fake-shards") if data.shards == "fake" else Path(data.shards)
    shards = open_shards(folder, edge=data.edge)
    if digest not in (None, shards.digest):
        shards = _as_the_run_began(shards, folder, data, digest, say)
    sides = {volume.split for volume in shards.volumes}
    if {"train", "val"} <= sides:
        refuse_leaks(shards.volumes)
        return Dataset(shards, "train", "val")
    if "test" not in sides:
        return Dataset(shards, None, None)
    # `test` is never opened: what is left is the one side that there is.
    left = sides & {"train", "val"}
    if not left:
        raise ConfigError(
            f"data.shards: {folder} holds test volumes only, which are never trained on. Pack a train side."
        )
    return Dataset(shards, left.pop(), None)


def _as_the_run_began(
    shards: ShardSet, folder: Path, data: DataSection, digest: str | None, say: Callable[[str], None]
) -> ShardSet:
    removed = shards.manifest.get("removed") or {"manifests": []}
    if digest in removed["manifests"]:
        shards.close()
        raise ConfigError(
            f"data.shards: a patient was withdrawn from {folder} since the run began (its set had the digest "
            f"{digest}), and the checkpoints of the run have seen that patient: it does not go on. Start another "
            "run.folder on the set as it is now, and decide what becomes of these checkpoints and of what was made of "
            "them (run.init_from with them would carry over what they learnt from that patient)."
        )
    earlier = folder / "manifests" / f"{digest}.json"
    if not earlier.is_file():
        raise ConfigError(
            f"data.shards: {folder} has the digest {shards.digest[:16]}…, and the run began with {str(digest)[:16]}…, "
            "of which it knows nothing: it is another set, or was written anew. Give the set of the run, or start "
            "another run.folder."
        )
    newer = shards.digest
    shards.close()
    say(f"the shard set has grown since the run began ({newer[:16]}…); this run goes on with its own volumes")
    return open_shards(earlier, edge=data.edge)


def tell_provenance(dataset: Dataset, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Say whose data it is and under which licence, where the set tells; warn if weights may not be released."""
    about = dataset.provenance["about"]
    if not about:
        return
    version = f" {about['version']}" if about.get("version") else ""
    say(f"data: {about.get('name')}{version}, licence {about.get('licence')}")
    if about.get("weights_may_be_released") == "no":
        warn(f"weights that are trained on {about.get('name')} must not be released: its description says so")


def refuse_leaks(volumes: Sequence[VolumeRecord]) -> None:
    """Raise LeakError where a patient or a digest stands both in train and in val, naming the pair."""
    for what in ("patient", "digest"):
        seen: dict[str, dict[str, str]] = defaultdict(dict)
        for volume in volumes:
            if volume.split in ("train", "val"):
                seen[getattr(volume, what)][volume.split] = volume.id
        for value, ids in seen.items():
            if len(ids) == 2:
                raise LeakError(
                    f"leak: {what} {value} stands in train (volume {ids['train']}) and in val (volume {ids['val']}): "
                    "figures on the validation side would flatter. Pack the set anew from its sources."
                )
