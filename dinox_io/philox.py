"""Random bits by name, and shuffles made of them: the same on every machine and for every version of NumPy.

NumPy promises that the raw bits of a generator never change, and nothing about its shuffles.
"""

from __future__ import annotations

import numpy as np

STREAMS = 16


def philox_bits(seed: int, number: int, stream: int, count: int) -> np.ndarray:
    """uint64 (count,): the random bits of one stream (below 16) of one pass of a seed (below 2**64)."""
    key = np.array([seed, number * STREAMS + stream], np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def shuffled(bits: np.ndarray) -> np.ndarray:
    """uint64 random bits (…, n) -> int64 permutations of 0…n-1 along the last axis.

    The low bits of each key give way to its index: the keys are then distinct, so that any sort gives the same result,
    and sorting values is several times as fast as an argsort.
    """
    count = bits.shape[-1]
    low = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    keys = (bits & ~low) | np.arange(count, dtype=np.uint64)
    keys.sort(axis=-1)
    return (keys & low).astype(np.int64)
