"""What an update moves through memory beside its matrix products, in bytes, from the least to the most.

Invariant: a count, not a measurement: which of it a cache spares, and what a compiler fuses, lies between the two ends.
The unit of a block is one tensor of its tokens: tokens x width, in the dtype of the activations. How many of them a
block moves was counted (Inductor's own counter beside one of dispatched operators, 1,029 tokens); the least is what
kernels that fuse everything would move.
"""

from __future__ import annotations

from typing import NamedTuple

from dinox_model import ViTConfig
from dinox_model.flops import GATED, kept_rows
from dinox_model.workload import Workload, num_tokens
from dinox_train.config import Config
from dinox_train.learner import execution_of
from dinox_train.objectives.objective import Objective
from dinox_train.plan import backbone_numbers, heads_of, workload_of
from dinox_train.span import Span

LEAST_FORWARD, LEAST_BOTH = 14, 40


class _Units(NamedTuple):
    """Tensors that a block moves: with a GELU and with a gated MLP."""

    plain: int
    gated: int


_MOST_FORWARD = {("cast", "off"): _Units(72, 77), ("cast", "on"): _Units(49, 49)}
_MOST_FORWARD |= {("same", "off"): _Units(42, 48), ("same", "on"): _Units(30, 30)}
_MOST_BOTH = {("cast", "off"): _Units(199, 229), ("cast", "on"): _Units(137, 140)}
_MOST_BOTH |= {("same", "off"): _Units(121, 151), ("same", "on"): _Units(94, 97)}
"""By whether autocast casts weights and activations on the way (bf16), and by whether blocks are compiled."""

OF_A_LOGIT = Span(20.0, 336.0)
"""Bytes that Sinkhorn's three turns and the cross-entropy move for each bf16 logit: fused, and operator by operator."""
OF_A_PARAMETER = Span(44.0, 116.0)
"""Bytes that clipping, AdamW, the teacher's average and bf16 copies move: in one pass, and operator by operator."""
OF_A_PIXEL = Span(4.0 * 10, 4.0 * 40)
"""Bytes that making views moves for each of their values: crop, resize, blur, noise, window, normalise. An estimate."""
LAUNCHES_FORWARD, LAUNCHES_BOTH = 25, 75
"""Kernels that a block starts in a pass, operator by operator. An estimate from its operators."""


def traffic_of(config: Config, vit: ViTConfig, objective: Objective) -> Span:
    """Bytes of one update, without its matrix products."""
    images = config.train.batch_size
    workload = workload_of(config, vit, objective, images)
    passes = _passes(config, vit, workload)
    parameters = sum(part.numel() for part in heads_of(objective, vit).parameters()) + backbone_numbers(vit)
    logits = _logits(workload) * (2 if config.precision == "fp32" else 1)
    pixels = vit.in_channels * (
        workload.global_views * workload.global_size**2 + workload.local_views * workload.local_size**2
    )
    total = passes.plus(OF_A_PARAMETER.times(parameters)).plus(OF_A_PIXEL.times(pixels))
    return total.plus(OF_A_LOGIT.times(logits))


def launches_of(config: Config, vit: ViTConfig, objective: Objective) -> int:
    """Kernels that the blocks of an update start, in all its micro-batches, where nothing is fused."""
    workload = workload_of(config, vit, objective, config.train.batch_size // config.train.accumulation)
    sizes = 2 if workload.local_views else 1
    again = execution_of(config).num_checkpointed(vit.num_layers) * LAUNCHES_FORWARD * sizes
    of_one = vit.num_layers * (sizes * LAUNCHES_BOTH + LAUNCHES_FORWARD) + again
    if workload.gram_size is not None:
        of_one += vit.num_layers * LAUNCHES_FORWARD
    return of_one * config.train.accumulation


def _passes(config: Config, vit: ViTConfig, workload: Workload) -> Span:
    """Bytes of all blocks: the teacher's forward, the student's forward and backward, and what is computed again."""
    execution = execution_of(config)
    how = "cast" if config.precision == "bf16" else "same", "off" if execution.compile == "off" else "on"
    gated = vit.mlp in GATED
    forward = _MOST_FORWARD[how].gated if gated else _MOST_FORWARD[how].plain
    both = _MOST_BOTH[how].gated if gated else _MOST_BOTH[how].plain
    has_teacher = workload.dino_head is not None or workload.ibot_head is not None
    taught = has_teacher * workload.global_views * num_tokens(vit, workload.global_size)
    if workload.gram_size is not None:
        taught += workload.gram_views * num_tokens(vit, workload.gram_size)
    learnt = kept_rows(workload.global_views, vit.drop_path) * num_tokens(vit, workload.global_size)
    if workload.local_views:
        learnt += kept_rows(workload.local_views, vit.drop_path) * num_tokens(vit, workload.local_size)
    again = learnt * execution.num_checkpointed(vit.num_layers) / vit.num_layers
    unit = vit.width * (4 if config.precision == "fp32" else 2) * vit.num_layers
    return Span(
        unit * (LEAST_FORWARD * (taught + again) + LEAST_BOTH * learnt),
        unit * (forward * (taught + again) + both * learnt),
    )


def _logits(workload: Workload) -> int:
    """Of the student, who has at least as many as the teacher."""
    of_cls = workload.global_views + workload.local_views
    dino = of_cls * workload.dino_head.prototypes if workload.dino_head else 0
    return dino + (workload.masked_patches * workload.ibot_head.prototypes if workload.ibot_head else 0)
