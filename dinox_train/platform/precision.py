"""The precision of matrix products: how the networks are run in it, and whether they really are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinox_model.kernels.dispatch import is_product

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16_weights": torch.bfloat16}
"""By the configuration's `precision`: of matrix products and attention."""


class PrecisionError(RuntimeError):
    """Matrix products run in another dtype than the configuration asks for."""


def product_dtype(precision: str) -> torch.dtype:
    """What matrix products run in. Raises KeyError for another precision than the configuration knows."""
    return _DTYPES[precision]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the networks run: a no-op for fp32, else matrix products in bfloat16.

    Raises KeyError for another precision than the configuration knows.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=product_dtype(precision) == torch.bfloat16)


class MatrixProducts(TorchDispatchMode):
    """Within it, the dtypes of all matrix products and attentions that really run are collected, by operator, and how
    many of `parameters` (matrices) are cast to another dtype on the way.
    """

    def __init__(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.dtypes: Counter[tuple[str, torch.dtype]] = Counter()
        self.casts = 0
        self._matrices = {parameter.data_ptr() for parameter in parameters if parameter.ndim == 2}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0].removeprefix("aten::")
        first: Any = output[0] if isinstance(output, tuple | list) else output
        if is_product(func.name()):
            self.dtypes[name, first.dtype] += 1
        if name == "_to_copy" and first.dtype != args[0].dtype and args[0].data_ptr() in self._matrices:
            self.casts += 1
        return output


def assert_precision(
    network: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    precision: str,
    parameters: Iterable[torch.Tensor],
) -> str:
    """Run `network` on `images` forward and backward, and check the dtype of each matrix product and attention.

    parameters: those that `network` has. Matrices among them are cast on the way in bf16, where they are fp32, and
    never in fp32 and bf16_weights. Returns what was seen, in words. Raises PrecisionError that names the operator and
    its dtype where it is not what `precision` says, or where no product was seen.
    """
    with MatrixProducts(parameters) as products:
        with autocast(images.device, precision):
            output = network(images)
        output.float().sum().backward()
    for (name, dtype), count in products.dtypes.items():
        if dtype != product_dtype(precision):
            raise PrecisionError(f"precision: {precision} was asked for, and {count} {name} run in {dtype}.")
    if not products.dtypes:
        raise PrecisionError("precision: no matrix product was seen; the check has lost sight of the network.")
    if bool(products.casts) != (precision == "bf16"):
        raise PrecisionError(
            f"precision: {precision} was asked for, and {products.casts} weights are cast to another dtype in a "
            "forward: in bf16 all are, in fp32 and bf16_weights none is."
        )
    seen = ", ".join(f"{count} {name}" for (name, _), count in sorted(products.dtypes.items()))
    return f"{seen}; {products.casts} weights cast"
