"""`deterministic: true`: the same losses bit for bit on one GPU; slower, and what has no such form is refused by torch.

Our own kernels sum in a fixed order always. Called before the device has done anything: cuBLAS reads its variable once.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

WORKSPACE, FIXED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


def make_deterministic(environment: MutableMapping[str, str] = os.environ) -> str:
    """Set torch and what is below it, for this process; what was set, in words.

    Raises ValueError where the environment asks cuBLAS for a workspace with which sums come in any order.
    """
    given = environment.setdefault(WORKSPACE, FIXED[0])
    if given not in FIXED:
        raise ValueError(
            f"deterministic: {WORKSPACE}={given} lets cuBLAS sum in any order. Unset it, or give {' or '.join(FIXED)}."
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return (
        f"deterministic: torch takes only algorithms that repeat bit for bit, cuDNN too and without trials, "
        f"{WORKSPACE}={given}"
    )
