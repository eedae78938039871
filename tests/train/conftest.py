"""A small shard set, and a run small enough that a test can afford it whole."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dinox_model import PRESETS
from dinox_train.__main__ import main
from dinox_train.fake import write_fake_set

SMALL = """
device: cpu
views: {global_size: 32, local_size: 16, num_local: 2}
model: {preset: vit_ti}
objective: {prototypes: 64, head_hidden: 64, head_bottleneck: 32}
optimizer: {learning_rate: 1.0e-3, last_layer_frozen_updates: 1}
schedule: {updates: 9, warmup_updates: 2}
train: {updates: 9, batch_size: 4}
checkpoint: {every: 3, keep_last: 2}
evaluate: {every: 4, windows: 12, neighbours: 3}
log: {every: 1}
"""


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards: 12 made-up volumes, 9 to train on and 3 to validate on."""
    return write_fake_set(tmp_path_factory.mktemp("set") / "shards")


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(SMALL)
    return file


@pytest.fixture(scope="module")
def tiny_preset() -> Iterator[None]:
    """vit_ti is a network of two narrow blocks in this module: where the size of it shows nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            PRESETS, "vit_ti", replace(PRESETS["vit_ti"], num_layers=2, width=64, num_heads=2, mlp_hidden=128)
        )
        yield


@pytest.fixture
def train(small_config: Path, small_set: Path) -> Callable[..., int]:
    """Run the trainer in this process: `train(folder, "a.b=value", …)` gives its exit code."""

    def run(folder: Path, *overrides: str) -> int:
        return main(["--config", str(small_config), f"data.shards={small_set}", f"run.folder={folder}", *overrides])

    return run
