"""One task's table: every encoder by every kind of feature and both probes, with intervals, and the curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probing import protocol
from probing.auroc import auroc
from probing.bootstrap import DIGITS, Interval, Resamples
from probing.crossfit import CLASSIFIERS, Scored, Split, crossfit, some_of
from probing.tasks import Task


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What one encoder made of a task."""

    encoder: str
    headline: str
    """The kind of feature whose logistic probe is the encoder's figure."""
    by_kind: dict[str, np.ndarray]
    """float32 (u, d) each."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A figure, itself in every resample, and the pairs that it counts."""

    value: float
    drawn: np.ndarray
    pairs: int

    def interval(self, resamples: Resamples) -> dict[str, Any]:
        """As it stands in probe.json; without bounds where there are too few pairs."""
        found = resamples.interval(self.value, self.drawn)
        return (found if self.pairs >= protocol.PAIRS else Interval(found.value)).json() | {"pairs": self.pairs}


@dataclass(frozen=True, eq=False)
class Rated:
    """AUROC of a row by unit and by patient, in value and in every resample."""

    by_unit: Drawn
    by_patient: Drawn


def make_table(
    task: Task, encoders: Sequence[Features], parts: Sequence[Split], *, tested: str, compare: str, seed: int
) -> dict[str, Any]:
    """The table of a task as it stands in probe.json.

    tested: what the tested patients are, in a word. compare: the encoder that the first one's figure is compared with.
    """
    asked = np.isin(task.patients, sorted(set().union(*[part.test for part in parts])))
    resamples = Resamples(task.patients[asked], seed)
    rows, rated = [], {}
    for one in encoders:
        for kind, features in one.by_kind.items():
            for classifier in CLASSIFIERS:
                scored = crossfit(classifier, features, task.labels, task.patients, parts)
                result = rate(scored, task, resamples)
                is_headline = kind == one.headline and classifier == CLASSIFIERS[0]
                if is_headline:
                    rated[one.encoder] = result
                rows.append(
                    {
                        "encoder": one.encoder,
                        "features": kind,
                        "probe": classifier,
                        "is_headline": is_headline,
                        "auroc_by_unit": result.by_unit.interval(resamples),
                        "auroc_by_patient": result.by_patient.interval(resamples),
                        "unfitted_folds": scored.unfitted,
                    }
                )
    return {
        "task": task.name,
        "selection": task.selection,
        "tested": tested,
        "unit": task.unit,
        "aim": task.aim,
        "counts": {**task.counts, **_counts(task, asked, parts)},
        "rows": rows,
        "difference": _difference(rated, encoders[0].encoder, compare, resamples),
        "curve": _curve(task, encoders, parts, rated, seed),
    }


def _counts(task: Task, asked: np.ndarray, parts: Sequence[Split]) -> dict[str, int]:
    known = np.isin(task.patients, sorted(set().union(*[part.train for part in parts])))
    return {
        "tested_units": int(asked.sum()),
        "tested_positive": int(task.labels[asked].sum()),
        "tested_patients": len(np.unique(task.patients[asked])),
        "training_patients": len(np.unique(task.patients[known])),
        "folds": len(parts),
    }


def rate(scored: Scored, task: Task, resamples: Resamples) -> Rated:
    """The figures of some scores. resamples: of the patients of the tested units, in the order of the task."""
    # Tested units are scored fold by fold; resamples are in the order of the task.
    order = np.argsort(scored.units)
    scores, strata, units = scored.scores[order], scored.strata[order], scored.units[order]
    labels = task.labels[units]
    value = float(auroc(scores, labels, strata)[0])
    names, first, row = np.unique(task.patients[units], return_index=True, return_inverse=True)
    highest = np.full(len(names), -np.inf)
    np.maximum.at(highest, row, scores)
    positive = np.zeros(len(names), bool)
    np.logical_or.at(positive, row, labels)
    of_patient = highest, positive, strata[first]
    return Rated(
        Drawn(value, resamples.of(lambda weights: auroc(scores, labels, strata, weights)), pairs_of(labels, strata)),
        Drawn(
            float(auroc(*of_patient)[0]),
            resamples.of(lambda weights: auroc(*of_patient, weights[:, first])),
            pairs_of(*of_patient[1:]),
        ),
    )


def pairs_of(labels: np.ndarray, strata: np.ndarray) -> int:
    """Pairs of a positive and a negative of one stratum. labels: bool (n,); strata: int (n,)."""
    return sum(int(labels[strata == one].sum() * (~labels[strata == one]).sum()) for one in np.unique(strata))


def _difference(rated: dict[str, Rated], first: str, second: str, resamples: Resamples) -> dict[str, Any] | None:
    """Of two headlines, paired: both figures of a draw are of the same patients."""
    if first not in rated or second not in rated:
        return None
    found: dict[str, Any] = {"of": first, "minus": second}
    for name in ("by_unit", "by_patient"):
        a, b = getattr(rated[first], name), getattr(rated[second], name)
        found[f"auroc_{name}"] = Drawn(a.value - b.value, a.drawn - b.drawn, a.pairs).interval(resamples)
    return found


def _curve(
    task: Task, encoders: Sequence[Features], parts: Sequence[Split], rated: dict[str, Rated], seed: int
) -> list[dict[str, Any]]:
    """Headlines by the share of labelled training patients: those with a unit of the task, of whom draws are made."""
    labelled = frozenset(task.patients.tolist())
    parts = [Split(part.number, part.train & labelled, part.test) for part in parts]
    points = []
    for one in encoders:
        for fraction in protocol.FRACTIONS:
            if fraction == 1:  # every draw is of all patients
                values = [rated[one.encoder].by_unit.value]
            else:
                values = [_drawn(task, one, parts, fraction, draw, seed) for draw in range(protocol.DRAWS)]
            defined = [value for value in values if np.isfinite(value)]
            mean = float(np.mean(defined)) if defined else None
            points.append(
                {
                    "encoder": one.encoder,
                    "fraction": fraction,
                    "draws": [None if not np.isfinite(value) else round(value, DIGITS) for value in values],
                    "mean": None if mean is None else round(mean, DIGITS),
                }
            )
    return points


def _drawn(task: Task, one: Features, parts: Sequence[Split], fraction: float, draw: int, seed: int) -> float:
    features = one.by_kind[one.headline]
    scored = crossfit(CLASSIFIERS[0], features, task.labels, task.patients, parts, some_of(fraction, draw, seed))
    return float(auroc(scored.scores, task.labels[scored.units], scored.strata)[0])


def interval_of(found: dict[str, Any]) -> Interval:
    """The inverse of `Interval.json`."""
    return Interval(found["value"], found["low"], found["high"])
