"""How much memory torch has handed out at most while something runs; and how to wait for a device. torch only.

On a GPU it is torch.cuda.max_memory_allocated. The CPU's allocator keeps no such record: there the profiler's list of
what was taken and given back is added up. Neither counts the runtime, what matrix libraries take past torch's
allocator, nor what the allocator holds in reserve.
Invariant: also runs in the interpreter of the peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], object], device: torch.device, held: Iterable[Tensor]) -> int:
    """Bytes at the peak of `run`, with `held` (weights, inputs) that is there before and after."""
    before = sum(storage.nbytes() for storage in {one.data_ptr(): one.untyped_storage() for one in held}.values())
    if device.type == "cuda":
        wait(device)
        others = torch.cuda.memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - others
    return before + max(0, _most_on_cpu(run))


def _most_on_cpu(run: Callable[[], object]) -> int:
    """The most bytes that are there beyond those that were there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    results = profiled.profiler.kineto_results if profiled.profiler is not None else None
    if results is None:
        raise RuntimeError("torch's profiler gave no record of memory")
    events: list[Any] = results.events()
    taken = sorted((event.start_ns(), number, event.nbytes()) for number, event in enumerate(events)
                   if event.name() == "[memory]")  # fmt: skip
    most = now = 0
    for _, _, size in taken:
        now += size
        most = max(most, now)
    return most
