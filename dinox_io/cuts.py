"""Cuts: which draws of a set's stream make batch p. Pure integer arithmetic, at any p in the same time.

With one set every batch is B draws. In a mixture the weights say how many of a batch come from each set: batch p takes
place i = 0 … B-1 at (i + u_p) / B of the unit interval, which the sets share by weight (systematic sampling), u_p being
a Kronecker sequence. Each set then has floor or ceiling of its share of each batch, and over many batches its share.

Invariant: the draws of all sets add up to B in every batch, and a set's cuts never go back.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Protocol

import numpy as np

_BITS = 40
_UNIT = 1 << _BITS
_STEP = int(0.6180339887498949 * _UNIT) | 1
"""The golden ratio spreads u_p most evenly of all steps (Knuth, TAOCP 3, 6.4); odd, so that no u returns early."""


class Cuts(Protocol):
    """Where batches begin in a stream of draws."""

    longest: int
    """Draws of the longest batch; none is more than one shorter."""
    even: bool
    """Whether all batches have that many."""

    def lengths(self, batches: np.ndarray) -> np.ndarray:
        """int64 (…): draws of these batches."""
        ...

    def starts(self, first: int, count: int) -> np.ndarray:
        """int64 (count + 1,): draws before batches first … first + count."""
        ...

    def batch_at(self, draw: int) -> int:
        """The first batch that begins at `draw` or later."""
        ...


class EvenCuts:
    """Every batch has the same number of draws."""

    even = True

    def __init__(self, batch_size: int) -> None:
        self.longest = batch_size

    def lengths(self, batches: np.ndarray) -> np.ndarray:
        return np.full(np.shape(batches), self.longest, np.int64)

    def starts(self, first: int, count: int) -> np.ndarray:
        return (first + np.arange(count + 1, dtype=np.int64)) * self.longest

    def batch_at(self, draw: int) -> int:
        return -(-draw // self.longest)


class SharedCuts:
    """The cuts of one set of a mixture: the draws that fall between two borders of the unit interval."""

    def __init__(self, batch_size: int, low: Fraction, high: Fraction, offset: int) -> None:
        """low, high: the set's part of the unit interval, 0 <= low < high <= 1. offset: where u begins, any int."""
        self._offset = offset % _UNIT
        # floor(border * batch_size) draws lie below a border in every batch, and one more where u_p is below the rest.
        self._borders = [divmod(int(border * batch_size * _UNIT), _UNIT) for border in (low, high)]
        (low_whole, low_rest), (high_whole, high_rest) = self._borders
        least = high_whole - low_whole - (low_rest > high_rest)
        self.longest = least + (low_rest != high_rest)
        self.even = low_rest == high_rest

    def lengths(self, batches: np.ndarray) -> np.ndarray:
        u = (batches.astype(np.uint64) * np.uint64(_STEP) + np.uint64(self._offset)) & np.uint64(_UNIT - 1)
        (low_whole, low_rest), (high_whole, high_rest) = self._borders
        return (u < high_rest).astype(np.int64) - (u < low_rest) + (high_whole - low_whole)

    def starts(self, first: int, count: int) -> np.ndarray:
        draws = self.lengths(np.arange(first, first + count))
        return np.concatenate([[0], np.cumsum(draws)]) + self._before(first)

    def batch_at(self, draw: int) -> int:
        if draw <= 0:
            return 0
        low, high = 0, 1
        while self._before(high) < draw:
            low, high = high, 2 * high
        while high - low > 1:  # before(low) < draw <= before(high)
            middle = (low + high) // 2
            if self._before(middle) < draw:
                low = middle
            else:
                high = middle
        return high

    def _before(self, batch: int) -> int:
        """Draws of all batches before `batch`."""
        (low_whole, low_rest), (high_whole, high_rest) = self._borders
        return batch * (high_whole - low_whole) + self._below(batch, high_rest) - self._below(batch, low_rest)

    def _below(self, count: int, rest: int) -> int:
        """How many of u_0 … u_(count-1) are below `rest`."""
        beyond = _floor_sum(count, _UNIT, _STEP, self._offset + _UNIT - rest)
        return count - beyond + _floor_sum(count, _UNIT, _STEP, self._offset)


def shared_cuts(batch_size: int, weights: Sequence[float], seed: int) -> list[SharedCuts]:
    """The cuts of each set of a mixture by its weight, all of them > 0 and finite."""
    parts = [Fraction(weight) for weight in weights]
    total = sum(parts)
    borders = [sum(parts[:number], Fraction(0)) / total for number in range(len(parts) + 1)]
    offset = int(np.random.Philox(key=np.array([seed, 1 << 63], np.uint64)).random_raw(1)[0])
    return [SharedCuts(batch_size, low, high, offset) for low, high in pairwise(borders)]


def _floor_sum(count: int, modulus: int, step: int, offset: int) -> int:
    """Sum of floor((step * i + offset) / modulus) for i = 0 … count-1, step and offset >= 0, by Euclid's algorithm."""
    total = 0
    while count:
        total += (count - 1) * count // 2 * (step // modulus) + count * (offset // modulus)
        step, offset = step % modulus, offset % modulus
        last = step * count + offset
        if last < modulus:
            break
        count, offset = divmod(last, modulus)
        modulus, step = step, modulus
    return total
