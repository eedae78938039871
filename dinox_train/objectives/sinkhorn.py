"""Sinkhorn-Knopp: the teacher's prototype logits as targets that use all prototypes alike.

Legend: n samples (of this rank), K prototypes, L logits, tau temperature.

A few turns of "every prototype gets the same share of all samples, then every sample's row sums to 1" on exp(L / tau)
(Caron et al., SwAV, arXiv 2006.09882, section 3.1; Cuturi, arXiv 1306.0895). Rows and columns are scaled and nothing
else happens, so the state is two vectors, kept as logarithms:

    targets_nk = exp(L_nk / tau - u_k - v_n)
    u_k = logsumexp_n(L_nk / tau - v_n)        v_n = logsumexp_k(L_nk / tau - u_k)

Nothing overflows for any finite logits, where exp(L / tau) in fp32 ends at L = 3.5 for tau = 0.04. The constants (K and
the number of samples) that the usual form divides by cancel and are left out.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor


class AllReduce(Protocol):
    """A collective: elementwise sum or maximum of all ranks' `values`, the same on every rank."""

    def __call__(self, values: Tensor, operation: Literal["sum", "max"]) -> Tensor: ...


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3, all_reduce: AllReduce | None = None) -> Tensor:
    """Targets of this rank's samples: fp32 (n, K), rows sum to 1, without gradients.

    logits: (n, K), any float dtype; n may differ between ranks. With `all_reduce` the result is that of all ranks'
    samples in one call; it is called twice an iteration, on K values. Prototypes are normalised first and samples last,
    so that rows are exact and columns are balanced as far as `iterations` reach. Logits that are not finite give
    targets that are not.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}: without one, nothing is balanced")
    scaled_NK = logits.float() / temperature
    v_N = torch.zeros_like(scaled_NK[:, 0])
    u_K = _logsumexp_samples(scaled_NK, v_N, all_reduce)
    for _ in range(iterations - 1):
        v_N = torch.logsumexp(scaled_NK - u_K, dim=1)
        u_K = _logsumexp_samples(scaled_NK, v_N, all_reduce)
    return torch.softmax(scaled_NK - u_K, dim=1)  # the last v_N, and the exp, in one


def _logsumexp_samples(scaled_NK: Tensor, v_N: Tensor, all_reduce: AllReduce | None) -> Tensor:
    """u (K,): log of the sum over all ranks' samples of exp(scaled - v)."""
    logs_NK = scaled_NK - v_N[:, None]
    if all_reduce is None:
        return torch.logsumexp(logs_NK, dim=0)
    largest_K = all_reduce(logs_NK.amax(dim=0), "max")
    return largest_K + all_reduce((logs_NK - largest_K).exp_().sum(dim=0), "sum").log()
