"""The loader alone: windows a second on bytes that are in the page cache, as fast as a consumer that does nothing takes
them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from dinox_train.feed import Feed
from dinox_train.windows import open_loader
from knee_search.learning import configured, opened

WARM_BATCHES = 3
"""As many as are made ahead at first, or fewer: they are not counted."""
SUMS = ("read_bytes", "decoded_bytes", "read_s", "decode_s", "unfilter_s", "decoded_again")


def measure(file: str, overrides: Sequence[str], folder: str, *, seconds: float) -> dict[str, Any]:
    """Seconds of each global batch, and what the loader's threads spent meanwhile."""
    config = configured(file, overrides)
    dataset = opened(config, folder)
    parts = config.train.accumulation
    with open_loader(config, dataset, Feed(torch.device("cpu")), 0) as loader:
        for _ in range(WARM_BATCHES * parts):
            _take(loader)
        before, cpu_s = loader.counters, time.process_time()
        taken_s: list[float] = []
        begin_s = mark = time.perf_counter()
        while len(taken_s) < 2 or mark - begin_s < seconds:
            for _ in range(parts):
                _take(loader)
            taken_s.append(time.perf_counter() - mark)
            mark = time.perf_counter()
        cpu_s, after = time.process_time() - cpu_s, loader.counters
    sides = [source.shards.slice_size for source in dataset.sources]
    windows = len(taken_s) * config.train.batch_size
    return {
        "batch_s": taken_s,
        "windows": windows,
        "windows_per_s": windows / sum(taken_s),
        "cpu_s_per_window": cpu_s / windows,
        "slice_bytes": 2 * max(y * x for y, x in sides),
        **{name: after[name] - before[name] for name in SUMS},
    }


def _take(loader: Any) -> None:
    """A micro-batch, with its images put together as a run needs them."""
    _ = next(loader).images
