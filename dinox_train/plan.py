"""What an update of a run takes, before the run begins: operations and memory.

Nothing is read but the configuration, nothing is allocated, nothing is written: networks stand on torch's meta device,
and memory is a rehearsal on tensors without values (dinox_model/memory_plan.py). No speed is guessed.

Invariant: operations are exact for matrix products and attention; memory is that of eager execution, on the safe side
where the trainer does more than the rehearsal knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dinox_model import VisionTransformer, ViTConfig
from dinox_model.flops import FlopsRow, TrainingFlops, training_flops
from dinox_model.heads.prototype import PrototypeHead, PrototypeHeadConfig
from dinox_model.memory_plan import (
    GRADIENTS,
    GRAM_TEACHER,
    OPTIMIZER,
    TEACHER,
    WEIGHTS,
    WORKING_WEIGHTS,
    plan_pass,
    plan_training,
)
from dinox_model.storage_meter import StorageMeter
from dinox_model.workload import Workload
from dinox_train.config import Config
from dinox_train.learner import execution_of, make_objective, vit_config
from dinox_train.masking import masked_counts
from dinox_train.objectives.dinov3 import DINOv3, GramSettings
from dinox_train.objectives.gram import gram_flops, gram_loss
from dinox_train.objectives.objective import Objective
from dinox_train.stages import Stage
from dinox_train.view_batch import NUM_GLOBAL

GRAM_PASS, GRAM_LOSS = "gram teacher", "gram loss"
"""Steps of an update that Gram anchoring adds."""
SLICE_SIDE = 512
"""Pixels of a slice, to say what windows take: what is really in a set is not looked at."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run."""

    stage: Stage
    updates: int
    flops: TrainingFlops
    """Of one update, with Gram anchoring on if the stage has it."""
    gram_updates: int
    """Updates in which it is on."""
    memory: Mapping[str, int]
    """Bytes by item, at the peak of an update."""

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def gram_flops(self) -> int:
        """Of one update, the operations that Gram anchoring adds."""
        return self.flops.of(step=GRAM_PASS) + self.flops.of(step=GRAM_LOSS)

    @property
    def total_flops(self) -> int:
        """Of all its updates."""
        return self.updates * (self.flops.total - self.gram_flops) + self.gram_updates * self.gram_flops


def plan_stage(config: Config, stage: Stage) -> StagePlan:
    """The plan of one stage of a run whose numbers of prototypes are settled (`with_prototypes`)."""
    objective, vit = make_objective(stage.config), vit_config(config)
    updates = stage.updates_until(config.train.updates)
    gram, gram_updates = gram_of(objective), 0
    if gram is not None:
        gram_updates = max(0, stage.first - 1 + updates - max(stage.first - 1, gram.start))
    return StagePlan(
        stage, updates, flops_of(stage.config, vit, objective), gram_updates, memory_of(stage.config, vit, objective)
    )


def gram_of(objective: Objective) -> GramSettings | None:
    """Of Gram anchoring, where an objective has it on."""
    if isinstance(objective, DINOv3) and objective.settings.gram.weight:
        return objective.settings.gram
    return None


def workload_of(config: Config, vit: ViTConfig, objective: Objective, images: int) -> Workload:
    """`images` of an update as the networks meet them. A head that DINO and iBOT share stands in it twice."""
    views, gram = config.views, gram_of(objective)
    common = {"images": images, "num_global": NUM_GLOBAL, "global_size": views.global_size}
    if not isinstance(objective, DINOv3):
        return Workload(**common, num_local=0, dino_head=None, ibot_head=None)
    own = objective.settings
    sizes = {"hidden": own.head_hidden, "bottleneck": own.head_bottleneck}
    separate = own.ibot.head == "separate" and own.ibot.prototypes
    return Workload(
        **common,
        num_local=views.num_local if own.dino.weight else 0,
        local_size=views.local_size,
        masked_patches=masked_patches_of(config, vit, objective, images),
        dino_head=PrototypeHeadConfig(**sizes, prototypes=own.prototypes),
        ibot_head=PrototypeHeadConfig(**sizes, prototypes=separate or own.prototypes) if own.ibot.weight else None,
        gram_size=None if gram is None else gram.size or views.global_size,
        num_gram=NUM_GLOBAL if gram is None else gram.views,
    )


def masked_patches_of(config: Config, vit: ViTConfig, objective: Objective, images: int) -> int:
    """Masked patches of an update; of a part of it, its share, rounded up."""
    if objective.needs.masks is None:
        return 0
    num_patches, batch = (config.views.global_size // vit.patch_size) ** 2, config.train.batch_size
    counts = masked_counts(objective.needs.masks, num_crops=NUM_GLOBAL * batch, num_patches=num_patches)
    return -(-int(counts.sum()) * images // batch)


def flops_of(config: Config, vit: ViTConfig, objective: Objective) -> TrainingFlops:
    """Of one update."""
    images = config.train.batch_size
    workload = workload_of(config, vit, objective, images)
    rows = training_flops(vit, workload, execution_of(config)).rows
    if not isinstance(objective, DINOv3):
        # A baseline asks no teacher, and has one Linear: for each masked patch, or for each global view.
        tokens = masked_patches_of(config, vit, objective, images) or workload.global_views
        head = 2 * tokens * sum(part.numel() for part in heads_of(objective, vit).parameters() if part.ndim == 2)
        rows = tuple(row for row in rows if row.step != "teacher")
        rows += (FlopsRow("student forward", "head", head), FlopsRow("student backward", "head", 2 * head))
    gram = gram_of(objective)
    if gram is not None:
        crops = workload.gram_views * len(gram.layers)
        rows += (
            FlopsRow(
                GRAM_LOSS, "similarities", crops * gram_flops(_compared(gram, config, vit), vit.width, gram.negatives)
            ),
        )
    return TrainingFlops(rows, images)


def memory_of(config: Config, vit: ViTConfig, objective: Objective) -> dict[str, int]:
    """Bytes by item, at the peak of an update."""
    train, execution, precision = config.train, execution_of(config), config.precision
    workload = workload_of(config, vit, objective, train.batch_size // train.accumulation)
    whole = workload_of(config, vit, objective, train.batch_size)
    items = dict(
        plan_training(vit, workload, precision=precision, execution=execution, accumulates=train.accumulation > 1).items
    )
    if isinstance(objective, DINOv3) and whole.ibot_head and "ibot" not in heads_of(objective, vit):
        _count_once(items, heads_of(objective, vit), precision)
    pixels = 4 * vit.in_channels
    of_views = whole.global_views * whole.global_size**2 + whole.local_views * whole.local_size**2
    items["views of the other micro-batches"] = pixels * of_views * (train.accumulation - 1) // train.accumulation
    logits = whole.global_views * (whole.dino_head.prototypes if whole.dino_head else 0)
    logits += whole.masked_patches * (whole.ibot_head.prototypes if whole.ibot_head else 0)
    items["teacher's logits, whole update"] = logits * (4 if precision == "fp32" else 2)
    items["windows, int16"] = 2 * workload.images * config.data.depth * SLICE_SIDE**2
    items |= gram_memory_of(config, vit, objective)
    return {name: size for name, size in items.items() if size}


def gram_memory_of(config: Config, vit: ViTConfig, objective: Objective) -> dict[str, int]:
    """Bytes by item that Gram anchoring adds to an update, those of `memory_of`; empty where it is off."""
    gram, train = gram_of(objective), config.train
    workload = workload_of(config, vit, objective, train.batch_size // train.accumulation)
    if gram is None or workload.gram_size is None:
        return {}
    with torch.device("meta"):
        weights = sum(parameter.nbytes for parameter in VisionTransformer(vit).parameters())
    # Its pass comes while the student's activations are kept.
    seen = plan_pass(vit, workload.gram_views, workload.gram_size, precision=config.precision)
    num_views = NUM_GLOBAL * train.batch_size
    return {
        GRAM_TEACHER: weights,
        "views of the Gram teacher": 4 * vit.in_channels * num_views * workload.gram_size**2,
        "Gram teacher's pass": seen.peak - seen.items[WEIGHTS],
        "Gram loss": _gram_loss_bytes(gram, workload.gram_views, _compared(gram, config, vit), vit.width),
    }


def backbone_numbers(vit: ViTConfig) -> int:
    """Parameters of a backbone."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VisionTransformer(vit).parameters())


def heads_of(objective: Objective, vit: ViTConfig) -> nn.ModuleDict:
    """Its heads without values."""
    with torch.device("meta"):
        return nn.ModuleDict(objective.heads(vit, 0))


def _count_once(items: dict[str, int], heads: nn.ModuleDict, precision: str) -> None:
    """Take away what a head that stands twice in the workload has too much."""
    head = heads["dino"]
    assert isinstance(head, PrototypeHead)
    numbers = sum(parameter.numel() for parameter in head.parameters())
    spared = {WEIGHTS: 4, GRADIENTS: 4, OPTIMIZER: 8, TEACHER: 4}
    if precision == "bf16_weights":
        spared[WORKING_WEIGHTS] = 4  # of student and teacher
    for name, size in spared.items():
        items[name] -= size * numbers


def _compared(gram: GramSettings, config: Config, vit: ViTConfig) -> int:
    """Patches of a view whose similarities are compared."""
    num_patches = (config.views.global_size // vit.patch_size) ** 2
    return min(num_patches, gram.max_patches or num_patches)


def _gram_loss_bytes(gram: GramSettings, crops: int, num_patches: int, width: int) -> int:
    """At most, with its backward, beside the patches themselves."""
    with FakeTensorMode(), StorageMeter() as meter:
        ours = [torch.empty(crops, num_patches, width, requires_grad=True) for _ in gram.layers]
        theirs = torch.empty(crops, num_patches, width)
        before = meter.live
        torch.stack([gram_loss(one, theirs, negatives=gram.negatives) for one in ours]).sum().backward()
        return meter.peak - before
