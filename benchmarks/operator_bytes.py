"""Bytes that operators read and write: in eager torch, where each operator is a pass over its tensors, and in the loops
that torch.compile plans for the same work. Counted, not measured; no kernel is compiled.

Invariant: views move nothing, and what a plan keeps in registers counts in neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Work = Callable[..., Tensor | Sequence[Tensor]]


def eager_bytes(work: Work, inputs: Sequence[Tensor], *, backward: bool) -> int:
    """Read and written by the operators of `work`, and of its backward from gradients of ones."""
    counter = _Counter()
    _run(work, inputs, backward, counter)
    return counter.bytes


def planned_bytes(work: Work, inputs: Sequence[Tensor], *, backward: bool) -> int:
    """The same in Inductor's plan for this device: its own count for each loop and each operator it leaves as it is.

    A floor of what it moves: a tensor counts once for a loop that reads it twice (a softmax: maximum, then sum).
    """
    from torch._inductor.compile_fx import compile_fx

    total = 0

    def count(graph: torch.fx.GraphModule, examples: Sequence[Any], **_: Any) -> Callable[..., Any]:
        nonlocal total
        total += _plan_bytes(graph, examples)
        return _boxed(graph.forward)

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        return compile_fx(graph, examples, inner_compile=count)  # type: ignore[arg-type] # makes no CompiledFxGraph

    torch._dynamo.reset()
    _run(torch.compile(work, backend=backend, fullgraph=True), inputs, backward, nullcontext())
    torch._dynamo.reset()
    return total


def _run(work: Work, inputs: Sequence[Tensor], backward: bool, watched: AbstractContextManager[object]) -> None:
    """`work` and its backward, watched; what is made for them is not."""
    leaves = [x.detach().clone().requires_grad_(backward and x.is_floating_point()) for x in inputs]
    with watched:
        made = work(*leaves)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    if backward:
        gradients = [torch.ones_like(one) for one in outputs]
        with watched:
            torch.autograd.backward(outputs, gradients)


def _plan_bytes(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> int:
    from torch._inductor.compile_fx import record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    record_original_output_strides(graph)
    lowered = GraphLowering(graph)
    with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
        lowered.run(*examples)
        lowered._update_scheduler()
        return int(lowered.count_bytes()[0])


def _boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(arguments: list[Any]) -> Any:
        taken = list(arguments)
        arguments.clear()
        return function(*taken)

    call._boxed_call = True  # type: ignore[attr-defined] # how AOTAutograd hands over a list that it then lets go
    return call


class _Counter(TorchDispatchMode):
    """Adds up bytes of tensors in and out of every operator that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        made = function(*arguments, **(named or {}))
        if not _moves_nothing(function):
            self.bytes += sum(map(_size, _tensors((arguments, named)))) + sum(map(_size, _tensors(made)))
        return made


def _moves_nothing(function: Any) -> bool:
    return (
        function.is_view
        or function.namespace == "prim"
        or "empty" in function.__name__
        or "detach" in function.__name__
    )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
