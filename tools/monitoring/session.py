"""The run's set, as the run sees it or at another path, opened for a monitor.

Invariant: a set that is not the run's own is refused, unless it was named as another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dinox_train.config import ConfigError
from dinox_train.data import Dataset, open_dataset
from dinox_train.sections import DataSection
from dinox_train.sections.data import WeightedShards
from monitoring.choice import choose, told
from monitoring.observer import Observer
from monitoring.protocol import Sizes
from monitoring.snapshots import Opened
from monitoring.windows import Windows

FAKE = "fake-shards"
"""Where a run with `data.shards: fake` has its set."""


def begin(
    opened: Opened,
    *,
    run: Path,
    output: Path,
    device: torch.device,
    shards: Sequence[str] | None,
    other_set: bool,
    slices: int | None,
    gallery: int | None,
    say: Callable[[str], None],
) -> Observer:
    """What looks at the checkpoints of a run.

    shards: where its sets lie, in their order; None: where the run found them. Raises ConfigError, LeakError and
    ChoiceError where something else was asked for than there is, ShardError.
    """
    dataset = open_set(opened, run, shards, other_set=other_set, say=say)
    data, sizes = opened.config.data, Sizes.of(opened.config.views.global_size)
    choice = choose(dataset, data, sizes, output, slices, gallery)
    for line in told(choice):
        say(line)
    windows = Windows([source.shards for source in dataset.sources], data.depth, sizes, device)
    return Observer(output, choice, windows, device, own_set=not other_set)


def open_set(
    opened: Opened, run: Path, shards: Sequence[str] | None, *, other_set: bool, say: Callable[[str], None]
) -> Dataset:
    """The sets, with the volumes that the run began with. Errors as `begin`."""
    data = located(opened.config.data, run, shards, other_set=other_set)
    began = None if other_set else opened.checkpoint.state["shards"]
    try:
        return open_dataset(data, run, began, say)
    except ConfigError as error:
        hint = "" if other_set else " (--other-set looks through another set all the same, and the figures say so)"
        raise ConfigError(f"{error}{hint}") from None


def located(data: DataSection, run: Path, shards: Sequence[str] | None, *, other_set: bool) -> DataSection:
    """The section with the sets where they lie. Raises ConfigError where there are more or fewer than the run has."""
    if shards is None:
        # Never made anew here: a monitor that makes the set of a run would look at what was never trained on.
        return data.model_copy(update={"shards": str(run / FAKE)}) if data.shards == "fake" else data
    weights = [None] if isinstance(data.shards, str) else [one.weight for one in data.shards]
    if other_set:
        weights = [None] * len(shards)
    if len(shards) != len(weights):
        raise ConfigError(f"--shards: names {len(shards)} sets, and the run has {len(weights)}; give them in its order")
    if len(shards) == 1:
        return data.model_copy(update={"shards": shards[0], "temperature": None})
    sets = tuple(WeightedShards(path=path, weight=weight) for path, weight in zip(shards, weights, strict=True))
    return data.model_copy(update={"shards": sets, "temperature": data.temperature if not other_set else None})
