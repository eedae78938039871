"""Keyed randomness: numbers that are a function of (seed, stream, position, row, view), whoever asks, in any order.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11): a block cipher of a
128-bit counter under a 64-bit key. The key is hashed from (seed, stream), the counter holds where in training we are:

    word 0: view (upper half), block (lower half)   word 1: row   words 2, 3: position

Invariant: a value depends on its own coordinates only. How a batch is cut into rows, micro-batches or ranks, and which
other streams are drawn from, changes nothing; another position (so another epoch) gives other numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)
_DOUBLES_PER_BLOCK = 2


def uniform(seed: int, stream: str, position: int, rows: np.ndarray, views: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) with 53 random bits: float64 (b, views, count).

    seed: any integer; stream: names what the numbers are for, so that different uses are independent; position: number
    of the global batch, 0 <= position < 2^64; rows: integers (b,), each window's place in the global batch, in any
    order, below 2^32; views below 2^16, count below 2^17: more of either leaves the first ones as they are.
    Raises ValueError for coordinates that the counter cannot hold: they would silently repeat others.
    """
    rows = np.asarray(rows)
    blocks = -(-count // _DOUBLES_PER_BLOCK)
    _check_coordinates(position, rows, views, blocks)
    counter = np.empty((len(rows), views, blocks, 4), np.uint32)
    counter[..., 0] = (np.arange(views, dtype=np.uint32) << np.uint32(16))[:, None] | np.arange(blocks, dtype=np.uint32)
    counter[..., 1] = rows.astype(np.uint32)[:, None, None]
    counter[..., 2] = position & 0xFFFFFFFF
    counter[..., 3] = position >> 32
    words = philox4x32(counter, _key(seed, stream)).astype(np.uint64)
    high, low = words[..., 0::2] >> np.uint64(5), words[..., 1::2] >> np.uint64(6)  # 27 + 26 = 53 bits
    doubles = (high * np.uint64(2**26) + low).astype(np.float64) * 2.0**-53
    return doubles.reshape(len(rows), views, blocks * _DOUBLES_PER_BLOCK)[..., :count]


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32 on each counter: uint32 (..., 4) to uint32 (..., 4). key: two 32-bit words."""
    c0, c1, c2, c3 = (counter[..., word].astype(np.uint64) for word in range(4))
    for turn in range(_ROUNDS):
        k0, k1 = (np.uint64((word + turn * step) & 0xFFFFFFFF) for word, step in zip(key, _KEY_STEPS, strict=True))
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _WORD_BITS) ^ c1 ^ k0,
            product1 & _LOW_WORD,
            (product0 >> _WORD_BITS) ^ c3 ^ k1,
            product0 & _LOW_WORD,
        )
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def _key(seed: int, stream: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}:{stream}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _check_coordinates(position: int, rows: np.ndarray, views: int, blocks: int) -> None:
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"rows must be integers (b,), not {rows.dtype} {rows.shape}")
    if not 0 <= position < 2**64:
        raise ValueError(f"position must be in [0, 2^64), not {position}")
    if len(rows) and not (rows.min() >= 0 and rows.max() < 2**32):
        raise ValueError(f"rows must be in [0, 2^32), but reach from {rows.min()} to {rows.max()}")
    if not (0 <= views < 2**16 and 0 <= blocks < 2**16):
        raise ValueError(
            f"at most 65535 views and 131070 numbers a view, not {views} views and {blocks} pairs of numbers"
        )
