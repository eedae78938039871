"""Linear layers whose three matrix products each go to the BLAS library that is faster at its layout.

A Linear's products differ in which operand is read along its contraction, and libraries differ in what they are good
at: on Strix Halo hipBLASLt is 2 to 3 times slower than rocBLAS at the weights' gradient, and faster at the others
(TheRock#5314). Which goes where is measured (dinox_train/platform), and handed to `route`.

Where there is nothing to gain, nothing is put on the network: its Linears stay torch's, bit for bit and call by call.

Legend: n rows (all tokens), i input features, o output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LAYOUTS = ("forward", "grad_input", "grad_weight")
"""y = x W^T (BLAS's TN), dx = dy W (NN), dW = dy^T x (NT)."""
LIBRARIES = ("default", "cublas", "cublaslt")
"""By torch's names, on AMD too: there `cublas` is rocBLAS and `cublaslt` hipBLASLt. default: torch's own choice."""


@dataclass(frozen=True, kw_only=True)
class Routes:
    """The library of each product. Raises ValueError for one that is none, naming the nearest."""

    forward: str = "default"
    grad_input: str = "default"
    grad_weight: str = "default"

    def __post_init__(self) -> None:
        from dinox_model.config import nearest

        for layout in LAYOUTS:
            library = getattr(self, layout)
            if library not in LIBRARIES:
                raise ValueError(f"library {library!r} of {layout} is none{nearest(library, LIBRARIES)}")

    @property
    def are_torchs_own(self) -> bool:
        """Nothing is routed."""
        return all(getattr(self, layout) == "default" for layout in LAYOUTS)

    def words(self) -> str:
        """For the log."""
        return ", ".join(f"{layout} {getattr(self, layout)}" for layout in LAYOUTS)


OFF = Routes()


def route(network: nn.Module, routes: Routes) -> int:
    """Have every Linear of `network` go through `linear` with these routes from now on; `OFF` takes it off again.

    Returns how many Linears are routed. Modules that compute otherwise than a plain Linear (a patch embedding) stay as
    they are. Names and values of parameters stay.
    """
    from dinox_model.attention import JoinedLinear

    count = 0
    for module in network.modules():
        if isinstance(module, nn.Linear) and type(module) in (nn.Linear, JoinedLinear):
            vars(module).pop("forward", None)
            if not routes.are_torchs_own:
                # A partial, not a closure: a deep copy of the network then runs its own weights.
                vars(module)["forward"] = partial(_forward, module, routes)
                count += 1
    return count


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, routes: Routes) -> Tensor:
    """x W^T + bias, (…, i) to (…, o), each product by its library; weight (o, i), bias (o,) or None.

    In autocast's dtype where autocast is on, as its reference, F.linear. Raises RuntimeError where dtypes differ
    otherwise.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return linear(x, weight, bias, routes)
    return _linear(x, weight, bias, routes.forward, routes.grad_input, routes.grad_weight)


@torch.library.custom_op("dinox::product", mutates_args=())
def product(a: Tensor, b: Tensor, bias: Tensor | None, library: str) -> Tensor:
    """a b + bias of matrices (m, k) and (k, n), by `library`, one of LIBRARIES. An operator of its own, so that the
    compiler leaves the choice of the library where it is."""
    before = _prefer(library) if library != "default" else None
    try:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    finally:
        if before is not None:
            torch.backends.cuda.preferred_blas_library(before)


@product.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None, library: str) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


@torch.library.custom_op("dinox::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, forward: str, grad_input: str, grad_weight: str) -> Tensor:
    """y = x W^T + b; dx = dy W, dW = dy^T x, db = the sum of dy over rows; a library for each product."""
    y_NO = product(x.reshape(-1, x.shape[-1]), weight.t(), bias, forward)
    return y_NO.view(*x.shape[:-1], weight.shape[0])


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, forward: str, grad_input: str, grad_weight: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, *ctx.libraries = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dy_NO, dx, dw, db = dy.reshape(-1, weight.shape[0]), None, None, None
    to_input, to_weight = ctx.libraries
    if ctx.needs_input_grad[0]:
        dx = product(dy_NO, weight, None, to_input).view(x.shape)
    if ctx.needs_input_grad[1]:
        dw = product(dy_NO.t(), x.reshape(-1, x.shape[-1]), None, to_weight)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        db = dy_NO.sum(0)
    return dx, dw, db, None, None, None


_linear.register_autograd(_backward, setup_context=_keep)


def _prefer(library: str) -> Any:
    """Make it torch's library; what it was before. Host work of about a microsecond, and nothing of the device's."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    return before


def _forward(module: nn.Linear, routes: Routes, input: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(input, module.weight, module.bias if bias is None else bias, routes)
