"""Counts what eager torch moves: bytes of the tensors that each operation reads and writes, views left out."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinox_model.kernels.traffic import Traffic

_FREE = {
    "aten.empty",
    "aten.new_empty",
    "aten.empty_strided",
    "aten.detach",
    "aten.lift_fresh",
    "aten.empty_like",
    "aten._unsafe_view",
}


def eager_traffic(run: Callable[[], object]) -> Traffic:
    """Of all operations of `run`, each on its own: nothing stays in a cache between two of them."""
    counter = _Counter()
    with counter:
        run()
    return counter.traffic


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        if func.is_view or name in _FREE:
            return result
        outputs = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if name in {"aten.copy_", "aten.fill_", "aten.index_copy_"}:
            inputs = inputs[1:]  # what is there is overwritten unread
        if name in {"aten.index", "aten.index_select"}:
            inputs = [*outputs, *inputs[1:]]  # of the first, only what is chosen
        self.traffic += Traffic(_size(inputs), _size(outputs))
        return result


def _size(tensors: list[torch.Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)
