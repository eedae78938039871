"""What a probe is asked to tell: items (a window each), grouped into units with one label each, and how they were
chosen.

Invariant: who is in a task depends on the marks alone. docs/evaluation.md says each rule in words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dinox_io import ShardSet
from dinox_io.placed import JoinedMarks
from dinox_model.config import nearest
from probing import protocol
from probing.errors import ProbeError, UsageError
from probing.findings import Finding

TASKS, DENSE = ("presence", "type", "malignancy"), "dense"
SOLID_ABOVE = 3.0
"""Of `texture`, on LIDC's scale from 1 (ground-glass) to 5 (solid)."""


@dataclass(frozen=True, eq=False)
class Item:
    """A window to encode: its middle slice, and the finding to look at, if it is about one."""

    volume: int
    center: int
    finding: Finding | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Units with labels. A unit is a window, or a finding of a patient, which may be seen in several series."""

    name: str
    selection: str
    """In words, for the tables."""
    unit: str
    """What a unit is called."""
    items: list[Item]
    unit_of: np.ndarray
    """int64 (i,): unit of each item; features of a unit's items are averaged."""
    labels: np.ndarray
    """bool (u,)."""
    patients: np.ndarray
    """str (u,)."""
    counts: dict[str, int] = field(default_factory=dict)
    """How it came to these units."""
    aim: float | None = None
    """What predecessors aimed at, to be printed beside; never a pass mark."""

    @property
    def about_findings(self) -> bool:
        return self.unit == "finding"


def check_name(name: str) -> None:
    """UsageError for what cannot be the name of a task, whatever the labels hold."""
    kind, _, rest = name.partition(":")
    rating, _, above = rest.rpartition(":")
    if kind == "rating":
        try:
            if rating and np.isfinite(float(above)):
                return
        except ValueError:
            pass
        raise UsageError(f"--task {name}: write rating:NAME:ABOVE, such as rating:spiculation:3")
    if name not in (*TASKS, DENSE) and not (kind == "label" and rest):
        known = (*TASKS, DENSE, "rating:NAME:ABOVE", "label:NAME")
        raise UsageError(f"--task {name}: unknown{nearest(name, known)}")


def tasks_named(
    name: str, shards: ShardSet, joined: JoinedMarks, findings: Sequence[Finding], patients: set[str]
) -> list[Task]:
    """The tasks of a name: `presence`, `type`, `malignancy` (both selections), `rating:NAME:ABOVE`, `label:NAME`.

    Raises UsageError for a name that is none, ProbeError where the labels hold nothing of the kind.
    """
    if name == "presence":
        return [_presence(shards, joined, patients)]
    if name == "type":
        rule = _above("texture", SOLID_ABOVE, findings)
        return [_of_findings(name, f"solid: median texture above {SOLID_ABOVE:g}; the rest is not", findings, rule)]
    if name == "malignancy":
        return [_malignancy(findings, with_middle) for with_middle in (False, True)]
    check_name(name)
    kind, _, rest = name.partition(":")
    if kind == "rating":
        rating, _, above = rest.rpartition(":")
        threshold = float(above)
        rule = _above(rating, threshold, findings)
        return [_of_findings(name, f"median {rating} above {threshold:g}; the rest is not", findings, rule)]
    known = {label for finding in findings for label in finding.labels}
    if rest not in known:
        raise ProbeError(f"--task {name}: no mark has this label{nearest(rest, sorted(known))}")
    return [_of_findings(name, f"marked as {rest}; other labels are not", findings, lambda one: rest in one.labels)]


def _presence(shards: ShardSet, joined: JoinedMarks, patients: set[str]) -> Task:
    """Windows of volumes that have a mark, WINDOW_EVERY_MM apart: does a mark touch the middle slice?"""
    volumes = [number for number in joined.by_volume if shards.volumes[number].patient in patients]
    if not volumes:
        raise ProbeError("presence: no volume of these patients has a mark")
    table = shards.window_table(np.array(volumes), 1, every_mm=protocol.WINDOW_EVERY_MM)
    numbers, centers, _ = table.locate(np.arange(table.num_windows))
    marked = {number: np.concatenate([mark.slices for mark in joined.by_volume[number]]) for number in volumes}
    labels = [center in marked[number] for number, center in zip(numbers.tolist(), centers.tolist(), strict=True)]
    return Task(
        name="presence",
        selection=f"windows every {protocol.WINDOW_EVERY_MM:g} mm of volumes with marks; positive: a marked slice",
        unit="window",
        items=[Item(number, center) for number, center in zip(numbers.tolist(), centers.tolist(), strict=True)],
        unit_of=np.arange(len(labels)),
        labels=np.array(labels),
        patients=np.array([shards.volumes[number].patient for number in numbers.tolist()]),
        counts={"volumes": len(volumes)},
    )


Rule = Callable[[Finding], bool | None]
"""Whether a finding is positive; None: it is left out."""


def median_of(values: Sequence[float]) -> float | None:
    """The median of readers' ratings (of an even number, the mean of the middle two); None of none."""
    return float(np.median(values)) if len(values) else None


def _above(rating: str, threshold: float, findings: Sequence[Finding]) -> Rule:
    known = {name for finding in findings for name in finding.ratings}
    if rating not in known:
        raise ProbeError(f"no mark of these patients has the rating {rating!r}{nearest(rating, sorted(known))}")

    def rule(finding: Finding) -> bool | None:
        median = median_of(finding.ratings.get(rating, []))
        return None if median is None else median > threshold

    return rule


def merged(findings: Sequence[Finding]) -> dict[tuple[str, int], list[Finding]]:
    """Findings by patient and target: one thing may be seen in several series."""
    by_thing: dict[tuple[str, int], list[Finding]] = defaultdict(list)
    for finding in findings:
        by_thing[finding.patient, finding.target].append(finding)
    return dict(sorted(by_thing.items()))


def _of_findings(name: str, selection: str, findings: Sequence[Finding], rule: Rule) -> Task:
    """A unit for each thing that the rule takes; of one seen in several series, all must say the same."""
    chosen: list[tuple[tuple[str, int], list[Finding], bool]] = []
    left_out = 0
    for thing, parts in merged(findings).items():
        said = {rule(part) for part in parts}
        if len(said) == 1 and (label := said.pop()) is not None:
            chosen.append((thing, parts, label))
        else:
            left_out += 1
    if not chosen:
        raise ProbeError(f"{name}: none of the {left_out} findings of these patients can be told: {selection}")
    return Task(
        name=name,
        selection=selection,
        unit="finding",
        items=[Item(part.volume, part.center, part) for _, parts, _ in chosen for part in parts],
        unit_of=np.repeat(np.arange(len(chosen)), [len(parts) for _, parts, _ in chosen]),
        labels=np.array([label for _, _, label in chosen]),
        patients=np.array([patient for (patient, _), _, _ in chosen]),
        counts={"findings": len(chosen) + left_out, "left_out": left_out},
    )


@dataclass(frozen=True)
class MalignancyCounts:
    """How the findings with at least MALIGNANCY_READERS ratings lie."""

    too_few_readers: int
    below: int
    middle: int
    above: int


def count_malignancy(ratings: Sequence[Sequence[float]]) -> MalignancyCounts:
    """Of findings with these ratings of malignancy each."""
    medians = [median_of(one) for one in ratings if len(one) >= protocol.MALIGNANCY_READERS]
    sides = Counter(np.sign((median or 0.0) - protocol.MALIGNANCY_MIDDLE) for median in medians)
    return MalignancyCounts(len(ratings) - len(medians), sides[-1.0], sides[0.0], sides[1.0])


def _malignancy(findings: Sequence[Finding], with_middle: bool) -> Task:
    middle, readers = protocol.MALIGNANCY_MIDDLE, protocol.MALIGNANCY_READERS

    def rule(finding: Finding) -> bool | None:
        values = finding.ratings.get("malignancy", [])
        if len(values) < readers:
            return None
        median = float(np.median(values))
        return None if median == middle and not with_middle else median > middle

    counted = count_malignancy([one.ratings.get("malignancy", []) for one in findings])
    how = f"median {middle:g} counts as not" if with_middle else f"median {middle:g} left out"
    task = _of_findings(
        "malignancy", f"at least {readers} readers, median malignancy above {middle:g}; {how}", findings, rule
    )
    task.counts.update(
        too_few_readers=counted.too_few_readers,
        median_below=counted.below,
        median_middle=counted.middle,
        median_above=counted.above,
    )
    return Task(**{**vars(task), "aim": protocol.MALIGNANCY_AIM})
