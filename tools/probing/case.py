"""One probe's data: the patients to be tested and to learn from, by sides of the set, and what readers marked on them.

Invariant: volumes of the test side are part of it only where that side was opened; volumes of the side `none`, whose
twins stand with patients of another side, never.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inference.scan import Scan, scans_of_set

from dinox_io import ShardSet
from dinox_io.labels import LABELS_FOLDER, Mark, label_path, read_labels
from dinox_io.placed import JoinedMarks, join
from probing.crossfit import Split, splits
from probing.errors import ProbeError, UsageError
from probing.findings import Finding, findings_of
from probing.pretraining import Pretraining, unseen_and_seen

LEARN_FROM = ("train", "val")
"""Sides whose labels a probe may learn from: never the one that is kept for the end."""
UNSEEN, SEEN, UNKNOWN = "never seen in pretraining", "seen in pretraining", "unknown whether pretraining saw them"


@dataclass(frozen=True, eq=False)
class Labels:
    """Marks of a set."""

    name: str
    digest: str
    """sha256 of the file."""
    marks: list[Mark]


def labels_of(folder: Path, name: str | None) -> Labels:
    """Labels by name; None: the only ones that there are. UsageError where there are none, or several."""
    if name is None:
        names = sorted(path.stem for path in (folder / LABELS_FOLDER).glob("*.jsonl"))
        if len(names) != 1:
            found = f"several labels, {', '.join(names)}: choose by --labels" if names else "no labels"
            raise UsageError(f"{folder} has {found} (tools/label_series.py and label_lidc.py put them there)")
        name = names[0]
    path = label_path(folder, name)
    if not path.is_file():
        raise UsageError(f"{folder} has no labels {name!r}: {path} is not there")
    return Labels(name, hashlib.sha256(path.read_bytes()).hexdigest(), read_labels(path))


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """What is probed on."""

    shards: ShardSet
    scans: dict[int, Scan]
    """By index of the volume."""
    joined: JoinedMarks
    findings: list[Finding]
    patients: set[str]
    """All of it: to learn from, and tested."""
    learn: set[str]
    tested: dict[str, set[str]]
    """What they are to pretraining (UNSEEN, SEEN or UNKNOWN) to the patients; none is empty."""
    held_out: bool
    """Whether the test side is tested."""

    def splits(self, which: str) -> list[Split]:
        """How the patients of one kind are tested."""
        return splits(self.learn, self.tested[which], held_out=self.held_out)


def patients_to_test(
    shards: ShardSet, sides: Sequence[str], pretraining: Pretraining, *, allow_seen: bool
) -> dict[str, set[str]]:
    """The patients of these sides by what they are to pretraining. RefusedError, with their count, for those that it
    saw; UsageError for sides without patients. Reads the manifest alone."""
    wanted = {volume.patient for volume in shards.volumes if volume.split in sides}
    if not wanted:
        raise UsageError(f"no patient of the set is on the side {' or '.join(sides)}")
    unseen, seen = unseen_and_seen(pretraining, wanted, shards.volumes, allow_seen=allow_seen)
    kinds = {UNSEEN: unseen, SEEN if pretraining.known else UNKNOWN: seen}
    return {kind: patients for kind, patients in kinds.items() if patients}


def make_case(shards: ShardSet, labels: Labels, tested: dict[str, set[str]], *, held_out: bool) -> Case:
    """The data of a probe. LabelError where the labels are of other images."""
    sides = (*LEARN_FROM, *(("test",) if held_out else ()))
    volumes = [volume for volume in shards.volumes if volume.split in sides]
    usable = {volume.index for volume in volumes}
    joined = join(labels.marks, shards)
    joined = dataclasses.replace(
        joined, by_volume={number: marks for number, marks in joined.by_volume.items() if number in usable}
    )
    patients = {volume.patient for volume in volumes}
    if not joined.by_volume:
        raise ProbeError(f"labels {labels.name}: no mark lies on a volume of the sides {', '.join(sides)}")
    scans = scans_of_set(shards, None)
    return Case(
        shards=shards,
        scans={number: scans[number] for number in usable},
        joined=joined,
        findings=findings_of(joined, shards.volumes, patients),
        patients=patients,
        learn={volume.patient for volume in volumes if volume.split in LEARN_FROM},
        tested=tested,
        held_out=held_out,
    )
