"""What the ranks of a run send each other in one update, counted from its configuration: no network has values, and
nothing is sent.

    ddp    the student's gradients are added up once an update, whatever the number of micro-batches
    fsdp   each rank keeps a part of every parameter: a block's weights are gathered before each forward and each
           backward that reads them, and its gradients scattered once a micro-batch
    both   what an objective must know of the whole batch, and small sums

Invariant: `Collective.bytes` are those of whole tensors; what a rank sends of them depends on the algorithm, which is
the ring's (a rank sends, and receives, ranks - 1 pieces of 1 / ranks in a gather or scatter, twice as many in a sum).
It is the least for sums of many bytes, and the same for every link of the ring, however many ranks share a machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dinox_model import VisionTransformer, ViTConfig
from dinox_train.config import Config
from dinox_train.learner import make_objective, vit_config
from dinox_train.objectives.dinov3 import DINOv3
from dinox_train.objectives.objective import Objective
from dinox_train.plan import gram_of, heads_of, workload_of
from dinox_train.view_batch import NUM_GLOBAL

BUCKET_BYTES = 25 << 20
"""Of gradients that ddp adds up at a time (torch's default)."""
FP32, BF16 = 4, 2

Behind = Literal["backward", "compute", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of collective of an update."""

    what: str
    operation: Literal["sum", "gather", "scatter"]
    count: int
    """How often it is called in an update."""
    bytes: int
    """Of the whole tensors, all calls together."""
    behind: Behind
    """What of the update it can hide behind: the last micro-batch's backward, all its work, or nothing, since the rest
    waits for it."""

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in an update, and receives meanwhile."""
        return self._turns * self.bytes * (ranks - 1) / ranks

    def hops(self, ranks: int) -> int:
        """Messages that follow one another."""
        return self._turns * self.count * (ranks - 1)

    @property
    def _turns(self) -> int:
        return 2 if self.operation == "sum" else 1


@dataclass(frozen=True)
class Pieces:
    """Numbers of a network as fsdp gathers it, padded so that each rank has as many rows of every parameter."""

    blocks: int
    """Of all blocks together."""
    num_blocks: int
    root: int
    """What is in no block: embedding, tokens, last norm."""
    heads: tuple[int, ...]

    @property
    def largest(self) -> int:
        """Of what is gathered at a time."""
        return max(self.blocks // self.num_blocks, self.root, *self.heads)


def pieces_of(vit: ViTConfig, objective: Objective, ranks: int) -> Pieces:
    """The groups that `fully_shard` is called on: each block, each head, and the rest of the backbone."""
    with torch.device("meta"):
        backbone = VisionTransformer(vit)
    blocks = _padded(backbone.blocks.parameters(), ranks)
    heads = tuple(_padded(head.parameters(), ranks) for head in heads_of(objective, vit).values())
    return Pieces(blocks, len(backbone.blocks), _padded(backbone.parameters(), ranks) - blocks, heads)


def _padded(parameters: Iterable[nn.Parameter], ranks: int) -> int:
    """Numbers, with what fsdp fills up the first dimension of each parameter with."""
    return sum(-(-one.shape[0] // ranks) * ranks * one[0].numel() for one in parameters)


def collectives_of(config: Config, mode: Literal["ddp", "fsdp"], ranks: int) -> list[Collective]:
    """Of one update of the first stage of a run whose numbers of prototypes are settled (`with_prototypes`), Gram
    anchoring included where the configuration has it on. Without any other rank: none."""
    if ranks == 1:
        return []
    vit, objective = vit_config(config), make_objective(config)
    pieces = pieces_of(vit, objective, 1 if mode == "ddp" else ranks)
    of_weights = _of_ddp(pieces) if mode == "ddp" else _of_fsdp(config, vit, objective, pieces, ranks)
    return of_weights + _of_objective(config, vit, objective, ranks)


def sent_bytes(collectives: Sequence[Collective], ranks: int) -> float:
    """By each rank in an update."""
    return sum(one.sent(ranks) for one in collectives)


def _of_ddp(pieces: Pieces) -> list[Collective]:
    gradients = FP32 * (pieces.blocks + pieces.root + sum(pieces.heads))
    count = -(-gradients // BUCKET_BYTES)
    return [Collective(what="gradients", operation="sum", count=count, bytes=gradients, behind="backward")]


def _of_fsdp(config: Config, vit: ViTConfig, objective: Objective, pieces: Pieces, ranks: int) -> list[Collective]:
    """Of all micro-batches. A group is given back after each forward that reads it, and gathered anew for the next, and
    for its backward (dinox_train/sharded_weights.py; benchmarks' tests count it in a real update)."""
    micro_batches = config.train.accumulation
    local = workload_of(config, vit, objective, config.train.batch_size).local_views > 0
    forwards = 1 + local
    shared = isinstance(objective, DINOv3) and objective.settings.ibot.weight and len(pieces.heads) == 1
    calls = 2 if shared else 1  # of a head, in a forward

    def moved(what: str, operation: Literal["gather", "scatter"], blocks: int, root: int, heads: int) -> Collective:
        """So many times each, in each micro-batch. Embedding, tokens and last norm are fp32 in every precision."""
        size = BF16 if operation == "gather" and config.precision == "bf16_weights" else FP32
        of_heads = sum(pieces.heads)
        return Collective(
            what=what,
            operation=operation,
            count=micro_batches * (blocks * pieces.num_blocks + root + heads * len(pieces.heads)),
            bytes=micro_batches * (size * (blocks * pieces.blocks + heads * of_heads) + FP32 * root * pieces.root),
            behind="compute",
        )

    found = []
    if isinstance(objective, DINOv3):
        found.append(moved("teacher's weights", "gather", 1, 1, calls))
        if couples(config, objective, ranks):
            found.append(moved("student's weights, for KoLeo's neighbours", "gather", 1, 1, 0))
    # A block's backward runs once for each forward, that of what is in no block once, as the last.
    found.append(moved("student's weights", "gather", 2 * forwards, forwards + 1, 2 * calls))
    if gram_of(objective) is not None:
        found.append(moved("Gram teacher's weights", "gather", 1, 1, 0))
    found.append(moved("gradients", "scatter", 1, 1, 1))
    norms = 1 + len(pieces.heads) if config.optimizer.clip == "parts" else 1
    found.append(Collective(what="gradient norms", operation="sum", count=1, bytes=FP32 * norms, behind="nothing"))
    return found


def couples(config: Config, objective: Objective, ranks: int) -> bool:
    """Whether KoLeo looks for neighbours beyond a rank's micro-batch, for which the student runs once more."""
    if not isinstance(objective, DINOv3):
        return False
    rows = objective.koleo_rows(config.train.batch_size)
    return rows is not None and config.train.batch_size // (ranks * config.train.accumulation) % rows != 0


def _of_objective(config: Config, vit: ViTConfig, objective: Objective, ranks: int) -> list[Collective]:
    """Sums of small tensors, for which everything waits."""

    def summed(what: str, count: int, numbers: int) -> Collective:
        return Collective(what=what, operation="sum", count=count, bytes=FP32 * numbers, behind="nothing")

    weights = objective.values(config.train.updates)
    found = [summed("losses", 1, sum(bool(weights[f"weight_{name}"]) for name in objective.terms))]
    if not isinstance(objective, DINOv3):
        return found
    own, patches = objective.settings, bool(objective.settings.ibot.weight)
    separate = own.ibot.prototypes or own.prototypes if own.ibot.head == "separate" else own.prototypes
    prototypes = (own.prototypes, *([separate] if patches else ()))
    turns, name = (2 * own.sinkhorn_iterations, "Sinkhorn") if own.balance == "sinkhorn" else (1, "centring")
    counted = 0 if own.balance == "sinkhorn" else len(prototypes)  # how many samples a centre is the mean of
    found.append(summed(name, turns * len(prototypes), turns * sum(prototypes) + counted))
    found.append(summed("figures of prototypes", 2, own.prototypes + 2))
    of_cls = NUM_GLOBAL * config.train.batch_size * vit.width
    found.append(summed("figures of features", 1, of_cls))
    if couples(config, objective, ranks):
        found.append(summed("KoLeo", config.train.accumulation, of_cls))
    return found
