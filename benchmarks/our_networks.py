"""Our network as contenders: forward, forward with backward, its parts one by one, and the floor of each.

A part runs by itself on input of its shape, forward or forward and backward; times how often the network has it, it is
a share of the whole. What the parts leave over are views, the engine's own work, and what memory costs between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from matrix_floor import Floor, Tensors
from network_case import Case
from peak_memory import peak_bytes, wait
from timing import Prepared, Setup
from torch import Tensor, nn

from dinox_model import VisionTransformer
from dinox_model.block import Block
from dinox_model.execution import Execution, prepare
from dinox_model.positions import rotate
from dinox_model.workload import grid_of, num_tokens

Pass = Literal["forward", "both"]
PASSES: tuple[Pass, Pass] = ("forward", "both")
NAMES = {"forward": "forward", "both": "forward+backward"}
"""Of passes, in what is printed."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Part:
    """A part of the network, alone."""

    name: str
    count: int
    """How often a forward has it."""
    run: Callable[..., Tensor | Sequence[Tensor]]
    inputs: tuple[Tensor, ...]
    owner: nn.Module | None = None
    """Whose parameters get gradients."""
    floor: Callable[[Floor], None] | None = None
    """Puts its products, if there are any, onto a floor."""


class OurNetwork:
    """The network of a case, ready to run, with gradients that come in."""

    def __init__(self, case: Case, model: VisionTransformer) -> None:
        self.case, self.model, self.x = case, model, case.input()
        self._gradients: list[Tensor] | None = None

    def forward(self) -> float:
        """Without gradients. Returns images."""
        with torch.no_grad(), self.case.autocast():
            self.model(self.x)
        wait(self.case.device)
        return self.case.batch

    def both(self) -> float:
        """Forward, and backward of all tokens. Returns images."""
        self.model.zero_grad(set_to_none=True)
        with self.case.autocast():
            features = self.model(self.x)
        outputs = [part for part in features[:3] if isinstance(part, Tensor)]
        if self._gradients is None:
            self._gradients = [torch.ones_like(part) for part in outputs]
        torch.autograd.backward(outputs, self._gradients)
        wait(self.case.device)
        return self.case.batch

    def memory(self, which: Pass) -> int:
        """Bytes at the peak of a pass that begins without gradients; weights and input included."""
        self.both()  # makes the gradients that come in
        self.model.zero_grad(set_to_none=True)
        peak = peak_bytes(self.both if which == "both" else self.forward, self.case.device, self._held())
        self.model.zero_grad(set_to_none=True)
        return peak

    def _held(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers(), self.x]


def contenders(ours: OurNetwork, which: Pass, compile_blocks: bool) -> dict[str, Setup]:
    """`ours`, `floor` and, if wanted, `ours compiled`. Work: images."""
    case = ours.case
    listed = {
        "ours": _runs(ours.both if which == "both" else ours.forward),
        "floor": lambda: Prepared(_floor_run(case, which, _whole(case), case.batch), {}),
    }
    if compile_blocks:
        listed["ours compiled"] = lambda: _compiled(ours, which)
    return listed


def part_contenders(ours: OurNetwork, which: Pass) -> tuple[dict[str, int], dict[str, Setup]]:
    """Counts by part, and each part's setup, with `floor of PART` where it has products. Work: calls."""
    counts: dict[str, int] = {}
    listed: dict[str, Setup] = {}
    for part in parts(ours):
        counts[part.name] = part.count
        listed[part.name] = _runs(_part_run(ours.case, part, which))
        if part.floor is not None:
            listed[f"floor of {part.name}"] = _runs(_floor_run(ours.case, which, part.floor, 1))
    return counts, listed


def parts(ours: OurNetwork) -> list[Part]:
    """The parts of a forward."""
    case, model = ours.case, ours.model
    config, block = case.config, model.blocks[0]
    assert isinstance(block, Block)
    size, batch = case.size, case.batch
    tokens = num_tokens(config, size)
    wide = torch.float32
    narrow = DTYPES[case.precision]
    x = _random(case, wide, batch, tokens, config.width)
    normed, mixed, residual = (_random(case, narrow, batch, tokens, config.width) for _ in range(3))
    # As the network has them: cut out of one result of three times the width.
    joined = _random(case, narrow, batch, tokens, 3, config.num_heads, config.head_width)
    query, key, value = joined.transpose(1, 3).unbind(2)
    attention, layers = block.attention, config.num_layers
    found = [
        Part("patch embedding", 1, model.patch_embed, (ours.x,), model.patch_embed,
             lambda floor: floor.patch_embed(config, batch, size)),
        Part("norm", 2 * layers + 1, block.norm1, (x,), block.norm1),
        Part("qkv", layers, lambda given: attention.queries_keys_values(given, None), (normed,), attention,
             lambda floor: floor.qkv(config, batch, size)),
        Part("attention", layers, F.scaled_dot_product_attention, (query, key, value), None,
             lambda floor: floor.mixing(config, batch, size)),
        Part("projection", layers, attention.projection, (mixed,), attention.projection,
             lambda floor: floor.projection(config, batch, size)),
        Part("mlp", layers, block.mlp, (normed,), block.mlp, lambda floor: floor.mlp(config, batch, size)),
    ]  # fmt: skip
    if model.rope is not None and config.positions == "rope":
        by = model.rope(grid_of(config, size), case.device)
        found.append(Part("rotation", 2 * layers, lambda given: rotate(given, by), (query,)))
    gamma = block.gamma1
    if gamma is None:
        found.append(Part("residual", 2 * layers, torch.add, (x, residual)))
    else:
        found.append(Part("LayerScale and residual", 2 * layers,
                          lambda given, added: torch.addcmul(given, gamma, added), (x, residual), block))  # fmt: skip
    return found


def _random(case: Case, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=case.device, dtype=dtype)


def _runs(run: Callable[[], float]) -> Setup:
    return lambda: Prepared(run, {})


def _whole(case: Case) -> Callable[[Floor], None]:
    return lambda floor: floor.network(case.config, case.batch, case.size)


def _floor_run(case: Case, which: Pass, fill: Callable[[Floor], None], amount: float) -> Callable[[], float]:
    floor = Floor(Tensors(case.device, DTYPES[case.precision]), backward=which == "both")
    fill(floor)

    def run() -> float:
        floor.run()
        wait(case.device)
        return amount

    return run


def _part_run(case: Case, part: Part, which: Pass) -> Callable[[], float]:
    """One call of a part, with the gradients of its parameters and of its inputs (but for images)."""
    learns = which == "both"
    first = part.name == "patch embedding"
    inputs = [one.detach().requires_grad_(learns and not first) for one in part.inputs]
    wanted = [*([] if first else inputs), *(part.owner.parameters() if part.owner is not None else ())]
    gradients: list[Tensor] = []

    def run() -> float:
        with nullcontext() if learns else torch.no_grad():
            with case.autocast():
                result = part.run(*inputs)
            if learns:
                outputs = [result] if isinstance(result, Tensor) else list(result)
                if not gradients:
                    gradients.extend(torch.randn_like(one) for one in outputs)
                # The parameters of a block that this part does not use have no gradient.
                torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
        wait(case.device)
        return 1.0

    return run


def _compiled(ours: OurNetwork, which: Pass) -> Prepared:
    """The network with its blocks compiled, as `Execution` does it; a network of its own."""
    model = ours.case.model()
    prepare(model, Execution(compile="blocks"))
    network = OurNetwork(ours.case, model)
    return Prepared(network.both if which == "both" else network.forward, {})
