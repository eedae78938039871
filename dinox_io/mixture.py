"""A mixture: the windows of several sets in one stream of batches, each set with exact epochs of its own.

Invariant: which set a row comes from depends on weights, seed and position alone (cuts.py); what comes of a set is the
stream of its own `Order`, so that adding a set, or changing a weight, reorders no set but its share of each batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dinox_io.cuts import shared_cuts
from dinox_io.order import Order
from dinox_io.permutation import mixed


class Draws(NamedTuple):
    """The rows of one global batch: int64 (b,) each."""

    set: np.ndarray
    window: np.ndarray
    epoch: np.ndarray
    number: np.ndarray
    """Pass of the set's order: with `run` it names a run."""
    run: np.ndarray
    last_batch: np.ndarray
    """As in order.Draw."""


class Mixture:
    """The stream of global batches over one set or several. Not thread-safe."""

    def __init__(
        self,
        windows_per_series: Sequence[np.ndarray],
        weights: Sequence[float],
        *,
        batch_size: int,
        seed: int,
        inflation: int = 1,
        run_length: int = 1,
    ) -> None:
        """
        Args:
            windows_per_series: of each set, int (s,). weights: of each set, > 0; only their ratios matter.
            batch_size: windows of a global batch. seed: 0 <= seed < 2**64.
            inflation: how often an epoch holds each window, >= 1. run_length: windows of a run, 1: no runs.

        Raises:
            ValueError: a set has fewer windows than a batch may take of it, or an argument is impossible.
        """
        if inflation < 1:
            raise ValueError(f"inflation is {inflation}; it must be at least 1")
        check_weights(weights, len(windows_per_series))
        self.batch_size, self._seed, self._inflation = batch_size, seed, inflation
        cuts = [None] if len(weights) == 1 else shared_cuts(batch_size, weights, seed)
        self.orders = [
            Order(sizes, batch_size, _seed_of_set(seed, number), cut, run_length)
            for number, (sizes, cut) in enumerate(zip(windows_per_series, cuts, strict=True))
        ]

    def batch(self, position: int) -> Draws:
        """Global batch `position` >= 0; rows of several sets in an order that is random in each pass of the first."""
        drawn = [order.batch(position) for order in self.orders]
        sets = np.repeat(np.arange(len(drawn)), [len(one.window) for one in drawn])
        window, number, run, last_batch = (np.concatenate(columns) for columns in zip(*drawn, strict=True))
        epoch = number // self._inflation
        draws = Draws(set=sets, window=window, epoch=epoch, number=number, run=run, last_batch=last_batch)
        if len(drawn) == 1:
            return draws
        # As good as the same in all batches of a pass, so that a run's windows stand in one row (order.py).
        turn = np.concatenate([np.arange(len(one.window), dtype=np.uint64) for one in drawn])
        key = mixed(np.array([self._seed], np.uint64) ^ mixed(number[:1].astype(np.uint64)))
        rows = np.argsort(mixed(key ^ mixed((sets.astype(np.uint64) << np.uint64(32)) + turn)))
        return Draws(*(column[rows] for column in draws))


def _seed_of_set(seed: int, number: int) -> int:
    """Each set is shuffled in its own way; the first as if it were alone."""
    return seed if number == 0 else int(mixed(np.array([seed ^ number], np.uint64))[0])


def check_weights(weights: Sequence[float], count: int) -> None:
    """ValueError unless there is one finite weight above 0 for each of `count` sets."""
    if len(weights) != count or not count:
        raise ValueError(f"{len(weights)} weights for {count} sets: each set has one, and there is at least one set")
    bad = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if bad:
        raise ValueError(f"a weight is {bad[0]}; weights are above 0 (leave a set out that is not wanted)")


def temperature_weights(windows: Sequence[int], temperature: float) -> list[float]:
    """Weights n^(1/T) of sets of n windows: T = 1 is proportional to size, a large T gives all sets the same.

    (Conneau et al. 2020, "Unsupervised Cross-lingual Representation Learning at Scale", section 3.1, whose alpha is
    1/T.) ValueError for a T below 1 or a set without windows.
    """
    if not (math.isfinite(temperature) and temperature >= 1) or min(windows, default=0) < 1:
        raise ValueError(f"temperature is {temperature}; it must be at least 1, and every set must have windows")
    return [count ** (1 / temperature) for count in windows]
