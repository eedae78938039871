"""The stages of a run: which configuration holds in which update.

Updates are counted through the whole run, and schedules are functions of that count: a stage does not begin anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dinox_train.config import Config, stage_configs


@dataclass(frozen=True)
class Stage:
    """One part of a run."""

    number: int
    """From 1."""
    first: int
    """Its first update, counted from 1."""
    last: int | None
    """Its last; None: to the end of the run, wherever that is."""
    config: Config
    """The run's configuration as it is here."""

    def updates_until(self, update: int) -> int:
        """How many of its updates are done when the run has done `update`."""
        last = update if self.last is None else min(update, self.last)
        return max(last - self.first + 1, 0)


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages, at least one. The last goes on where the run is longer than all of them."""
    stages, first = [], 1
    configs = stage_configs(config)
    for number, there in enumerate(configs, 1):
        length = config.stages[number - 1].updates if config.stages else None
        last = None if length is None or number == len(configs) else first + length - 1
        stages.append(Stage(number, first, last, there))
        first = first if last is None else last + 1
    return tuple(stages)


def stage_of(stages: Sequence[Stage], update: int) -> Stage:
    """The stage that update number `update` (from 1) is in."""
    return next(stage for stage in stages if stage.last is None or update <= stage.last)
