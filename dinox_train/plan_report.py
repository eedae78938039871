"""A run's plan in words, and its verdict: whether the run fits into the memory and the time that there are, and what to
change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from dinox_model import ViTConfig
from dinox_model.flops import TrainingFlops
from dinox_model.workload import num_tokens
from dinox_train.config import Config
from dinox_train.learner import Learner, execution_of, make_objective, vit_config
from dinox_train.objectives.dinov3 import DINOv3
from dinox_train.plan import (
    GRAM_LOSS,
    GRAM_PASS,
    StagePlan,
    backbone_numbers,
    flops_of,
    gram_memory_of,
    gram_of,
    heads_of,
    memory_of,
    plan_stage,
    workload_of,
)
from dinox_train.plan_costs import costs_lines, energy_line
from dinox_train.plan_days import offers, offers_in_words
from dinox_train.plan_machines import MACHINES, Machine, Unmeasured, this_machine
from dinox_train.plan_speed import StageSpeed, stage_speed, total_s
from dinox_train.plan_warnings import YEAR_S, warnings_of
from dinox_train.prototype_counts import with_prototypes
from dinox_train.span import Span, lasting
from dinox_train.stages import Stage, stages_of
from dinox_train.view_batch import NUM_GLOBAL

LARGER_BY, RUNTIME_BYTES = 1.1, 2**30
"""What is wanted beyond a plan: kernels and allocator, within what plans were measured to be off by; the runtime."""


@dataclass(frozen=True)
class Room:
    """The memory that there is."""

    bytes: int | None
    """None: nobody knows."""
    words: str


def plan_lines(config: Config) -> list[str]:
    """The plan of a run in words, the verdict last. Raises ConfigError where the network is none."""
    config = with_prototypes(config)
    vit = vit_config(config)
    backbone = backbone_numbers(vit)
    heads = heads_of(make_objective(config), vit)
    in_heads = {name: sum(part.numel() for part in head.parameters()) for name, head in heads.items()}
    plans = [plan_stage(config, stage) for stage in stages_of(config)]
    images = sum(plan.updates for plan in plans) * config.train.batch_size
    total = sum(plan.total_flops for plan in plans)
    lines = [
        f"{config.model.preset}, objective {config.objective.name}, {config.precision}",
        f"parameters: backbone {backbone:,}; heads "
        + ", ".join(f"{name} {count:,}" for name, count in in_heads.items())
        + "; as many again in the teacher",
        f"length: {config.train.updates:,} updates of {config.train.batch_size} images, {images:,} images, "
        f"{total:.3g} operations (2 for each multiplication with addition of a matrix product)",
    ]
    for plan in plans:
        lines += _stage_lines(config, vit, plan, alone=len(plans) == 1)
    machine = machine_for(config, vit)
    speeds = [stage_speed(plan, vit, machine) for plan in plans] if isinstance(machine, Machine) else []
    time_s = total_s(speeds) if speeds else None
    lines += ["", *_speed_lines(config, machine, plans, speeds)]
    lines.append(f"loader: up to {loader_bytes(config) / 2**30:.1f} GiB on the host")
    lines += costs_lines(config, vit, make_objective(config))
    if isinstance(machine, Machine) and time_s is not None:
        lines.append(energy_line(config, machine, time_s))
    update_s = speeds[0].update_s if speeds else None
    here = config.plan.machine is None
    lines += [f"warning: {line}" for line in warnings_of(config, vit, plans, update_s, here=here)]
    lines += _days_lines(config, machine)
    return [*lines, "", _verdict(config, vit, plans, time_s)]


def machine_for(config: Config, vit: ViTConfig) -> Machine | Unmeasured:
    """The machine that the run is planned for: the one that is named, or this one."""
    if config.plan.machine is not None:
        return MACHINES[config.plan.machine].machine(config.precision)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        return Unmeasured(f"{device} is not here; plan.machine={' or '.join(MACHINES)} plans for that machine")
    return this_machine(torch.device(device), vit, stages_of(config), config.precision)


def _speed_lines(
    config: Config, machine: Machine | Unmeasured, plans: list[StagePlan], speeds: list[StageSpeed]
) -> list[str]:
    if isinstance(machine, Unmeasured):
        return [f"speed: not known: {machine.words}"]
    lines = [f"speed, by {machine.words}; products reach {_percent(machine.reached)} of that, the rest of the work "
             f"{_percent(machine.copied)}:"]  # fmt: skip
    for plan, speed in zip(plans, speeds, strict=True):
        stage = "" if len(plans) == 1 else f"stage {plan.stage.number}: "
        lines.append(
            f"  {stage}{speed.images_per_s.words('images/s')}, an update in {lasting(speed.update_s)}, "
            f"{speed.products:.0%} of it in products; {lasting(speed.total_s)}"
        )
    total = total_s(speeds)
    lines.append(f"  in all {lasting(total)}; waits for data, evaluations and checkpoints come on top")
    return [*lines, *(f"  {source}" for source in machine.sources)]


def _percent(share: Span) -> str:
    return f"{share.low:.0%} to {share.high:.0%}"


def _days_lines(config: Config, machine: Machine | Unmeasured) -> list[str]:
    days = config.plan.days
    if days is None:
        return []
    if isinstance(machine, Unmeasured):
        return [f"in {days:g} days: not known, as the speed is not"]
    room = room_for(config).bytes
    found = offers(config, machine, days, room, lambda peak: wanted_bytes(config, peak))
    return ["", *offers_in_words(config, days, found)]


def _stage_lines(config: Config, vit: ViTConfig, plan: StagePlan, *, alone: bool) -> list[str]:
    there, objective = plan.stage.config, make_objective(plan.stage.config)
    workload = workload_of(there, vit, objective, there.train.batch_size)
    tokens = num_tokens(vit, workload.global_size)
    views = f"{NUM_GLOBAL} x {workload.global_size} ({tokens} tokens)"
    of_image = NUM_GLOBAL * tokens
    if workload.num_local:
        small = num_tokens(vit, workload.local_size)
        views += f", {workload.num_local} x {workload.local_size} ({small} tokens)"
        of_image += workload.num_local * small
    execution = execution_of(there)
    pieces = f"{there.train.accumulation} micro-batches of {there.train.batch_size // there.train.accumulation} images"
    return [
        "",
        *([] if alone else [f"stage {plan.stage.number}, {plan.updates:,} updates from update {plan.stage.first:,}"]),
        f"an image: {views}; {of_image:,} tokens of the student; {plan.flops.per_image / 1e12:.4g} TFLOP",
        *_shares(plan.flops),
        f"an update: {plan.flops.total / 1e12:.4g} TFLOP, {pieces}; memory at its peak with activation checkpointing "
        f"{execution.checkpointing}, MiB:",
        *(f"  {name:<34}{size / 2**20:>12,.1f}" for name, size in plan.memory.items()),
        f"  {'peak':<34}{plan.peak / 2**20:>12,.1f}",
        *_gram_line(plan, gram_memory_of(there, vit, objective)),
    ]


def _gram_line(plan: StagePlan, memory: Mapping[str, int]) -> list[str]:
    if not memory:
        return []
    size = sum(memory.values())
    return [
        f"Gram anchoring: {plan.gram_flops / plan.flops.total:.1%} of the operations, and {size / 2**20:,.1f} MiB, "
        f"{size / plan.peak:.1%} of the peak, in {plan.gram_updates:,} of {plan.updates:,} updates"
    ]


def _shares(flops: TrainingFlops) -> list[str]:
    steps = dict.fromkeys(row.step for row in flops.rows if row.flops)
    return [f"  {step:<34}{flops.of(step=step) / flops.total:>12.1%}" for step in steps]


def costs_in_words(learner: Learner) -> list[str]:
    """What the log says where a stage of a run begins: how the networks run, and what costs more than it looks."""
    stage, objective, execution = learner.stage, learner.objective, learner.networks.execution
    train = stage.config.train
    lines = [f"networks: compile {execution.compile}, activation checkpointing {execution.checkpointing}"]
    rows = objective.koleo_rows(train.batch_size) if isinstance(objective, DINOv3) else None
    size = train.batch_size // train.accumulation
    if rows is not None and size % rows:
        lines.append(
            f"KoLeo compares {rows} images and a micro-batch has {size}: the student's global views are computed once "
            "more in each update, without gradients (objective.koleo.group, train.accumulation)"
        )
    gram = gram_of(objective)
    if gram is not None:
        flops = flops_of(stage.config, learner.vit, objective)
        passes, loss = (flops.of(step=step) / flops.total for step in (GRAM_PASS, GRAM_LOSS))
        memory = sum(gram_memory_of(stage.config, learner.vit, objective).values())
        lines.append(
            f"Gram anchoring, from update {max(gram.start + 1, stage.first)}: {passes + loss:.1%} of an update's "
            f"operations, its teacher's pass {passes:.1%} and the loss {loss:.1%}, and {memory / 2**20:,.1f} MiB; see "
            "objective.gram.size, views and max_patches"
        )
    return lines


def room_for(config: Config) -> Room:
    """The memory of the device that the run is meant for."""
    given, device = config.execution.memory_gib, config.device
    if given is not None:
        return Room(int(given * 2**30), f"{given:g} GiB (execution.memory_gib)")
    if config.plan.machine is not None:
        memory_gib = MACHINES[config.plan.machine].memory_gib
        return Room(int(memory_gib * 2**30), f"{memory_gib:g} GiB of {MACHINES[config.plan.machine].words}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        total = psutil.virtual_memory().total
        return Room(total, f"{total / 2**30:.1f} GiB of this machine")
    if not torch.cuda.is_available():
        return Room(None, f"{device}, which this machine has not")
    total = torch.cuda.get_device_properties(device).total_memory
    return Room(total, f"{total / 2**30:.1f} GiB of {torch.cuda.get_device_name(device)}")


def loader_bytes(config: Config) -> int:
    """What the loader may take of the host's memory."""
    data = config.data
    return (data.prefetch_mib + data.pool_mib + data.cache_mib) * 2**20


def wanted_bytes(config: Config, peak: int) -> int:
    """What a run wants whose plan has this peak: on a CPU, loader and training share the memory."""
    nothing_said = config.device == "auto" and config.execution.memory_gib is None
    shares = config.device == "cpu" or (nothing_said and not torch.cuda.is_available())
    shares &= config.plan.machine is None
    return int(LARGER_BY * peak) + RUNTIME_BYTES + (loader_bytes(config) if shares else 0)


def _verdict(config: Config, vit: ViTConfig, plans: list[StagePlan], time_s: Span | None) -> str:
    largest = max(plans, key=lambda plan: plan.peak)
    room, wanted = room_for(config), wanted_bytes(config, largest.peak)
    needs = f"{wanted / 2**30:.1f} GiB (the plan's {largest.peak / 2**30:.1f}, 10 % and 1 GiB for kernels and runtime"
    needs += ", the loader)" if wanted > LARGER_BY * largest.peak + RUNTIME_BYTES + 1 else ")"
    if room.bytes is None:
        return (
            f"verdict: not known: the run wants {needs} of {room.words}; say what it has with execution.memory_gib, or "
            "lay a file of configs/hardware/ over this one"
        )
    if wanted <= room.bytes:
        return f"verdict: {_in_time(config, time_s)}{needs} of {room.words}{_taking(time_s)}"
    return f"verdict: does not fit: {needs} of {room.words}. {_remedy(config, vit, largest.stage, room.bytes)}"


def _in_time(config: Config, time_s: Span | None) -> str:
    """What to say of a run whose memory is enough."""
    days = config.plan.days
    if time_s is not None and days is not None and time_s.low > 86400 * days:
        return f"does not fit into {days:g} days, only into the memory: "
    if time_s is not None and time_s.low > YEAR_S:
        return "does not work, as it takes more than a year; the memory fits: "
    if time_s is not None and days is not None and time_s.high > 86400 * days:
        return f"fits into the memory, and perhaps into {days:g} days: "
    return "fits: "


def _taking(time_s: Span | None) -> str:
    return "" if time_s is None else f"; {lasting(time_s)}"


def _remedy(config: Config, vit: ViTConfig, stage: Stage, room: int) -> str:
    """The least change that makes a stage fit."""
    batch = config.train.batch_size
    larger = [number for number in range(1, batch + 1) if batch % number == 0]
    larger = [number for number in larger if number > stage.config.train.accumulation]
    tried = list(dict.fromkeys((stage.config.execution.activation_checkpointing, "selective", "block")))
    for checkpointing in tried:
        execution = stage.config.execution.model_copy(update={"activation_checkpointing": checkpointing})
        there = stage.config.model_copy(update={"execution": execution})
        candidates = larger if checkpointing == tried[0] else [stage.config.train.accumulation, *larger]
        found = _first_that_fits(config, vit, replace(stage, config=there), candidates, room)
        if found is not None:
            also = "" if checkpointing == tried[0] else f" and execution.activation_checkpointing={checkpointing}"
            return f"Set train.accumulation={found}{also}: the same result, in smaller pieces."
    return "It does not with one image at a time either: take a smaller model.preset, or smaller views."


def _first_that_fits(config: Config, vit: ViTConfig, stage: Stage, accumulations: list[int], room: int) -> int | None:
    """The smallest of ascending numbers of micro-batches that fits: pieces only get smaller."""
    objective = make_objective(stage.config)

    def fits(accumulation: int) -> bool:
        train = stage.config.train.model_copy(update={"accumulation": accumulation})
        memory = memory_of(stage.config.model_copy(update={"train": train}), vit, objective)
        return wanted_bytes(config, sum(memory.values())) <= room

    if not accumulations or not fits(accumulations[-1]):
        return None
    low, high = 0, len(accumulations) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(accumulations[middle]) else (middle + 1, high)
    return accumulations[low]
