"""Triton, where it is installed; the one place that imports it.

Where it is missing, files of kernels can be imported all the same: `kernel` then leaves a `MissingKernel`, which says
what to install when it is launched. Triton reads TRITON_INTERPRET when a kernel is defined, so one process either
compiles kernels (GPU) or interprets them (CPU, slow, for tests).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without Triton: the references run
    triton = None
    tl: Any = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Kernels run in Triton's interpreter, on CPU tensors."""


class MissingKernel:
    """Stands where a Triton kernel would, in an environment without Triton."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = function

    def __getitem__(self, grid: object) -> Callable[..., Any]:
        raise RuntimeError(
            f"kernel {self.fn.__name__}: Triton is not installed. Install the extra [kernels] (a GPU build of torch "
            "brings its own), or set kernels=reference."
        )


def kernel(function: Callable[..., Any], *, do_not_specialize: tuple[str, ...] = ()) -> Any:
    """`triton.jit`, or a `MissingKernel`. Never an autotuner: tiles are arguments.

    do_not_specialize: integers whose values (1, multiples of 16) make no variants of their own, to be compiled apart.
    """
    return MissingKernel(function) if triton is None else triton.jit(do_not_specialize=do_not_specialize)(function)


def can_run_on(device: torch.device) -> bool:
    """Whether Triton kernels can be launched on tensors of `device` in this process."""
    if triton is None:
        return False
    return INTERPRETED if device.type == "cpu" else device.type == "cuda" and not INTERPRETED
