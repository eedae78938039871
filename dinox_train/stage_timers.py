"""Where an update's time goes: seconds of each stage, without making the host wait for the device.

Invariant: on a GPU the stages that the device computes are timed by events on its own stream, which are read only when
the host has waited for that update's figures anyway; what the host does, and everything on a CPU, is timed by a clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

STAGES: tuple[str, ...] = ("wait", "transfer", "views", "teacher", "student", "backward", "optimizer", "save")
"""wait: for the loader. transfer: of its windows to the device. views: crops and what is drawn for them. teacher: its
passes and the targets. student: its passes and the losses. optimizer: clipping, the update, the teacher's average.
save: what a checkpoint took of the training thread since the line before."""
_OF_THE_HOST = ("wait", "transfer", "save")
"""These end when the host goes on: the transfer waits for its own copy."""
PREFIX = "stage "
"""Of the stages' names in a profiler's trace."""

Timed = Callable[[str], AbstractContextManager[None]]
"""`with timed(STAGE): ...`"""


def untimed(_stage: str) -> AbstractContextManager[None]:
    """Where nobody asks for the time."""
    return nullcontext()


class Stages:
    """What was timed for one update."""

    def __init__(self) -> None:
        self._clocked = dict.fromkeys(STAGES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, stage: str, seconds: float) -> None:
        self._clocked[stage] += seconds

    def add_events(self, stage: str, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._events.append((stage, begin, end))

    def seconds(self) -> dict[str, float]:
        """Of each of STAGES. On a GPU: only after the host has waited for what was launched in them."""
        seconds = dict(self._clocked)
        for stage, begin, end in self._events:
            seconds[stage] += begin.elapsed_time(end) / 1e3
        return seconds


class StageTimers:
    """Times the stages of one update after the other: `with timers(STAGE): ...`, then `take`."""

    def __init__(self, device: torch.device) -> None:
        self._by_events = device.type == "cuda"
        self._stages = Stages()
        self.named = False
        """While a profiler looks on: stages stand in its trace, as PREFIX + STAGE."""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        with torch.profiler.record_function(PREFIX + stage) if self.named else nullcontext():
            if self._by_events and stage not in _OF_THE_HOST:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                yield
                end.record()
                self._stages.add_events(stage, begin, end)
            else:
                begin_s = time.perf_counter()
                yield
                self._stages.add(stage, time.perf_counter() - begin_s)

    def take(self) -> Stages:
        """What was timed since the last call."""
        taken, self._stages = self._stages, Stages()
        return taken
