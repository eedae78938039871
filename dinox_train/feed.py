"""From the loader's int16 windows on the host to the training device.

Invariant: what is on the device are the loader's values; on a GPU they are a copy, and the loader may write its memory
anew as soon as `to_device` has returned.

Where the device has a memory of its own, batches are made in pinned memory if that is measured to be faster, and cross
on a stream of their own, beside what the device computes. Where host and device share one memory, pinning would only
take pages away from everybody, and the batch stays plain.

The slices' filter is undone by the loader's threads, or, where `unfilter` is given, on the device: as many bytes cross,
once, window by window, and the images are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dinox_io import Batch
from dinox_train.platform.facts import find
from dinox_train.platform.kept import Kept
from dinox_train.platform.start import recalled_bandwidth

Unfilter = Callable[[Tensor, np.ndarray, np.ndarray, tuple[int, int]], Tensor]
"""`unfilter` or `unfilter_reference` of dinox_model/kernels/unfilter.py."""

_ALIGNMENT = 16
"""Bytes: where each slice begins, so that a device can load as much at once."""
PINNING_GAIN = 1.1
"""Pinned memory is scarce and slow to get: it must be so many times faster."""


class Feed:
    """Gives the loader its memory (`allocate`), and takes its batches to one device."""

    def __init__(self, device: torch.device, unfilter: Unfilter | None = None, pin: str = "auto") -> None:
        """unfilter: what undoes the filter on the device; None: the loader's threads do. pin: whether batches for a GPU
        are made in pinned memory: on, off, or auto, where that is measured to pay."""
        self.device, self._unfilter = device, unfilter
        on_gpu = device.type == "cuda"
        self.shares_memory = on_gpu and bool(torch.cuda.get_device_properties(device).is_integrated)
        """Host and device use one memory."""
        self.pins = on_gpu and (pin == "on" or (pin == "auto" and self._pinning_pays(device)))
        self._stream = torch.cuda.Stream(device) if on_gpu else None

    def _pinning_pays(self, device: torch.device) -> bool:
        if self.shares_memory:
            return False
        # As it was measured at the start of this run, or of an earlier one on this machine.
        gain = recalled_bandwidth(Kept(find(device)), device).pinning_gain
        return gain is not None and gain >= PINNING_GAIN

    @property
    def filtered(self) -> bool:
        """Whether the loader is to hand out slices that are still filtered."""
        return self._unfilter is not None

    def describe(self) -> str:
        """What is done, for the log."""
        where = "; the device undoes the filter" if self.filtered else ""
        if self._stream is None:
            return f"a copy of the loader's memory{where}" if self.filtered else "the loader's memory itself"
        memory = "pinned" if self.pins else "plain"
        how = "shared with the device" if self.shares_memory else "copied on a stream of its own"
        return f"{memory} memory, {how}{where}"

    def allocate(self, size: int) -> np.ndarray:
        """uint8 (size,) for the loader's slabs; pinned where that pays."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.pins).numpy()

    def to_device(self, batch: Batch) -> Tensor:
        """The windows of `batch`, int16 HU (b, depth, Y, X), on the device; -1024 beyond a slice's true size.

        On CPU the tensor is the loader's memory, without a copy: use it before the next batch is asked for. Windows
        that are still filtered are always copied; ValueError for those where the feed was given no `unfilter`.
        """
        if self._unfilter is not None and batch.filtered:
            moved = self._move_filtered(batch)
            return self._unfilter(moved, batch.sizes, batch.filters, batch.slice_size)
        images = torch.from_numpy(batch.images)
        if self._stream is None:
            return images
        with torch.cuda.stream(self._stream):
            moved = images.to(self.device, non_blocking=self.pins)
        # The copy only: what the device computes meanwhile goes on.
        self._stream.synchronize()
        moved.record_stream(torch.cuda.current_stream(self.device))
        return moved

    def _move_filtered(self, batch: Batch) -> Tensor:
        """uint8 (b, depth, n) on the device: each slice's bytes, then what is not to be read."""
        height, width = batch.slice_size
        shape = (len(batch), len(batch.windows[0]), -(-2 * height * width // _ALIGNMENT) * _ALIGNMENT)
        if self._stream is None:
            return self._copied(batch, shape)
        with torch.cuda.stream(self._stream):
            moved = self._copied(batch, shape)
        self._stream.synchronize()
        moved.record_stream(torch.cuda.current_stream(self.device))
        return moved

    def _copied(self, batch: Batch, shape: tuple[int, int, int]) -> Tensor:
        moved = torch.empty(shape, dtype=torch.uint8, device=self.device)
        for window, place in zip(batch.windows, moved, strict=True):
            # Slices that lie apart, here or there, would be gathered before or spread after the copy: each goes alone.
            together = window.flags.c_contiguous and window.shape[1] == shape[2]
            parts = [(window, place)] if together else zip(window, place, strict=True)
            for source, there in parts:
                there[..., : source.shape[-1]].copy_(torch.from_numpy(source), non_blocking=self.pins)
        return moved
