"""What a run trains and validates on: shard sets (or a made-up one), and which of their sides serve as what."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinox_io import ShardError, ShardSet, VolumeRecord, open_shards
from dinox_io.manifest import EARLIER_FOLDER, dense_histogram, set_folder
from dinox_io.mixture import temperature_weights
from dinox_train.config import ConfigError
from dinox_train.fake import FAKE_SET, write_fake_set
from dinox_train.sections import DataSection


class LeakError(ValueError):
    """A patient or a volume stands on both sides of what a run trains and validates on."""


@dataclass(frozen=True)
class Source:
    """One open set and the weight by which it shares each batch."""

    shards: ShardSet
    weight: float
    folder: str
    """Where it lies: a folder, or the address of a bucket."""


@dataclass(frozen=True)
class Dataset:
    """The open shard sets and the sides a run uses.

    removals: where the run went on although a patient had been taken out of a set: after which `update`, the digest it
    `began` with and the one it has `now`, of each such start.

    train_side: "train", or "val" where that is all there is, or None for all volumes; val_side: "val", or None where
    there is nothing to validate on. The `test` side is never among them.
    """

    sources: tuple[Source, ...]
    train_side: str | None
    val_side: str | None
    removals: tuple[Mapping[str, Any], ...] = ()

    @property
    def volumes(self) -> list[VolumeRecord]:
        """Of all sets."""
        return [volume for source in self.sources for volume in source.shards.volumes]

    @property
    def began(self) -> list[tuple[str, float]]:
        """Digest and weight of each set, in the order of the configuration: what a checkpoint keeps of them."""
        return [(source.shards.digest, source.weight) for source in self.sources]

    def having(self, side: str | None) -> list[ShardSet]:
        """The sets that have volumes of a side (None: all of them)."""
        sets = [source.shards for source in self.sources]
        return [shards for shards in sets if side is None or any(volume.split == side for volume in shards.volumes)]

    @property
    def hu_histogram(self) -> np.ndarray:
        """int64 (4096,): voxels in bins of 16 HU from -32768, each set counted by its share of the batches."""
        total = sum(source.weight for source in self.sources)
        histograms = [dense_histogram(source.shards.manifest["hu_histogram"]) for source in self.sources]
        parts = [
            source.weight / total * counts / counts.sum()
            for source, counts in zip(self.sources, histograms, strict=True)
        ]
        return np.rint(np.sum(parts, axis=0) * sum(int(counts.sum()) for counts in histograms)).astype(np.int64)

    @property
    def provenance(self) -> list[dict[str, Any]]:
        """What a run notes of each set: its `digest`, `about` (what `--about` said, or None), `counts` and weight."""
        return [
            {
                "digest": source.shards.digest,
                "about": source.shards.manifest.get("about"),
                "counts": source.shards.manifest.get("counts"),
                "weight": source.weight,
            }
            for source in self.sources
        ]

    def removals_told(self, update: int) -> list[str]:
        """Of the removals that this start was told of, after `update` updates: words for the events."""
        return [
            f"goes on with the set {one['now']}, without a patient who was withdrawn; it began with {one['began']}"
            for one in self.removals
            if one["update"] == update
        ]

    def ways_on(self, error: ShardError) -> str:
        """What is damaged, and how a run may go on nevertheless."""
        found = [
            (source.folder, volume.patient)
            for source in self.sources
            for volume in source.shards.volumes
            if volume.id == error.volume
        ]
        folder, patient = found[0] if found else (" or ".join(source.folder for source in self.sources), "PSEUDONYM")
        return (
            f"{error}. The data is damaged, or cannot be read; the run ends after a checkpoint. Restore the shard from "
            f"a copy (python tools/verify_shards.py {folder} names all that is damaged), and the same command goes on. "
            f"Where there is no copy, `python tools/pack_shards.py --output {folder} --remove {patient}` takes the "
            "patient out; the run then goes on without that patient once data.after_removal names the set as it is now."
        )

    @property
    def sides_in_words(self) -> str:
        count = Counter(volume.split for volume in self.volumes)
        closed = f"; {count['test']} test volumes stay closed" if count["test"] else ""
        if self.val_side:
            return f"{count['train']} volumes to train on, {count['val']} of other patients to validate on{closed}"
        used = count[self.train_side] if self.train_side else len(self.volumes)
        return (
            f"all {used} volumes to train on and nothing to validate on, since a side of the split is empty "
            f"(train {count['train']}, val {count['val']}): loss_val, knn_z and knn_label stay null{closed}"
        )


def open_dataset(
    data: DataSection,
    run_folder: Path,
    began: Sequence[tuple[str, float]] | None,
    say: Callable[[str], None],
    *,
    removals: Sequence[Mapping[str, Any]] = (),
    update: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Dataset:
    """Open what `data.shards` names. `began`: digest and weight of the sets a resumed run began with; None: a new run.

    removals, update: of the run so far (`Dataset.removals`), and how many updates it has done. share: (rank, ranks) of
    a run of several processes, each of which looks into its share of the shards (dinox_io.open_shards).
    Raises ShardError for a damaged set, ConfigError where a set is another one than the run began with or has another
    weight, a patient was removed from it since and nobody said that the run goes on (data.after_removal), or it has
    nothing to train on, LeakError.
    """
    named = _named(data, run_folder)
    if began is not None and len(began) != len(named):
        raise ConfigError(f"data.shards: names {len(named)} sets, and the run began with {len(began)}")
    opened: list[ShardSet] = []
    told: list[Mapping[str, Any]] = []
    for number, (folder, _) in enumerate(named):
        shards = _open(folder, data, share)
        if began is not None and began[number][0] != shards.digest:
            if _goes_on_after_removal(shards, folder, data, began[number][0], say):
                told.append({"update": update, "began": began[number][0], "now": shards.digest})
            else:
                shards = _as_the_run_began(shards, folder, began[number][0], data, say, share)
        opened.append(shards)
    volumes = [volume for shards in opened for volume in shards.volumes]
    train_side, val_side = _sides({volume.split for volume in volumes}, named)
    if told and "train" not in {volume.split for volume in volumes}:
        raise ConfigError("data.after_removal: no volume to train on is left. Start another run.folder on another set.")
    if val_side:
        refuse_leaks(volumes)
    weights = _weights(data, opened, [weight for _, weight in named], train_side)
    if began is not None and told and data.temperature is not None:
        weights = [weight for _, weight in began]  # those of the sets as they were: the run has them
    elif began is not None:
        _check_weights(weights, [weight for _, weight in began])
    folders = [folder for folder, _ in named]
    sources = tuple(Source(*source) for source in zip(opened, weights, folders, strict=True))
    dataset = Dataset(sources, train_side, val_side, (*removals, *told))
    if len(dataset.having(train_side)) < len(opened):
        drawn_from = dataset.having(train_side)
        folder = next(folder for (folder, _), shards in zip(named, opened, strict=True) if shards not in drawn_from)
        raise ConfigError(f"data.shards: {folder} has no {train_side} volume, so there is nothing to draw from it.")
    return dataset


def _check_weights(weights: Sequence[float], began: Sequence[float]) -> None:
    """ConfigError where sets would share the batches otherwise than when the run began."""
    if [weight / sum(weights) for weight in weights] != [weight / sum(began) for weight in began]:
        raise ConfigError(
            f"data.shards: the sets have the weights {list(weights)}, and the run began with {list(began)}: that would "
            "be another order of windows. Give those again, or start another run.folder."
        )


def _named(data: DataSection, run_folder: Path) -> list[tuple[str, float | None]]:
    """Folders, or addresses of buckets, and their weights."""
    if isinstance(data.shards, str):
        fake = data.shards == "fake"
        return [(str(write_fake_set(run_folder / FAKE_SET)) if fake else data.shards, None)]
    return [(one.path, one.weight) for one in data.shards]


def _open(folder: str, data: DataSection, share: tuple[int, int]) -> ShardSet:
    try:
        return open_shards(folder, edge=data.edge, share=share)
    except ImportError as error:
        raise ConfigError(f"data.shards: {error}") from None


def _sides(sides: set[str], named: Sequence[tuple[str, float | None]]) -> tuple[str | None, str | None]:
    if {"train", "val"} <= sides:
        return "train", "val"
    if "test" not in sides:
        return None, None
    # `test` is never opened: what is left is the one side that there is.
    left = sides & {"train", "val"}
    if not left:
        folders = ", ".join(folder for folder, _ in named)
        raise ConfigError(
            f"data.shards: {folders} holds test volumes only, which are never trained on. Pack a train side."
        )
    return left.pop(), None


def _weights(
    data: DataSection, opened: Sequence[ShardSet], weights: Sequence[float | None], side: str | None
) -> list[float]:
    if data.temperature is None:
        return [1.0 if weight is None else weight for weight in weights]
    slices = [sum(v.shape[0] for v in shards.volumes if side in (None, v.split)) for shards in opened]
    return temperature_weights([max(count, 1) for count in slices], data.temperature)


def _goes_on_after_removal(
    shards: ShardSet, folder: str, data: DataSection, digest: str, say: Callable[[str], None]
) -> bool:
    """Whether a patient was removed from the set since, and the configuration says that the run goes on.

    Raises ConfigError where it does not say so.
    """
    removed = shards.manifest.get("removed") or {"manifests": []}
    if digest not in removed["manifests"]:
        return False
    if any(shards.digest.startswith(one) for one in data.after_removal):
        say(
            f"a patient was withdrawn from the set since the run began ({digest[:16]}…); as data.after_removal says, "
            f"the run goes on with the set as it is now ({shards.digest[:16]}…). What it learnt from that patient "
            "stays in its weights, and in its earlier checkpoints"
        )
        return True
    now = shards.digest
    shards.close()
    raise ConfigError(
        f"data.shards: a patient was withdrawn from {folder} since the run began (its set had the digest "
        f"{digest}), and the checkpoints of the run have seen that patient: it does not go on by itself. Start another "
        "run.folder on the set as it is now, and decide what becomes of these checkpoints and of what was made of "
        "them (run.init_from with them would carry over what they learnt from that patient). Where what was learnt "
        f"from that patient may be kept, data.after_removal=[{now}] goes on with the set as it is now."
    )


def _as_the_run_began(
    shards: ShardSet, folder: str, digest: str, data: DataSection, say: Callable[[str], None], share: tuple[int, int]
) -> ShardSet:
    earlier = f"{EARLIER_FOLDER}/{digest}.json"
    if not set_folder(folder)[0].has(earlier):
        raise ConfigError(
            f"data.shards: {folder} has the digest {shards.digest[:16]}…, and the run began with {str(digest)[:16]}…, "
            "of which it knows nothing: it is another set, or was written anew. Give the set of the run, or start "
            "another run.folder."
        )
    newer = shards.digest
    shards.close()
    say(f"the shard set has grown since the run began ({newer[:16]}…); this run goes on with its own volumes")
    return _open(f"{folder.rstrip('/')}/{earlier}", data, share)


def tell_provenance(dataset: Dataset, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Say whose data it is and under which licence, where the set tells; warn if weights may not be released."""
    for about in filter(None, (noted["about"] for noted in dataset.provenance)):
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
