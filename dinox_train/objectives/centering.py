"""Centering: the teacher's targets as a softmax of logits less their running mean, the alternative to Sinkhorn-Knopp.

    targets_n = softmax((L_n - c) / tau)        c <- m c + (1 - m) mean_n(L_n)

The centre keeps one prototype from taking all samples, the temperature keeps all from being used alike (Caron et al.,
DINO, arXiv 2104.14294, section 3.1, equation 4). The targets of an update are made with the centre that the updates
before it left, so nothing has to be known of the whole batch first. The centre is a state of the run: it goes in and
comes out, and belongs into checkpoints; a masked update must keep the old one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinox_train.objectives.numerics import full_precision
from dinox_train.ranks import AllReduce


@torch.no_grad()
def centred_targets(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Targets (n, K) of teacher logits (n, K) and the centre (K,): rows sum to 1, no gradients; fp32 (fp64 for fp64).

    Raises ValueError where the centre is not of K values.
    """
    if logits.ndim != 2 or centre.shape != logits.shape[1:]:
        raise ValueError(f"logits {tuple(logits.shape)} and centre {tuple(centre.shape)} are not (n, K) and (K,)")
    return torch.softmax((full_precision(logits) - centre) / temperature, dim=1)


@torch.no_grad()
def updated_centre(
    centre: Tensor, logits: Tensor | Sequence[Tensor], momentum: float, *, all_reduce: AllReduce | None = None
) -> Tensor:
    """The centre (K,) after the update whose teacher logits are (n, K), or a list of such pieces (micro-batches).

    Starts as zeros, fp32. With `all_reduce` the mean is that of all ranks' rows, of which each may have another number:
    one sum of K + 1 values. Where no rank has a row the centre stays. Raises ValueError for a momentum outside [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], not {momentum}")
    pieces = [logits] if isinstance(logits, Tensor) else logits
    sums_K, rows = torch.zeros_like(centre), 0
    for piece in pieces:
        sums_K = sums_K + piece.sum(dim=0, dtype=centre.dtype)
        rows += len(piece)
    sums_and_rows = torch.cat((sums_K, torch.full_like(sums_K[:1], rows)))
    if all_reduce is not None:
        sums_and_rows = all_reduce(sums_and_rows, "sum")
    total_rows = sums_and_rows[-1]
    moved = torch.lerp(sums_and_rows[:-1] / total_rows, centre, momentum)
    return torch.where(total_rows > 0, moved, centre)
