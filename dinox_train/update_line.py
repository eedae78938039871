"""The line of an update: what of it is counted and measured beside the figures, and how it reads for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from dinox_train.evaluate import Evaluation
from dinox_train.learner import Learner
from dinox_train.memory_trend import host_memory_bytes
from dinox_train.metrics import VERSION

LOADER_SUMS = (
    *("read_bytes", "decoded_bytes", "cached_bytes", "copied_bytes"),
    *("read_s", "decode_s", "unfilter_s", "decoded_again"),
)
"""Of the loader's counters, those whose growth in an update stands in its line."""


def memory_bytes(device: torch.device) -> int:
    """Peak memory of the device's allocator, or this process's resident memory on CPU, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return host_memory_bytes()


def begin_line(
    learner: Learner, update: int, epoch: int, values: Mapping[str, float], *, wait_s: float, seconds: float
) -> dict[str, Any]:
    """What is known of update number `update` (from 1) as soon as it is queued; figures that it does not have, null.

    epoch: of the window seen least often; values: what the schedules said; seconds: its wall time, wait_s of them
    waiting for data.
    """
    batch_size = learner.config.train.batch_size
    return {
        "version": VERSION,
        "update": update,
        "stage": learner.stage.number,
        "applied": True,
        **learner.counted(update),
        "epoch": epoch,
        **dict.fromkeys(("loss", "loss_dino", "loss_ibot", "loss_koleo", "loss_gram")),
        **values,
        "images_per_s": batch_size / seconds,
        "data_wait_fraction": min(wait_s / seconds, 1.0),
        **asdict(Evaluation()),
    }


def in_words(line: dict[str, Any], total: int) -> str:
    """One line for people: waiting for data first, since that is what is usually wrong."""
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
    entropy = f"teacher entropy {line['teacher_entropy']:.2f}  " if "teacher_entropy" in line else ""
    return (
        f"update {line['update']}/{total}  data wait {line['data_wait_fraction']:.1%}  "
        f"{line['images_per_s']:.1f} images/s  loss {loss}  grad norm {line['grad_norm']:.2f}  "
        f"lr {line['lr']:.2e}  {entropy}memory {line['memory_bytes'] / 2**30:.1f} GiB"
    )
