"""How long an update takes on a machine, from the shortest to the longest, by a model of two terms.

    seconds = operations / (TFLOP/s x share reached) + bytes beside the products / (GB/s x share reached)

One after the other, as the kernels of one stream are. Where starting kernels one by one takes longer than running them,
that is the time. Not in it: waits for data, evaluations, checkpoints, and other work of the machine.

Invariant: nothing is measured and nothing is read but the configuration and the machine's figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dinox_model import ViTConfig
from dinox_train.learner import make_objective
from dinox_train.plan import StagePlan
from dinox_train.plan_machines import Machine
from dinox_train.plan_traffic import launches_of, traffic_of
from dinox_train.span import Span


@dataclass(frozen=True)
class StageSpeed:
    """One stage of a run on a machine."""

    update_s: Span
    """Of an update, with Gram anchoring where the stage has it."""
    images_per_s: Span
    total_s: Span
    """Of all its updates."""
    products: float
    """Share of the time that is matrix products and attention, in the middle of the span."""


def stage_speed(plan: StagePlan, vit: ViTConfig, machine: Machine) -> StageSpeed:
    """How fast one stage of a run is."""
    config = plan.stage.config
    objective = make_objective(config)
    products, moved = products_s(plan.flops.total, machine), moved_s(traffic_of(config, vit, objective), machine)
    update = products.plus(moved)
    if config.execution.compile == "off":
        update = Span(update.low, max(update.high, launches_of(config, vit, objective) * machine.launch_s))
    # Gram anchoring is not on in every update: without it, an update is as much shorter as it has fewer operations.
    spared = (plan.updates - plan.gram_updates) * plan.gram_flops / plan.flops.total if plan.updates else 0.0
    share = sum(products) / (sum(products) + sum(moved))
    total = update.times(plan.updates - spared)
    return StageSpeed(update, update.under(config.train.batch_size), total, share)


def products_s(operations: float, machine: Machine) -> Span:
    """Seconds of so many operations."""
    return machine.reached.under(operations / (machine.tflops * 1e12))


def moved_s(traffic: Span, machine: Machine) -> Span:
    """Seconds of so many bytes."""
    rate = machine.gb_per_s * 1e9
    return Span(traffic.low / (rate * machine.copied.high), traffic.high / (rate * machine.copied.low))


def total_s(speeds: Sequence[StageSpeed]) -> Span:
    """Seconds of a run's stages together."""
    total = Span(0.0, 0.0)
    for speed in speeds:
        total = total.plus(speed.total_s)
    return total
