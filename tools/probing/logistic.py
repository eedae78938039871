"""Logistic regression with an L2 penalty, in double precision; C chosen by folds of the training patients.

    minimise over w, b:   sum_i log(1 + exp(-s_i (x_i·w + b))) + |w|² / (2 C),   s_i = ±1

Features are standardised by the training rows; the intercept is not penalised. By Newton's method where that is cheap,
else by L-BFGS (Liu and Nocedal, Mathematical Programming 45 (1989) 503-528): both find the one minimum there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from probing import protocol

ITERATIONS, GRADIENT, HALVINGS = 200, 1e-6, 40
NEWTON_COST = 2e8
"""Rows times squared unknowns, up to which Newton's method is taken."""


@dataclass(frozen=True)
class LogisticProbe:
    """A fitted probe."""

    mean: np.ndarray
    std: np.ndarray
    coefficients: np.ndarray
    """float64 (d,), of standardised features."""
    intercept: float

    def scores(self, features: np.ndarray) -> np.ndarray:
        """float64 (n,): log-odds of rows (n, d)."""
        return ((features - self.mean) / self.std) @ self.coefficients + self.intercept


def fit(features: np.ndarray, labels: np.ndarray, strengths: tuple[float, ...]) -> list[LogisticProbe]:
    """A probe for each C, ascending. features: float64 (n, d); labels: bool (n,), both classes among them."""
    mean, std = features.mean(axis=0), features.std(axis=0)
    # A feature that never varies says nothing; rounding must not be blown up into something that does.
    std = np.where(std > 1e-6 * np.maximum(np.abs(mean), 1e-6), std, np.inf)
    x, y = (features - mean) / std, labels.astype(np.float64)
    rank = min(x.shape)
    if len(x) * rank**2 > NEWTON_COST:
        found = by_lbfgs(x, y, strengths)
    elif len(x) < x.shape[1]:
        # The penalty keeps the coefficients within the span of the rows: as many unknowns as rows are enough.
        rotated, lengths, axes = np.linalg.svd(x, full_matrices=False)
        small = by_newton(rotated * lengths, y, strengths)
        found = np.column_stack([small[:, :-1] @ axes, small[:, -1]])
    else:
        found = by_newton(x, y, strengths)
    return [LogisticProbe(mean, std, weights[:-1], float(weights[-1])) for weights in found]


def by_newton(x: np.ndarray, y: np.ndarray, strengths: tuple[float, ...]) -> np.ndarray:
    """float64 (c, d + 1): coefficients and intercept for each C, by Newton's method with steps that are halved until
    they lower the objective. For small problems: each step solves d + 1 equations."""
    rows = np.column_stack([x, np.ones(len(x))])
    penalty = np.outer(1 / np.array(strengths), np.r_[np.ones(x.shape[1]), 0.0])
    weights = np.tile(_start(x, y), (len(strengths), 1))

    def objective(weights: np.ndarray) -> np.ndarray:
        return np.logaddexp(0, -(2 * y - 1) * (weights @ rows.T)).sum(axis=1) + (penalty * weights**2).sum(axis=1) / 2

    value = objective(weights)
    for _ in range(ITERATIONS):
        chance = _sigmoid(weights @ rows.T)
        gradient = (chance - y) @ rows + penalty * weights
        moving = np.abs(gradient).max(axis=1, keepdims=True) >= GRADIENT
        if not moving.any():
            break
        curvature = (rows.T[None] * (chance * (1 - chance))[:, None]) @ rows
        curvature[:, range(rows.shape[1]), range(rows.shape[1])] += penalty + 1e-10
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        length = moving.astype(np.float64)
        for _ in range(HALVINGS):
            lowered = objective(weights - length * step)
            worse = lowered > value
            if not worse.any():
                break
            length[worse] /= 2
        else:
            break  # as low as rounding lets it be
        weights, value = weights - length * step, lowered
    return weights


def by_lbfgs(x: np.ndarray, y: np.ndarray, strengths: tuple[float, ...]) -> np.ndarray:
    """The same by L-BFGS, each C from the coefficients of the one before. For large problems."""
    rows, wanted = torch.from_numpy(x), torch.from_numpy(y)
    weights, found = torch.from_numpy(_start(x, y)), []
    for strength in strengths:
        weights = _minimise(rows, wanted, strength, weights)
        found.append(weights.numpy())
    return np.stack(found)


def _start(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    share = y.mean()
    return np.r_[np.zeros(x.shape[1]), np.log(share / (1 - share))]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _minimise(x: Tensor, y: Tensor, strength: float, start: Tensor) -> Tensor:
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=ITERATIONS, history_size=10, tolerance_grad=GRADIENT, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ weights[:-1] + weights[-1], y, reduction="sum")
        value = value + weights[:-1].square().sum() / (2 * strength)
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def choose_strength(features: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> float:
    """The C with the smallest log-loss on rows held out by their folds; of equals the smaller.

    Where no fold leaves both classes to train on, STRENGTH_UNCHOSEN. folds: int (n,), those of the rows' patients.
    """
    losses = np.zeros(len(protocol.STRENGTHS))
    usable = False
    for fold in np.unique(folds):
        held_out = folds == fold
        if held_out.all() or labels[~held_out].all() or not labels[~held_out].any():
            continue
        usable = True
        sign = np.where(labels[held_out], 1.0, -1.0)
        probes = fit(features[~held_out], labels[~held_out], protocol.STRENGTHS)
        losses += [np.logaddexp(0, -sign * probe.scores(features[held_out])).sum() for probe in probes]
    return protocol.STRENGTHS[int(np.argmin(losses))] if usable else protocol.STRENGTH_UNCHOSEN


def logistic_scores(known: np.ndarray, labels: np.ndarray, folds: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """float64 (m,): log-odds of rows (m, d) by a probe of the known rows (n, d). Zeros where those are of one class."""
    if labels.all() or not labels.any():
        return np.zeros(len(asked))
    known, asked = known.astype(np.float64), asked.astype(np.float64)
    [probe] = fit(known, labels, (choose_strength(known, labels, folds),))
    return probe.scores(asked)
