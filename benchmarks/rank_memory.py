"""Memory of a rank, by part, when a run is spread over several: what fsdp divides, what it adds, what nothing divides.

    state      weights, gradients, two moments, teachers: 20 bytes a parameter; a rank keeps its part under fsdp
    gathered   groups that fsdp has whole for a while, in use and on their way
    waiting    gradients of the whole backbone: the local views' backward runs first, and autograd keeps what it finds
               until the global views' share of the same weights is there; only then is it scattered
    rest       views, targets, activations, working memory of a micro-batch

Invariant: state, gathered and waiting follow from the number of parameters; the rest is the plan of one process
(dinox_train/plan.py), which has no other model of memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from collective_bytes import BF16, FP32, pieces_of

from dinox_model import ViTConfig
from dinox_model.memory_plan import BACKWARD, GRADIENTS, GRAM_TEACHER, OPTIMIZER, TEACHER, WEIGHTS
from dinox_model.storage_meter import WEIGHT_CASTS
from dinox_train.config import Config
from dinox_train.learner import make_objective, vit_config
from dinox_train.objectives.objective import Objective
from dinox_train.plan import gram_of, memory_of, workload_of
from dinox_train.plan_report import LARGER_BY, RUNTIME_BYTES

STATE = (WEIGHTS, GRADIENTS, OPTIMIZER, TEACHER, GRAM_TEACHER)
STATE_BYTES = 5 * FP32
"""Of a parameter: weight, gradient, two moments, the teacher's weight."""
GATHERED_WEIGHTS, GATHERED_GRADIENTS = 3, 2
"""Groups at a time: in use, on its way, and as it arrived; made, and on its way."""
MOST_RANKS = 1024

Mode = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class RankMemory:
    """Bytes of an update at its peak; see the file's docstring."""

    state: int
    gathered: int
    waiting: int
    rest: int

    def wanted(self, mode: Mode, ranks: int) -> float:
        """By a rank, with what is wanted beyond a plan for kernels and runtime."""
        kept = self.state / ranks + self.gathered if mode == "fsdp" else self.state
        return LARGER_BY * (kept + self.waiting + self.rest) + RUNTIME_BYTES

    def fewest(self, room: float) -> int | None:
        """Ranks of so many bytes each that fsdp needs; None: it does not fit, however many there are."""
        return next((ranks for ranks in range(1, MOST_RANKS) if self.wanted("fsdp", ranks) <= room), None)

    def fewest_of_any(self, room: float) -> int:
        """Ranks that any way of spreading needs, if it divided every byte and gathered none."""
        return max(-(-int(LARGER_BY * (self.state + self.rest)) // int(room - RUNTIME_BYTES)), 1)


def memory_of_rank(config: Config, precision: str, items: Mapping[str, int]) -> RankMemory:
    """Of a rank. items: of its own part of the run in bf16 on fp32 weights (`items_of`). precision: what it runs in,
    bf16, or bf16_weights under fsdp, where weights are gathered, and their gradients wait, in bf16."""
    vit, objective = vit_config(config), make_objective(config)
    pieces = pieces_of(vit, objective, 1)
    backbone = pieces.blocks + pieces.root
    size = BF16 if precision == "bf16_weights" else FP32
    state = STATE_BYTES * (backbone + sum(pieces.heads)) + (FP32 * backbone if gram_of(objective) else 0)
    waits = bool(workload_of(config, vit, objective, 1).local_views)
    rest = sum(size for name, size in items.items() if name not in (*STATE, BACKWARD))
    rest += max(items.get(BACKWARD, 0) - (FP32 * backbone if waits else 0), 0)
    if precision == "bf16_weights":
        rest -= items.get(WEIGHT_CASTS, 0)  # they are the gathered weights
    gathered = (GATHERED_WEIGHTS * size + GATHERED_GRADIENTS * FP32) * pieces.largest
    return RankMemory(state, gathered, size * backbone if waits else 0, rest)


def items_of(config: Config, vit: ViTConfig, objective: Objective) -> dict[str, int]:
    """A plan's items, from networks of 2 and of 4 blocks, as all blocks are alike."""
    few, more = (memory_of(config, replace(vit, num_layers=layers), objective) for layers in (2, 4))
    return {
        name: few.get(name, 0) + (vit.num_layers - 2) * (more.get(name, 0) - few.get(name, 0)) // 2
        for name in {**few, **more}
    }
