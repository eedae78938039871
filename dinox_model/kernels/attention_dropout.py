"""Which attention weights dropout keeps, in plain torch: the twin of the kernels' generator.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11), Philox 4x32 with 7 rounds, key = seed,
counter = (key's place, query's place, sequence · heads + head, 0). Invariant: a weight's fate depends on nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_WORD = 0xFFFFFFFF


def drop_below(dropout: float) -> int:
    """A weight is dropped where its 31 random bits are below this."""
    return min(round(dropout * 2**31), 2**31 - 1)


def kept_weights(
    seed: Tensor | int, dropout: float, sequence: int, num_heads: int, num_tokens: int, device: torch.device
) -> Tensor:
    """bool (a, t, t), a row for each query: the weights of sequence number `sequence` that stay."""
    key = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(())
    place = torch.arange(num_tokens, dtype=torch.int64, device=device)
    heads = sequence * num_heads + torch.arange(num_heads, dtype=torch.int64, device=device)
    counter = (place[None, None, :], place[None, :, None], heads[:, None, None], torch.zeros_like(key))
    bits = philox(key, counter, ROUNDS)[0]
    return bits >> 1 >= drop_below(dropout)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor], rounds: int) -> tuple[Tensor, ...]:
    """Four random words of 32 bits for each counter, as int64; seed int64 (64 bits), counters below 2^32, broadcast."""
    first, second, third, fourth = counter
    low, high = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        high_a, low_a = _product(0xD2511F53, first)
        high_b, low_b = _product(0xCD9E8D57, third)
        first, second, third, fourth = high_b ^ second ^ low, low_b, high_a ^ fourth ^ high, low_a
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return first, second, third, fourth


def _product(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor · words, without leaving int64."""
    upper, lower = (words >> 16) * factor, (words & 0xFFFF) * factor
    high = (upper + (lower >> 16)) >> 16
    return high, (((upper & 0xFFFF) << 16) + lower) & _WORD
