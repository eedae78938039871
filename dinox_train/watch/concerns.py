"""What in the readings of the machine is an event: heat that slows the GPU, memory and disk that come to an end.

Each concern is told once when it has lasted, and once when it is over; between its two limits, and where a figure
cannot be read, it stays as it is. The advice is part of the text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Reading = Mapping[str, Any]

PATIENCE = 3
"""Readings in a row that a concern must last before it is told, and that it must be away before it is over."""
LOADED, HOT_C, FALLEN = 0.8, 80.0, 0.85
"""A GPU throttles where it is busy for this share of the time, this hot, and below this share of its own clock."""
_LEVEL_OF, _LEVEL_FROM = 4096, 30
"""The GPU's own clock is the 90th percentile of so many readings under load; with fewer than the second, unknown."""
HOST_SHARE, HOST_SHARED_BYTES = 0.05, 6 * 2**30
"""Free host memory below this share of it is little; where the GPU has no memory of its own, below this too."""
SWAP_BYTES, SWAP_S = 256 * 2**20, 600.0
"""Swap that grows by so much within so many seconds."""
PRESSED, EASED = 0.10, 0.02
"""Share of time in which tasks wait for memory: too much, and none to speak of."""
DISK_LITTLE, DISK_ENOUGH = 1.5, 2.0
"""Free disk space, in checkpoints: the new one is written before an old one goes."""
_OVER = 1.2
"""Free memory must be so many times the limit before little of it is over."""


CONCERNS = ("throttling", "host memory", "swap", "memory pressure", "disk")
"""The names of the events; `NAME over` ends one."""


class Lasting:
    """Whether something has lasted, and is then over."""

    def __init__(self, patience: int = PATIENCE) -> None:
        self._patience, self._in_a_row, self.on = patience, 0, False

    def see(self, holds: bool | None) -> bool:
        """Whether `on` changes with this reading. None: unknown, or between the limits."""
        self._in_a_row = self._in_a_row + 1 if holds is not None and holds != self.on else 0
        if self._in_a_row < self._patience:
            return False
        self._in_a_row, self.on = 0, not self.on
        return True


class OwnClock:
    """The clock that this GPU has under load, from its own readings: no table of products is needed."""

    def __init__(self) -> None:
        self._clocks: deque[float] = deque(maxlen=_LEVEL_OF)

    def level(self) -> float | None:
        """MHz; None until it is known."""
        return float(np.percentile(self._clocks, 90)) if len(self._clocks) >= _LEVEL_FROM else None

    def has_fallen(self, reading: Reading) -> bool | None:
        """Whether the clock is well below its level, under load and hot; None where it is idle or unknown."""
        busy, clock, heat = (reading[f"gpu_{name}"] for name in ("busy", "clock_mhz", "temperature_c"))
        if busy is None or clock is None or busy < LOADED:
            return None
        level = self.level()
        low = level is not None and clock < FALLEN * level
        if not low:
            self._clocks.append(clock)  # what is low is not the level, however long it lasts
        return None if heat is None else low and heat >= HOT_C


class Concerns:
    """What is told of the readings of one process: `see` each."""

    def __init__(self, host_bytes: int, *, shared: bool) -> None:
        """host_bytes: all memory of the host. shared: the GPU has none of its own."""
        self._little = max(HOST_SHARE * host_bytes, min(HOST_SHARED_BYTES, host_bytes / 4) if shared else 0)
        self._clock = OwnClock()
        self._swap: deque[tuple[float, int]] = deque()
        self._lasting = {name: Lasting() for name in CONCERNS}

    def see(self, reading: Reading, checkpoint_bytes: int | None) -> list[tuple[str, str]]:
        """The events that this reading makes, as name and text; one that ends is `NAME over`.

        checkpoint_bytes: what a checkpoint takes on the disk; None: not known yet.
        """
        events = []
        reading = {**reading, "checkpoint_bytes": checkpoint_bytes}
        for name, (holds, words) in zip(CONCERNS, self._rules(), strict=True):
            if self._lasting[name].see(holds(reading)):
                began = self._lasting[name].on
                events.append((name, words(reading)) if began else (f"{name} over", "as it was before"))
        return events

    def _rules(self) -> tuple[tuple[Callable[[Reading], bool | None], Callable[[Reading], str]], ...]:
        """Of each of CONCERNS: whether it holds (None: unknown, or between its limits), and its words."""
        return (
            (self._throttles, self._throttling_in_words),
            (self._host_is_full, _host_memory_in_words),
            (self._swap_grows, _swap_in_words),
            (_is_pressed, _pressure_in_words),
            (_disk_is_full, _disk_in_words),
        )

    def _throttles(self, reading: Reading) -> bool | None:
        fallen, told = self._clock.has_fallen(reading), reading["gpu_throttled"]
        if fallen or told:
            return True
        return None if fallen is None and told is None else False

    def _throttling_in_words(self, reading: Reading) -> str:
        clock, heat, level = reading["gpu_clock_mhz"], reading["gpu_temperature_c"], self._clock.level()
        at = "" if heat is None else f" at {heat:.0f} °C"
        of = "" if level is None else f" (its own under load: {level:.0f} MHz)"
        now = "the GPU's clock" if clock is None else f"the GPU's clock of {clock:.0f} MHz{of}"
        return (
            f"{now} is held down{at}: the run is slower, and heat is what ends long runs. Clean dust, make room for "
            "air, raise the fans, cool the room; else lower the GPU's power limit a little, since a steady clock beats "
            "one that leaps (docs/hardware.md)."
        )

    def _host_is_full(self, reading: Reading) -> bool | None:
        free = reading["host_free_bytes"]
        return None if free is None or self._little <= free < _OVER * self._little else free < self._little

    def _swap_grows(self, reading: Reading) -> bool | None:
        used, now = reading["swap_used_bytes"], reading["elapsed_s"]
        if used is None:
            return None
        self._swap.append((now, used))
        while now - self._swap[0][0] > SWAP_S:
            self._swap.popleft()
        grown = used - min(size for _, size in self._swap)
        return None if SWAP_BYTES / 4 <= grown < SWAP_BYTES else grown >= SWAP_BYTES


def _is_pressed(reading: Reading) -> bool | None:
    share = reading["pressure_memory"]
    return None if share is None or EASED <= share < PRESSED else share >= PRESSED


def _disk_is_full(reading: Reading) -> bool | None:
    free, checkpoint = reading["disk_free_bytes"], reading["checkpoint_bytes"]
    if free is None or not checkpoint or DISK_LITTLE <= free / checkpoint < DISK_ENOUGH:
        return None
    return free < DISK_LITTLE * checkpoint


_LESS_MEMORY = (
    "End other programs, or stop the run (SIGTERM: it keeps a checkpoint) and start it with lower data.cache_mib, "
    "data.pool_mib or data.prefetch_mib."
)


def _host_memory_in_words(reading: Reading) -> str:
    free = f"{reading['host_free_bytes'] / 2**30:.1f} GiB"
    return f"{free} of host memory are left; the kernel ends a program when there is none. {_LESS_MEMORY}"


def _swap_in_words(reading: Reading) -> str:
    used = f"{reading['swap_used_bytes'] / 2**30:.1f} GiB"
    return f"swap grows, to {used} now: memory is moved to the disk, and what waits for it is slow. {_LESS_MEMORY}"


def _pressure_in_words(reading: Reading) -> str:
    share = f"{reading['pressure_memory']:.0%}"
    return f"programs wait for memory in {share} of the time (the kernel's pressure figure). {_LESS_MEMORY}"


def _disk_in_words(reading: Reading) -> str:
    free, size = (reading[name] / 2**30 for name in ("disk_free_bytes", "checkpoint_bytes"))
    return (
        f"{free:.1f} GiB are free on the run folder's disk and a checkpoint takes {size:.1f} GiB: the next one may not "
        "fit. Make room, or lower checkpoint.keep_last or raise checkpoint.keep_every."
    )
