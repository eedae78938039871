"""From the loader's int16 windows on the host to the training device.

Invariant: what is on the device are the loader's values; on a GPU they are a copy, and the loader may write its memory
anew as soon as `to_device` has returned.

Where the device has a memory of its own, batches are made in pinned memory if that is measured to be faster, and cross
on a stream of their own, beside what the device computes. Where host and device share one memory, pinning would only
take pages away from everybody, and the batch stays plain.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from dinox_io import Batch

_TRIAL_BYTES = 32 << 20
_TRIALS = 5
PINNING_GAIN = 1.1
"""Pinned memory is scarce and slow to get: it must be so many times faster."""


class Feed:
    """Gives the loader its memory (`allocate`), and takes its batches to one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        self.shares_memory = on_gpu and bool(torch.cuda.get_device_properties(device).is_integrated)
        """Host and device use one memory."""
        self.pins = on_gpu and not self.shares_memory and _pinning_gain(device) >= PINNING_GAIN
        self._stream = torch.cuda.Stream(device) if on_gpu else None

    def describe(self) -> str:
        """What is done, for the log."""
        if self._stream is None:
            return "the loader's memory itself"
        memory = "pinned" if self.pins else "plain"
        return f"{memory} memory, {'shared with the device' if self.shares_memory else 'copied on a stream of its own'}"

    def allocate(self, size: int) -> np.ndarray:
        """uint8 (size,) for the loader's slabs; pinned where that pays."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.pins).numpy()

    def to_device(self, batch: Batch) -> Tensor:
        """The windows of `batch`, int16 HU (b, depth, Y, X), on the device; -1024 beyond a slice's true size.

        On CPU the tensor is the loader's memory, without a copy: use it before the next batch is asked for.
        """
        images = torch.from_numpy(batch.images)
        if self._stream is None:
            return images
        with torch.cuda.stream(self._stream):
            moved = images.to(self.device, non_blocking=self.pins)
        # The copy only: what the device computes meanwhile goes on.
        self._stream.synchronize()
        moved.record_stream(torch.cuda.current_stream(self.device))
        return moved


def _pinning_gain(device: torch.device) -> float:
    """How many times faster a copy to the device is from pinned memory, the memory being there already."""
    plain = torch.empty(_TRIAL_BYTES, dtype=torch.uint8).fill_(1)
    pinned = plain.pin_memory()
    there = torch.empty(_TRIAL_BYTES, dtype=torch.uint8, device=device)

    def seconds(source: Tensor) -> float:
        best_s = float("inf")
        for _ in range(_TRIALS):
            torch.cuda.synchronize(device)
            begin_s = time.perf_counter()
            there.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)
            best_s = min(best_s, time.perf_counter() - begin_s)
        return best_s

    return seconds(plain) / seconds(pinned)
