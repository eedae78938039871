"""What pretraining saw: the patients and digests of the sides that a run trained on, by its checkpoint and its sets'
manifests; and the refusal to test on them.

Invariant: what is not known counts as seen. A whole side counts as seen also where `data.limit` drew from a part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinox_io import ShardError, VolumeRecord
from dinox_io.manifest import EARLIER_FOLDER, read_manifest
from probing.ancestry import ancestry_of
from probing.errors import RefusedError
from probing.source import Source


@dataclass
class Pretraining:
    """What is on record."""

    known: bool = True
    """False: the weights have no record, or a set that they were trained on is nowhere to be found."""
    sets: list[str] = field(default_factory=list)
    """Digests of the sets."""
    patients: set[str] = field(default_factory=set)
    digests: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def saw(self, patients: Iterable[str], volumes: Sequence[VolumeRecord]) -> set[str]:
        """Which of these patients it saw: by pseudonym, or by the digest of one of their volumes. All, where nothing is
        known."""
        wanted = set(patients)
        if not self.known:
            return wanted
        twins = {volume.patient for volume in volumes if volume.digest in self.digests}
        return wanted & (self.patients | twins)

    def json(self) -> dict[str, Any]:
        """As it stands in probe.json."""
        return {
            "known": self.known,
            "sets": sorted(self.sets),
            "patients": len(self.patients),
            "volumes": len(self.digests),
            "notes": self.notes,
        }


def pretraining_of(source: Source, places: Sequence[str | Path]) -> Pretraining:
    """What the training of a network saw, and that of the network it began with, and so on.

    places: where its sets may lie beside the folders that its configuration names: the set that is probed, and others.
    """
    found = Pretraining()
    if source.state is None:
        found.known = False
        found.notes.append(f"{source.folder.name} has weights and no record of their training")
        return found
    ancestry = ancestry_of(source.state, source.folder)
    for state, folder in ancestry.runs:
        _add(found, state, folder, places)
    found.notes += ancestry.notes
    if ancestry.why is not None:
        found.known = False
        found.notes.append(ancestry.why)
    return found


def _add(found: Pretraining, state: dict[str, Any], folder: Path, places: Sequence[str | Path]) -> None:
    config = state["config"]
    named = config["data"]["shards"]
    own = [named] if isinstance(named, str) else [one["path"] for one in named]
    if own == ["fake"]:
        own = [str(folder.parent.parent / "fake-shards"), str(Path(config["run"]["folder"]) / "fake-shards")]
    volumes: list[dict[str, Any]] = []
    for digest, _ in state["shards"]:
        found.sets.append(digest)
        manifest = manifest_of(digest, [*places, *own])
        if manifest is None:
            found.known = False
            found.notes.append(
                f"pretraining saw a set of the digest {digest[:16]}…, which lies neither in --shards nor where its "
                "configuration says: name its folder by --pretraining-set"
            )
        else:
            volumes += manifest["volumes"]
    for removal in state.get("removals", ()):  # of patients who were withdrawn while it went on
        manifest = manifest_of(removal["began"], [*places, *own])
        volumes += [] if manifest is None else manifest["volumes"]
        if manifest is None:
            found.notes.append(
                "it also learnt from patients who were withdrawn from its set since; no list of them is here"
            )
    side = train_side({volume["split"] for volume in volumes})
    trained = [volume for volume in volumes if side in (None, volume["split"])]
    found.patients |= {volume["patient"] for volume in trained}
    found.digests |= {volume["digest"] for volume in trained}
    if config["data"].get("limit") is not None:
        found.notes.append(f"it drew from {config['data']['limit']} windows only; the whole side counts as seen")


def train_side(sides: set[str]) -> str | None:
    """The side that the trainer draws from, of the sides that its sets' volumes are on (None: all volumes)."""
    if {"train", "val"} <= sides:
        return "train"
    if "test" not in sides:
        return None
    return next(iter(sorted(sides & {"train", "val"}, reverse=True)), None)


def manifest_of(digest: str, places: Sequence[str | Path]) -> dict[str, Any] | None:
    """The manifest of this digest, today's or an earlier one of a set at one of the places; None: it is at none."""
    for place in places:
        for path in (place, f"{str(place).rstrip('/')}/{EARLIER_FOLDER}/{digest}.json"):
            try:
                manifest = read_manifest(path)
            except (ShardError, ImportError, OSError):
                continue
            if manifest["self"] == digest:
                return manifest
    return None


def unseen_and_seen(
    pretraining: Pretraining, tested: Iterable[str], volumes: Sequence[VolumeRecord], *, allow_seen: bool
) -> tuple[set[str], set[str]]:
    """The patients to be tested, those apart that pretraining saw.

    Raises RefusedError, with the count, where there are some and `allow_seen` does not ask for a table of them.
    """
    wanted = set(tested)
    seen = pretraining.saw(wanted, volumes)
    if seen and not allow_seen:
        why = "" if pretraining.known else "What pretraining saw is not known: " + "; ".join(pretraining.notes) + ". "
        verb = "saw" if pretraining.known else "may have seen"
        raise RefusedError(
            f"pretraining {verb} {len(seen)} of the {len(wanted)} patients to be tested: figures on them would "
            f"flatter. {why}Test patients that it never saw (--side val; --shards another set), or give --allow-seen "
            "for tables of their own that say so"
        )
    return wanted - seen, seen
