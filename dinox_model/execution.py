"""How a network runs: eagerly or compiled, keeping its activations or computing them again, with which kernels. The one
place that decides.

Nothing here changes what a network computes, nor the names of its parameters: `prepare` puts another `forward` on the
blocks (or on the network), and `Execution()` takes it off again. Nothing is compiled when a module is imported.

Invariant: a forward has no randomness of its own (`Draws` holds all of it), so recomputing needs no random state and
gives the same activations, bit for bit where the kernels do.

Compiled shapes, the buckets of a run: each size of a view (its tokens) is compiled once, for all blocks together and
for any number of images; so a run with global and local crops holds two graphs, and two more for the teacher, which
runs without gradients. torch specialises further where a count is 1 or 0, or where two counts are equal when a graph is
made: a single image, or drop path that keeps no row, is a graph of its own. A network holds at most 8 graphs, and runs
eagerly beyond them, with a warning from torch; `prepare` forgets the old ones (a new stage with other sizes, say).
TORCH_COMPILE_DISABLE=1 in the environment runs everything eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dinox_model import fields
from dinox_model.fields import Count
from dinox_model.kernels.dispatch import Kernels, is_product
from dinox_model.vit import VisionTransformer


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The choices. Raises ValueError for a value that is none of them, naming the nearest."""

    compile: Literal["off", "blocks", "full"] = "off"
    """blocks: each block by itself, compiled once for all of them (seconds to a minute). full: the whole network as one
    graph; more is fused, and compiling takes longer with every block."""
    checkpointing: Literal["none", "block", "selective"] = "none"
    """What a block keeps for its backward. block: its input alone; the rest is computed again (a third of the forward
    and backward work more). selective: the results of matrix products and attention; only what is cheap is computed
    again."""
    checkpoint_every: Count = 1
    """Checkpoint blocks 0, n, 2n, …: the others keep everything."""

    def __post_init__(self) -> None:
        fields.check(self)

    def num_checkpointed(self, num_layers: int) -> int:
        """How many of `num_layers` blocks are checkpointed."""
        return 0 if self.checkpointing == "none" else len(range(0, num_layers, self.checkpoint_every))


def prepare(network: nn.Module, execution: Execution) -> None:
    """Make `network` run as `execution` says, from now on; what an earlier call had chosen is gone.

    network: a `VisionTransformer`, or another module (a head), which is compiled as a whole unless compile is off, and
    never checkpointed.
    """
    blocks = list(network.blocks) if isinstance(network, VisionTransformer) else []
    for module in (network, *blocks):
        vars(module).pop("forward", None)
    run = _recomputed(execution) if execution.checkpointing != "none" else _run
    plain = _run
    whole = not blocks or execution.compile == "full"
    if execution.compile == "blocks" and blocks:
        # One compiled function for all blocks: the block is an argument, so its weights are inputs of the graph.
        run, plain = _compiled(run), _compiled(_run)
    for number, block in enumerate(blocks):
        chosen = run if number % execution.checkpoint_every == 0 else plain
        if chosen is not _run:
            _put(block, chosen)
    if execution.compile != "off" and whole:
        _put(network, _compiled(_run))


def use(network: nn.Module, kernels: Kernels) -> int:
    """Have the attention and the blocks of `network` run with these kernels from now on; how many modules that are.

    Before `prepare`, where the network is compiled: graphs that are there already hold the kernels of their time.
    """
    modules = [module for module in network.modules() if isinstance(getattr(module, "kernels", None), Kernels)]
    for module in modules:
        module.kernels = kernels  # type: ignore[assignment] # an attribute of Attention and Block, no submodule
    return len(modules)


def _put(module: nn.Module, run: Callable[..., Any]) -> None:
    """Have calls of `module` go through `run`. A partial, not a closure: a deep copy of the module then runs its own
    weights."""
    vars(module)["forward"] = partial(run, module)


def _run(module: nn.Module, *arguments: Any, **named: Any) -> Any:
    """The module's own forward, whatever `prepare` has put on it."""
    return type(module).forward(module, *arguments, **named)


def _run_casting_anew(module: nn.Module, first: Tensor, *arguments: Any) -> Any:
    """`_run` with weights cast again in each call where autocast is on.

    Autocast's memory of casts would make a second forward do less than the first, and its recomputing more than either:
    selective checkpointing counts operations and fails. It would also keep alive what checkpointing is to free.
    """
    device = first.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
        return _run(module, first, *arguments)


def _recomputed(execution: Execution) -> FunctionType:
    kept: dict[str, Any] = {}
    if execution.checkpointing == "selective":
        kept["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)

    def recomputed(module: nn.Module, *arguments: Any) -> Any:
        return checkpoint(_run_casting_anew, module, *arguments, use_reentrant=False, preserve_rng_state=False, **kept)

    return recomputed


def _keep_products(_context: Any, operator: Any, *_arguments: Any, **_named: Any) -> CheckpointPolicy:
    """The policy of selective checkpointing: results of matrix products and attention stay."""
    return CheckpointPolicy.MUST_SAVE if is_product(operator.name()) else CheckpointPolicy.PREFER_RECOMPUTE


def _compiled(run: FunctionType) -> Callable[..., Any]:
    # torch files graphs under a function's code, at most 8 for each, then runs eagerly: so each network has its own.
    own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, run.__defaults__, run.__closure__)
    compiled = torch.compile(own)

    def call(module: nn.Module, first: Tensor, *arguments: Any, **named: Any) -> Any:
        if not torch.compiler.is_compiling():
            _mark_shapes(first, (arguments, named))
        return compiled(module, first, *arguments, **named)

    return call


def _mark_shapes(first: Tensor, others: Any) -> None:
    """Tell the compiler which lengths vary: the number of images and of kept rows. All others make a graph each.

    Without it, the second size of a view would make torch compile once more, for any size, and slower.
    """
    from torch import _dynamo

    num_images = first.shape[0]
    for tensor in (first, *(leaf for leaf in pytree.tree_leaves(others) if isinstance(leaf, Tensor))):
        for axis, length in enumerate(tensor.shape):
            if axis == 0 and (length == num_images or tensor.dtype == torch.int64):
                _dynamo.maybe_mark_dynamic(tensor, axis)
            else:
                _dynamo.mark_static(tensor, axis)
