"""Scores of held-out patients' units by each network's frozen probe (docs/evaluation.md), kept one file a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from inference.network import network_of
from probing.case import Case, labels_of, make_case, patients_to_test
from probing.crossfit import CLASSIFIERS, Scored, crossfit
from probing.encoders import Encoder, network_encoder, pixel_encoder, statistics_encoder
from probing.features import unit_features
from probing.pretraining import pretraining_of
from probing.source import open_source
from probing.tasks import Task, tasks_named
from probing.work import untrained

from dinox_io import open_shards
from dinox_io.atomic import write_atomically
from learning.plan import ALL, LABELS, Arm, Settings

RANDOM, PIXELS, STATISTICS = "random initialisation", "raw pixels", "size and intensity"
SIDES, BATCH = ("val",), 8
Kept = dict[str, Scored]
"""By task."""


class Probed:
    """The held-out patients of a folder's set, and what each network makes of them."""

    def __init__(self, settings: Settings, root: Path, arm: Arm) -> None:
        """arm: a run whose pretraining patients are not to be among the tested (all runs share the set).

        Raises RefusedError where they are.
        """
        self._root, folder = root, root / "shards"
        self._shards = open_shards(folder)
        pretraining = pretraining_of(open_source(arm.folder(root)), [folder])
        tested = patients_to_test(self._shards, SIDES, pretraining, allow_seen=False)
        self.case: Case = make_case(self._shards, labels_of(folder, LABELS), tested, held_out=False)
        [self.which] = self.case.tested
        case = self.case
        self.tasks: list[Task] = [
            task
            for name in settings.tasks
            for task in tasks_named(name, self._shards, case.joined, case.findings, case.patients)
        ]

    def close(self) -> None:
        self._shards.close()

    def __enter__(self) -> Probed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of_arm(self, arm: Arm) -> dict[str, Kept]:
        """Scores of its network, by name, and of what stands beside it where it has all terms: the same network
        untrained, and (of seed 0, as no seed is in them) pixels and statistics."""
        model = open_source(arm.folder(self._root)).model
        network = network_of(model, "cpu", "fp32")
        encoders = [network_encoder(arm.name, network)]
        if arm.name == ALL:
            encoders.append(network_encoder(RANDOM, network_of(untrained(model, arm.seed), "cpu", "fp32")))
            if arm.seed == 0:
                encoders += [pixel_encoder(network, model.preprocess), statistics_encoder(network.patch_size)]
        return {encoder.name: self._kept(encoder, arm.seed) for encoder in encoders}

    def _kept(self, encoder: Encoder, seed: int) -> Kept:
        file = self._root / "scores" / f"seed-{seed}-{encoder.name.replace(' ', '-')}.json"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            found = {task.name: self._scored(encoder, task) for task in self.tasks}
            write_atomically(file, json.dumps({name: _as_json(one) for name, one in found.items()}).encode())
        return {name: _from_json(one) for name, one in json.loads(file.read_bytes()).items()}

    def _scored(self, encoder: Encoder, task: Task) -> Scored:
        kind = (encoder.finding_features if task.about_findings else encoder.window_features)[0]
        features = unit_features(encoder, self.case.scans, task, BATCH)[kind]
        return crossfit(CLASSIFIERS[0], features, task.labels, task.patients, self.case.splits(self.which))


def _as_json(one: Scored) -> dict[str, Any]:
    return {
        "units": one.units.tolist(),
        "scores": one.scores.tolist(),
        "strata": one.strata.tolist(),
        "unfitted": one.unfitted,
    }


def _from_json(kept: dict[str, Any]) -> Scored:
    return Scored(
        np.array(kept["units"], np.int64), np.array(kept["scores"], np.float64), np.array(kept["strata"], np.int64),
        kept["unfitted"],
    )  # fmt: skip
