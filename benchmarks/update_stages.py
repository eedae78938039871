"""Where an update's time goes: a clock that is read between the stages of dinox_train/step.py, which knows nothing of
it.

On a GPU the clock waits for the device at each reading, which the step itself never does: shares of such updates, not
their length, are what is reported. Invariant: the stages of an update add up to its length.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from peak_memory import wait
from torch import Tensor, nn
from update_case import OurUpdate

from dinox_train.network import Networks
from dinox_train.objectives.dinov3 import DINOv3, DINOv3Settings, Observed, Target
from dinox_train.objectives.objective import Aim, Losses, Values
from dinox_train.view_batch import ViewBatch

TEACHER, GRAM, STUDENT, LOSSES, BACKWARD = "teacher", "Gram teacher", "student forward", "losses", "backward"
CLIP, ADAMW, AVERAGE, OTHER = "clipping", "AdamW", "teacher's average", "other"


class StageClock:
    """Time by stage; `lap` ends one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last = 0.0

    def start(self) -> None:
        """Forget everything; the first stage begins."""
        self.seconds.clear()
        wait(self.device)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """What passed since the last reading was `stage`."""
        wait(self.device)
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now


class ClockedObjective(DINOv3):
    """The objective, with a reading at the end of each of its stages."""

    def __init__(self, settings: DINOv3Settings, clock: StageClock) -> None:
        super().__init__(settings)
        self.clock = clock

    def observe(self, networks: Networks, batch: ViewBatch, values: Values) -> Observed:
        self.clock.lap(OTHER)
        observed = super().observe(networks, batch, values)
        self.clock.lap(TEACHER)
        return observed

    def aim(self, observed: Sequence[Observed], values: Values, state: Mapping[str, Tensor]) -> Aim:
        aim = super().aim(observed, values, state)
        self.clock.lap(LOSSES)
        return aim

    def couple(
        self, networks: Networks, batches: Sequence[ViewBatch], targets: Sequence[Target], values: Values
    ) -> Sequence[Target]:
        coupled = super().couple(networks, batches, targets, values)
        self.clock.lap(LOSSES)
        return coupled

    def losses(
        self, networks: Networks, batch: ViewBatch, targets: Target, values: Values, *, total_images: int
    ) -> Losses:
        self.clock.lap(OTHER)
        losses = super().losses(networks, batch, targets, values, total_images=total_images)
        self.clock.lap(LOSSES)
        return losses


def read_stages(update: OurUpdate, clock: StageClock, updates: int) -> list[dict[str, float]]:
    """Seconds by stage of so many updates, after one that does not count. `update` is clocked from now on."""
    _put_clock(update, clock)
    found = []
    for _ in range(updates + 1):
        clock.start()
        update.run()
        clock.lap(OTHER)
        found.append(dict(clock.seconds))
    return found[1:]


def _put_clock(update: OurUpdate, clock: StageClock) -> None:
    networks = update.networks
    for module in (networks.student.backbone, *networks.student.heads.values()):
        _clock_forward(module, clock, STUDENT)
    if networks.gram is not None:
        _clock_forward(networks.gram, clock, GRAM)
    update.optimizer.register_step_pre_hook(lambda *_: clock.lap(CLIP))
    update.optimizer.register_step_post_hook(lambda *_: clock.lap(ADAMW))
    student: Any = networks.student_weights
    student.gather_gradients = _reading_before(student.gather_gradients, clock, BACKWARD)
    student.refresh = _reading_before(student.refresh, clock, AVERAGE)


def _clock_forward(module: nn.Module, clock: StageClock, stage: str) -> None:
    """Between two forwards of networks lies what the losses do."""
    module.register_forward_pre_hook(lambda *_: clock.lap(LOSSES))
    module.register_forward_hook(lambda *_: clock.lap(stage))


def _reading_before(function: Callable[[], None], clock: StageClock, stage: str) -> Callable[[], None]:
    @wraps(function)
    def read() -> None:
        clock.lap(stage)
        function()

    return read
