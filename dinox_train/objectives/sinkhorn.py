"""Sinkhorn-Knopp: the teacher's prototype logits as targets that use all prototypes alike.

Legend: n samples (of this rank), K prototypes, L logits, tau temperature.

A few turns of "every prototype gets the same share of all samples, then every sample's row sums to 1" on exp(L / tau)
(Caron et al., SwAV, arXiv 2006.09882, section 3.1; Cuturi, arXiv 1306.0895). Rows and columns are scaled and nothing
else happens, so the state is two vectors, kept as logarithms:

    targets_nk = exp(L_nk / tau - u_k - v_n)
    u_k = logsumexp_n(L_nk / tau - v_n)        v_n = logsumexp_k(L_nk / tau - u_k)

v_n needs its own row only, so u (K numbers) is all that one sample must know of the others: `prototype_potential` finds
it, and `balanced_targets` makes the targets of any rows of it when they are needed. Nothing overflows for any finite
logits, where exp(L / tau) in fp32 ends at L = 3.5 for tau = 0.04. The constants (K and the number of samples) that the
usual form divides by cancel and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dinox_train.objectives.numerics import full_precision
from dinox_train.ranks import AllReduce

_CHUNK_VALUES = 1 << 24  # logits in work at a time; fixed, so that rounding never depends on the free memory


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3, all_reduce: AllReduce | None = None) -> Tensor:
    """Targets of this rank's samples: (n, K), rows sum to 1, without gradients; fp32 (fp64 for fp64 logits).

    logits: (n, K), any float dtype; n may be 0, and differ between ranks. Prototypes are normalised first and samples
    last, so that rows are exact and columns are balanced as far as `iterations` reach. Logits that are not finite give
    targets that are not.
    """
    potential = prototype_potential(logits, temperature, iterations, all_reduce=all_reduce)
    return balanced_targets(logits, potential, temperature)


@torch.no_grad()
def prototype_potential(
    logits: Tensor | Sequence[Tensor],
    temperature: float,
    iterations: int = 3,
    *,
    all_reduce: AllReduce | None = None,
) -> Tensor:
    """u of the file's docstring: (K,), fp32 (fp64 for fp64 logits), without gradients.

    logits: (n, K), or a list of such pieces (micro-batches, which are one batch here and are not copied together).
    Beyond the logits it takes memory for a fixed number of values. With `all_reduce` the result is that of
    all ranks' samples in one call: in each iteration the ranks agree on the maximum of their logsumexp (K values), then
    add up exp(logsumexp - maximum) (K values), since a sum alone can neither be of logarithms nor shifted safely.
    Raises ValueError for less than one iteration, and for pieces that do not fit together.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}: without one, nothing is balanced")
    pieces = [logits] if isinstance(logits, Tensor) else list(logits)
    _check(pieces)
    potential_K = None
    for _ in range(iterations):
        sums = [_log_column_sums(chunk, potential_K, temperature) for chunk in _chunks(pieces)]
        potential_K = logsumexp_over_ranks(torch.logsumexp(torch.stack(sums), dim=0), all_reduce)
    assert potential_K is not None
    return potential_K


@torch.no_grad()
def balanced_targets(logits: Tensor, potential: Tensor, temperature: float) -> Tensor:
    """Targets of some rows of what `potential` (K,) was found for: (n, K), each row sums to 1, without gradients.

    logits: (n, K), any float dtype; n may be 0.
    """
    return torch.softmax(full_precision(logits) / temperature - potential, dim=1)  # v, and the exp, in one


def _log_column_sums(chunk_NK: Tensor, potential_K: Tensor | None, temperature: float) -> Tensor:
    """This chunk's part of the next u; the turn's v is made on the way. -inf where there is no row."""
    logs_NK = full_precision(chunk_NK) / temperature
    if potential_K is not None:
        logs_NK = logs_NK - torch.logsumexp(logs_NK - potential_K, dim=1, keepdim=True)
    return torch.logsumexp(logs_NK, dim=0)


def logsumexp_over_ranks(logs_K: Tensor, all_reduce: AllReduce | None) -> Tensor:
    """log of the sum of exp(logs_K) over the ranks, (K,); some of them, not all, may have -inf."""
    if all_reduce is None:
        return logs_K
    largest_K = all_reduce(logs_K, "max")
    return largest_K + all_reduce((logs_K - largest_K).exp(), "sum").log()


def _chunks(pieces: Sequence[Tensor]) -> Iterator[Tensor]:
    rows = max(1, _CHUNK_VALUES // max(1, pieces[0].shape[1]))
    for piece in pieces:
        yield from piece.split(rows)


def _check(pieces: Sequence[Tensor]) -> None:
    shapes = [tuple(piece.shape) for piece in pieces]
    if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
        raise ValueError(f"logits: found shapes {shapes}, needed at least one (n, K), K the same in all")
