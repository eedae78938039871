"""What in a run's plan cannot work, or did not where others tried it: each with its reason and what to change."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dinox_model import ViTConfig
from dinox_train.config import Config
from dinox_train.learner import make_objective
from dinox_train.objectives.prototypes import least_entropy
from dinox_train.plan import StagePlan, gram_of, masked_patches_of
from dinox_train.plan_costs import disk_of, free_bytes
from dinox_train.span import Span, lasting
from dinox_train.view_batch import NUM_GLOBAL

SMALL_BATCH = 256
LOST_HOURS, YEAR_S = 6.0, 365.25 * 86400
WINDOW_S = Span(0.001, 0.006)
"""Of a core, to read and decode a window of 3 x 512 x 512 (docs/loader.md: 0.96 s for 1,000 in runs, 1.9 at random)."""
FORCED = 0.5
"""Share of ln K that balance alone may force on the targets (dinox_train/objectives/prototypes.py)."""


def warnings_of(
    config: Config, vit: ViTConfig, plans: Sequence[StagePlan], update_s: Span | None, *, here: bool
) -> list[str]:
    """All warnings, in words. update_s: of an update, where it is known. here: the run is meant for this machine."""
    found = [*_schedule(config, plans), *_objective(config, vit)]
    if update_s is not None:
        found += _time(config, update_s)
    if here:
        objective = make_objective(config)
        wanted, free = disk_of(config, vit, objective).total, free_bytes(config)
        if wanted > free:
            found.append(
                f"the disk of run.folder has {free / 2**30:.1f} GiB for this run, and checkpoints take "
                f"{wanted / 2**30:.1f}: lower checkpoint.keep_last, raise checkpoint.keep_every, or give another folder"
            )
    return found


def _schedule(config: Config, plans: Sequence[StagePlan]) -> list[str]:
    updates, found = config.train.updates, []
    lengths = {
        "schedule.warmup_updates": config.schedule.warmup_updates,
        "optimizer.last_layer_frozen_updates": config.optimizer.last_layer_frozen_updates,
        "optimizer.backbone_frozen_updates": config.optimizer.backbone_frozen_updates,
        "objective.teacher_temperature_warmup_updates": config.objective.teacher_temperature_warmup_updates,
    }
    for key, length in lengths.items():
        if length >= updates:
            found.append(f"{key} is {length:,}, and the run has {updates:,} updates: it ends before that is over")
    gram = gram_of(make_objective(config))
    if gram is not None and not any(plan.gram_updates for plan in plans):
        found.append(f"objective.gram.start is {gram.start:,}: Gram anchoring is on in none of the {updates:,} updates")
    idle = [plan.stage.number for plan in plans if not plan.updates]
    if idle:
        found.append(f"stage {idle[0]} has no update: the stages before it take all of train.updates={updates:,}")
    return found


def _objective(config: Config, vit: ViTConfig) -> list[str]:
    """Batches and prototypes of DINO."""
    if config.objective.name != "dinov3":
        return []
    batch, found = config.train.batch_size, []
    if batch < SMALL_BATCH:
        found.append(
            f"train.batch_size is {batch}: nobody has shown DINO to learn well from batches below {SMALL_BATCH} "
            "(32 “would not work well”, dinov2#298); raise train.accumulation with it, which costs no memory"
        )
    masked = masked_patches_of(config, vit, make_objective(config), batch)
    ibot = config.objective.ibot
    counts = {"objective.prototypes": (config.objective.prototypes, NUM_GLOBAL * batch)}
    if ibot.weight and ibot.head == "separate":
        counts["objective.ibot.prototypes"] = ibot.prototypes, masked
    for key, (prototypes, samples) in counts.items():
        if prototypes and samples and least_entropy(prototypes, samples) > FORCED * math.log(prototypes):
            found.append(
                f"{key} is {prototypes:,} for {samples:,} samples of an update: balance alone forces "
                f"{least_entropy(prototypes, samples) / math.log(prototypes):.0%} of the largest entropy on the "
                "targets, and little is left to learn; leave it out, and it follows the batch"
            )
    return found


def _time(config: Config, update_s: Span) -> list[str]:
    found = []
    if update_s.low * config.train.updates > YEAR_S:
        found.append(
            "this takes more than a year at the best: take a smaller model.preset, fewer updates or less of a view"
        )
    lost_s = update_s.times(config.checkpoint.every)
    if lost_s.low > 3600 * LOST_HOURS:
        found.append(
            f"checkpoint.every is {config.checkpoint.every:,} updates, {lasting(lost_s)}: so much is lost where the "
            "machine stops; lower it"
        )
    cores = WINDOW_S.high * config.train.batch_size / update_s.low
    if config.data.threads and config.data.threads < cores / 4:
        found.append(
            f"data.threads is {config.data.threads}; at its fastest this run takes windows that keep about "
            f"{cores:.0f} cores busy: measure it (benchmarks/knee.py)"
        )
    return found
