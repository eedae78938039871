"""A configuration, and what a run makes of it: device, set, loader, learner.

Invariant: everything is made as `python -m dinox_train` makes it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dinox_io import Loader
from dinox_model.host_memory import keep_freed_memory
from dinox_train.__main__ import settle_machine, settled
from dinox_train.config import Config, load_config
from dinox_train.data import Dataset, open_dataset
from dinox_train.feed import Feed
from dinox_train.learner import Learner, preprocess_of
from dinox_train.platform import choose_device, make_deterministic
from dinox_train.platform.start import Platform
from dinox_train.run import log
from dinox_train.windows import open_loader


def configured(file: str, overrides: Sequence[str]) -> Config:
    """As a run settles it. Raises ConfigError."""
    return settled(load_config([file], overrides), None)


def opened(config: Config, folder: str, say: Callable[[str], None] = print) -> Dataset:
    """The sets that the configuration names."""
    return open_dataset(config.data, Path(folder), None, say)


@dataclass
class Learning:
    """Everything of a run but its loop."""

    config: Config
    device: torch.device
    platform: Platform
    dataset: Dataset
    learner: Learner
    feed: Feed

    def loader(self) -> Loader:
        """Its loader, as the run begins."""
        return open_loader(self.config, self.dataset, self.feed, 0)


def begin(file: str, overrides: Sequence[str], folder: str) -> Learning:
    """As a run begins, before its first update."""
    config = configured(file, overrides)
    device = choose_device(config.device)
    if config.deterministic:
        make_deterministic()
    if device.type == "cpu":
        keep_freed_memory()
    log.addHandler(logging.StreamHandler(sys.stdout))
    platform, kernels = settle_machine(config, device)
    dataset = opened(config, folder)
    learner = Learner(config, preprocess_of(config, dataset.hu_histogram), device, kernels, platform.routes)
    learner.enter(1)
    feed = Feed(device, learner.kernels.unfilter, config.data.pin)
    return Learning(config, device, platform, dataset, learner, feed)
