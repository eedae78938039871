"""Permutations of 0 … n-1 that are evaluated where they are needed, without a table: n may be a billion.

Invariant: for one key and size it is a bijection, the same on every machine and for every version of NumPy.

A balanced Feistel network (Luby and Rackoff 1988) over the smallest even number of bits that holds n, walked until
the value lies below n again (cycle walking; Black and Rogaway 2002): at most 4 steps on average. Its round function
is the finalizer of SplitMix64 (Steele, Lea and Flood 2014) over half the bits, the key and the round.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_KEYS = np.arange(6, dtype=np.uint64) * _GOLDEN
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)


def mixed(value: np.ndarray) -> np.ndarray:
    """uint64 (…) -> uint64 (…): a bijection whose output bits each depend on all input bits."""
    value = value + _GOLDEN
    value = (value ^ (value >> _30)) * _MIX_1
    value = (value ^ (value >> _27)) * _MIX_2
    return value ^ (value >> _31)


def permuted(index: np.ndarray | int, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """int64 (…): where the permutation of 0 … size-1 that `key` names puts `index`.

    Args:
        index: int (…), 0 <= index < size.
        size, key: one for all, or one for each element (broadcast against index); 0 < size <= 2**62, key any uint64.
    """
    arrays = np.broadcast_arrays(np.asarray(index, np.uint64), np.asarray(size, np.uint64), np.asarray(key, np.uint64))
    shape = arrays[0].shape
    index, size, key = (array.ravel() for array in arrays)
    half, key = _half_bits(size), mixed(key)  # keys that differ in one bit must not give networks that are alike
    value = _network(index, half, key)
    outside = np.flatnonzero(value >= size)
    while len(outside):
        value[outside] = _network(value[outside], half[outside], key[outside])
        outside = outside[value[outside] >= size[outside]]
    return value.reshape(shape).astype(np.int64)


def _half_bits(size: np.ndarray) -> np.ndarray:
    """uint64 (…): half of the bits of the network, at least 1; exact, so no logarithm."""
    bits = np.zeros(size.shape, np.uint64)
    rest = size - np.uint64(1)
    for shift in (32, 16, 8, 4, 2, 1):
        large = rest >> np.uint64(shift) > 0
        bits[large] += np.uint64(shift)
        rest = np.where(large, rest >> np.uint64(shift), rest)
    bits += rest > 0
    return np.maximum((bits + np.uint64(1)) >> np.uint64(1), np.uint64(1))


def _network(value: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for round_key in _ROUND_KEYS:
        left, right = right, left ^ (mixed((key + round_key) ^ right) & mask)
    return (left << half) | right
