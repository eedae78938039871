"""A copy of a run's tensors in the host's memory, taken in one go and kept until the next: what a checkpoint is made of
while training goes on.

Invariant: after `take` the copy is of one moment, whatever happens to the tensors from then on. Before it is read,
`arrive` waits for it: a device copies in the order of its work.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Named = Mapping[str, Mapping[str, Tensor]]


def bytes_of(tensors: Named) -> int:
    """Bytes that a copy of `tensors` takes."""
    return sum(value.numel() * value.element_size() for named in tensors.values() for value in named.values())


class HostCopy:
    """Buffers on the host, made at the first copy and used again by all later ones; pinned where a GPU copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._arrived: torch.cuda.Event | None = None

    def take(self, tensors: Named) -> dict[str, dict[str, Tensor]]:
        """Copy `tensors`, by file and name. What was given out before is written over."""
        on_gpu = self._device.type == "cuda"
        kept = {
            file: {name: self._buffer(file, name, value) for name, value in named.items()}
            for file, named in tensors.items()
        }
        for file, named in tensors.items():
            for name, value in named.items():
                kept[file][name].copy_(value.detach(), non_blocking=on_gpu)
        if on_gpu:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(self._device))
        self._kept = kept
        return kept

    def arrive(self) -> None:
        """Wait until all of the copy is there."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def _buffer(self, file: str, name: str, value: Tensor) -> Tensor:
        there = self._kept.get(file, {}).get(name)
        if there is not None and there.shape == value.shape and there.dtype == value.dtype:
            return there
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
