"""The frozen probe and each fine-tuning of a task, by the same folds and resamples, and their differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from probing.bootstrap import Resamples
from probing.case import Case
from probing.crossfit import CLASSIFIERS, crossfit
from probing.encoders import Encoder
from probing.features import unit_features
from probing.table import Drawn, rate
from probing.tasks import Task

from dinox_model import VisionTransformer
from tuning.crossfit import Say, tuned_scores
from tuning.recipe import Recipe
from tuning.windows import Windows

FROZEN = "frozen, logistic probe"


def table_of(
    task: Task,
    case: Case,
    model: VisionTransformer,
    encoder: Encoder,
    recipes: Sequence[Recipe],
    seed: int,
    device: str,
    say: Say,
) -> list[dict[str, Any]]:
    """A table for each kind of tested patients."""
    say(f"{task.name}: {len(task.items)} windows ({task.selection})")
    kind = (encoder.finding_features if task.about_findings else encoder.window_features)[0]
    frozen = unit_features(encoder, case.scans, task, recipes[0].batch_size)[kind]
    windows, found = Windows(task, case.scans, model, device), []
    for which in case.tested:
        parts = case.splits(which)
        asked = np.isin(task.patients, sorted(case.tested[which]))
        resamples = Resamples(task.patients[asked], seed)
        scored = {FROZEN: crossfit(CLASSIFIERS[0], frozen, task.labels, task.patients, parts)}
        for recipe in recipes:
            scored[recipe.method] = tuned_scores(
                model, frozen, task, windows, parts, recipe, seed=seed, device=device, say=say
            )
        rated = {name: rate(one, task, resamples) for name, one in scored.items()}
        base = rated[FROZEN]
        rows = []
        for name, one in rated.items():
            row: dict[str, Any] = {"method": name, "unfitted_folds": scored[name].unfitted}
            for by, own, its in (("unit", one.by_unit, base.by_unit), ("patient", one.by_patient, base.by_patient)):
                row[f"auroc_by_{by}"] = own.interval(resamples)
                less = Drawn(own.value - its.value, own.drawn - its.drawn, own.pairs)
                row[f"less_frozen_by_{by}"] = None if name == FROZEN else less.interval(resamples)
            rows.append(row)
        counts = {
            "tested_units": int(asked.sum()),
            "tested_positive": int(task.labels[asked].sum()),
            "tested_patients": len(np.unique(task.patients[asked])),
            "folds": len(parts),
        }
        found.append(
            {"task": task.name, "selection": task.selection, "tested": which, "unit": task.unit, "features": kind}
            | {"counts": counts, "rows": rows}
        )
    return found
