"""What a run asks of its machine: the size of its checkpoints, how many are kept, memory, open files, bytes to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from checkup.device_trials import Work
from checkup.machine import Wanted

if TYPE_CHECKING:
    from dinox_train.config import Config

FRAMES = {"runs": 1.3, "random": 3.0}
"""Slices that are read for a window of three, by data.mode (docs/loader.md)."""


def config_of(files: Sequence[str], overrides: Sequence[str]) -> Config:
    """The configuration that the files and `a.b=value` describe. Raises ConfigError."""
    from dinox_train.config import load_config
    from dinox_train.prototype_counts import with_prototypes

    return with_prototypes(load_config(files, overrides))


def work_of(config: Config) -> Work:
    """What the run puts through the device: products of a micro-batch, and the longest sequence."""
    from dinox_train.kernel_choice import attention_shapes, product_rows
    from dinox_train.learner import vit_config
    from dinox_train.platform import product_dtype
    from dinox_train.stages import stages_of

    vit, stages, dtype = vit_config(config), stages_of(config), product_dtype(config.precision)
    shape = max(attention_shapes(vit, stages, dtype), key=lambda one: one.tokens)
    rows = product_rows(vit, stages, dtype)
    return Work(vit=vit, rows=rows, shape=shape, attention=config.kernels.attention)


def wanted_of(config: Config | None, shards: str | None) -> Wanted:
    """Raises ShardError where there is no set in `shards`."""
    manifest = None if shards is None else _manifest(shards)
    counts = {} if manifest is None else manifest["counts"]
    slices = counts.get("slices") or 0
    mode = "runs" if config is None else config.data.mode
    return Wanted(
        device=None if config is None else config.device,
        checkpoint_bytes=None if config is None else checkpoint_bytes(config),
        checkpoints=None if config is None else kept_checkpoints(config),
        memory_gib=None if config is None else config.execution.memory_gib,
        shards=None if manifest is None else len(manifest["shards"]),
        window_bytes=FRAMES[mode] * counts["shard_bytes"] / slices if slices else None,
    )


def _manifest(shards: str) -> dict[str, Any]:
    from dinox_io.manifest import read_manifest

    return read_manifest(shards if "://" in shards else Path(shards))


def kept_checkpoints(config: Config) -> int:
    """That stand on the disk at the end of the run at most: the newest, those that stay, and one that is written."""
    section = config.checkpoint
    for_ever = config.train.updates // section.keep_every if section.keep_every else 0
    return section.keep_last + for_ever + 1


def checkpoint_bytes(config: Config) -> int:
    """Of one checkpoint: student, teacher and AdamW's two moments in fp32, and the Gram teacher where there is one."""
    from dinox_model import VisionTransformer
    from dinox_train.learner import make_objective, vit_config
    from dinox_train.plan import gram_of, heads_of

    vit, objective = vit_config(config), make_objective(config)
    with torch.device("meta"):
        backbone = sum(parameter.numel() for parameter in VisionTransformer(vit).parameters())
    heads = sum(parameter.numel() for parameter in heads_of(objective, vit).parameters())
    copies = 4 * (backbone + heads) + (backbone if gram_of(objective) is not None else 0)
    return 4 * copies
