"""Scores of units by networks that were fine-tuned without their patients: one a fold, from the same weights each.

Invariant: what a network is tuned on, and its head's beginning, come from the training patients of its split alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from probing import protocol
from probing.crossfit import Scored, Split
from probing.logistic import LogisticProbe, choose_strength, fit
from probing.tasks import Task

from dinox_model import VisionTransformer
from dinox_train.optimizer import set_group_values
from dinox_train.schedule import learning_rate
from tuning.recipe import Recipe, Tuned, optimizer_of, tuned
from tuning.windows import Windows

Say = Callable[[str], None]


def tuned_scores(
    model: VisionTransformer,
    frozen: np.ndarray,
    task: Task,
    windows: Windows,
    parts: Sequence[Split],
    recipe: Recipe,
    *,
    seed: int,
    device: str,
    say: Say,
) -> Scored:
    """Every tested unit once. frozen: float32 (u, d), each unit's feature before tuning, that the head begins on."""
    units, scores, strata, unfitted = [], [], [], 0
    for part in parts:
        known, asked = (np.isin(task.patients, sorted(who)) for who in (part.train, part.test))
        if not asked.any():
            continue
        asked_units = np.flatnonzero(asked)
        units.append(asked_units)
        strata.append(np.full(len(asked_units), part.number))
        if len(np.unique(task.labels[known])) < 2:
            unfitted += 1
            scores.append(np.zeros(len(asked_units)))
            continue
        probe = probe_of(frozen[known], task.labels[known], task.patients[known])
        torch.manual_seed(protocol.place("", seed, "tuning", part.number) % 2**31)  # adapters begin at random
        network = tuned(copy.deepcopy(model), probe, recipe).to(device)
        random = protocol.generator(seed, "tuning", part.number)
        train(network, task, windows, np.flatnonzero(known[task.unit_of]), recipe, random)
        scores.append(score(network, task, windows, asked_units, recipe.batch_size))
        say(f"  {recipe.method}: fold {part.number}")
    return Scored(np.concatenate(units), np.concatenate(scores), np.concatenate(strata), unfitted)


def probe_of(features: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> LogisticProbe:
    """The probe of docs/evaluation.md."""
    rows = features.astype(np.float64)
    folds = np.array([protocol.fold_of(patient) for patient in patients])
    [probe] = fit(rows, labels, (choose_strength(rows, labels, folds),))
    return probe


def train(
    network: Tuned, task: Task, windows: Windows, items: np.ndarray, recipe: Recipe, random: np.random.Generator
) -> None:
    """Logistic loss over the items' windows, each with the label of its unit."""
    optimizer, labels = optimizer_of(network, recipe), torch.from_numpy(task.labels.astype(np.float32))
    learning = [one for one in network.parameters() if one.requires_grad]
    warmup = max(1, round(recipe.warmup_share * recipe.steps))
    network.train()
    for index, batch in enumerate(windows.drawn(items, recipe.batch_size, recipe.steps, random)):
        rate = learning_rate(index, recipe.steps, peak=recipe.learning_rate, final=0.0, warmup=warmup)
        set_group_values(optimizer, rate, recipe.weight_decay)
        wanted = labels[task.unit_of[batch.items]].to(batch.hu.device)
        loss = F.binary_cross_entropy_with_logits(network(batch.hu, batch.spacing_mm, batch.shares), wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, recipe.clip_norm)
        optimizer.step()


def score(network: Tuned, task: Task, windows: Windows, units: np.ndarray, batch_size: int) -> np.ndarray:
    """float64 (t,): the mean log-odds of the items of each of these units."""
    sums, counts = np.zeros(len(task.labels)), np.bincount(task.unit_of, minlength=len(task.labels))
    network.eval()
    with torch.no_grad():
        for batch in windows.in_order(np.flatnonzero(np.isin(task.unit_of, units)), batch_size):
            found = network(batch.hu, batch.spacing_mm, batch.shares).double().cpu().numpy()
            np.add.at(sums, task.unit_of[batch.items], found)
    return (sums / counts)[units]
