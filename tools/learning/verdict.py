"""Figures over seeds: pretrained against random initialisation, and without each term of the loss, with intervals.

A resample draws patients, the same for all networks, and seeds, so that an interval has both kinds of chance in it.
Three seeds are few: their own spread is known roughly at best, which is why every seed is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from probing import protocol
from probing.bootstrap import Resamples
from probing.table import Drawn, rate
from probing.tasks import Task

from learning.plan import ALL
from learning.scores import PIXELS, RANDOM, STATISTICS, Kept


def table_of(task: Task, by_seed: Sequence[dict[str, Kept]], terms: Sequence[str]) -> dict[str, Any]:
    """A task's table as it stands in learn.json. by_seed: scores by network, for each seed."""
    units = np.sort(by_seed[0][ALL][task.name].units)
    resamples = Resamples(task.patients[units], 0)
    rated = [
        {name: rate(kept[task.name], task, resamples).by_unit for name, kept in networks.items()}
        for networks in by_seed
    ]
    picked = protocol.generator(0, "seeds").integers(0, len(rated), (protocol.RESAMPLES, len(rated)))

    def pooled(figures: Sequence[Drawn]) -> dict[str, Any]:
        drawn = np.stack([one.drawn for one in figures])
        value = float(np.mean([one.value for one in figures]))
        spread = np.take_along_axis(drawn.T, picked[: len(drawn.T)], axis=1).mean(axis=1)
        return Drawn(value, spread, figures[0].pairs).interval(resamples)

    def less(one: Drawn, other: Drawn) -> Drawn:
        return Drawn(one.value - other.value, one.drawn - other.drawn, one.pairs)

    gains = [less(networks[ALL], networks[RANDOM]) for networks in rated]
    rows = [
        {
            "network": name,
            "auroc": pooled([networks[name] for networks in rated]),
            "seeds": [round(networks[name].value, 6) for networks in rated],
        }
        for name in (ALL, *(f"without {term}" for term in terms), RANDOM)
    ]
    rows += [
        {"network": name, "auroc": rated[0][name].interval(resamples), "seeds": []} for name in (PIXELS, STATISTICS)
    ]
    gain = pooled(gains)
    return {
        "task": task.name,
        "selection": task.selection,
        "unit": task.unit,
        "counts": {
            "tested_units": len(units),
            "tested_positive": int(task.labels[units].sum()),
            "tested_patients": len(np.unique(task.patients[units])),
        },
        "rows": rows,
        "gain": {"auroc": gain, "seeds": [one.interval(resamples) for one in gains]},
        "terms": [
            {
                "term": term,
                "auroc": pooled([less(networks[ALL], networks[f"without {term}"]) for networks in rated]),
                "seeds": [round(networks[ALL].value - networks[f"without {term}"].value, 6) for networks in rated],
            }
            for term in terms
        ],
        "is_above_its_interval": gain["low"] is not None and gain["low"] > 0,
    }
