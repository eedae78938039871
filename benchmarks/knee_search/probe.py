"""What machine, network and set are like, before anything is timed at length.

Asked in a process of its own: a process that has used a GPU once is not the same any more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from loader_meters import resident_share

from dinox_io import memory
from dinox_model.memory_plan import GLOBAL, HEADS, LOCAL
from dinox_train.plan import flops_of, memory_of
from dinox_train.platform import check_compiler
from knee_search.copies import shard_files, size_of
from knee_search.learning import Learning, begin


def measure(file: str, overrides: Sequence[str], folder: str) -> dict[str, Any]:
    """Facts as JSON values; sizes in bytes, per image or window where they say so."""
    learning = begin(file, overrides, folder)
    config, learner, platform = learning.config, learning.learner, learning.platform
    plan = memory_of(config, learner.vit, learner.objective)
    micro_batch = config.train.batch_size // config.train.accumulation
    return {
        "facts": platform.facts.record(),
        "machine": platform.facts.words(),
        "unified": platform.facts.unified,
        "is_gpu": platform.facts.is_gpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": _room(learning),
        "can_compile": _can_compile(learning.device),
        "bandwidth": asdict(platform.bandwidth),
        "peak_tflops": platform.peak_tflops,
        "parameters": sum(part.numel() for part in learner.student.parameters()),
        "flops_per_image": flops_of(config, learner.vit, learner.objective).total / config.train.batch_size,
        "activation_bytes_per_image": sum(plan.get(name, 0) for name in (GLOBAL, LOCAL, HEADS)) / micro_batch,
        "run_slices": config.data.depth + (config.data.run_length - 1 if config.data.mode == "runs" else 0),
        "set": _set_facts(learning),
    }


def _room(learning: Learning) -> int:
    """That an update may take: of the GPU, or of the host, what is free beside this process."""
    if learning.device.type == "cuda":
        return torch.cuda.mem_get_info(learning.device)[0] + torch.cuda.memory_reserved(learning.device)
    free = memory.free_memory_bytes()
    return learning.platform.facts.memory_bytes if free is None else free


def _can_compile(device: torch.device) -> bool:
    try:
        check_compiler(device)
    except ValueError:
        return False
    return True


def _set_facts(learning: Learning) -> dict[str, Any]:
    """Of all sets together; what of their files lies in the page cache, where they are local."""
    dataset = learning.dataset
    paths = [
        path for source in dataset.sources if Path(source.folder).is_dir() for path in shard_files(Path(source.folder))
    ]
    with learning.loader() as loader:
        windows = sum(loader.num_windows)
    y, x = (max(sides) for sides in zip(*(source.shards.slice_size for source in dataset.sources), strict=True))
    return {
        "digests": [source.shards.digest for source in dataset.sources],
        "volumes": len(dataset.volumes),
        "slices": sum(volume.shape[0] for volume in dataset.volumes),
        "windows": windows,
        "bytes": size_of(paths),
        "resident": resident_share(paths) if paths else None,
        "slice_bytes": 2 * y * x,
        "window_bytes": 2 * y * x * learning.config.data.depth,
    }
