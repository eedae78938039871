"""The line of an update: what of it is counted and measured beside the figures, and how it reads for people."""

from __future__ import annotations

from typing import Any

import psutil
import torch

LOADER_SUMS = (
    *("read_bytes", "decoded_bytes", "cached_bytes", "copied_bytes"),
    *("read_s", "decode_s", "unfilter_s", "decoded_again"),
)
"""Of the loader's counters, those whose growth in an update stands in its line."""


def memory_bytes(device: torch.device) -> int:
    """Peak memory of the device's allocator, or this process's resident memory on CPU, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def in_words(line: dict[str, Any], total: int) -> str:
    """One line for people: waiting for data first, since that is what is usually wrong."""
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
    entropy = f"teacher entropy {line['teacher_entropy']:.2f}  " if "teacher_entropy" in line else ""
    return (
        f"update {line['update']}/{total}  data wait {line['data_wait_fraction']:.1%}  "
        f"{line['images_per_s']:.1f} images/s  loss {loss}  grad norm {line['grad_norm']:.2f}  "
        f"lr {line['lr']:.2e}  {entropy}memory {line['memory_bytes'] / 2**30:.1f} GiB"
    )
