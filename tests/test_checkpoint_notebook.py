"""The notebook that looks at a checkpoint: on a run of two updates."""

import re
from pathlib import Path

import pytest

from dinox_train.__main__ import main
from dinox_train.fake import write_fake_set
from tests.test_notebooks import CHECKPOINT, REPOSITORY, run

SMALL = """
device: cpu
views: {global_size: 32, local_size: 16, num_local: 1}
model: {preset: vit_ti}
objective: {prototypes: 64, head_hidden: 64, head_bottleneck: 32}
schedule: {warmup_updates: 1}
train: {updates: 2, batch_size: 4}
evaluate: {windows: 8}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, its shards beside it."""
    folder = tmp_path_factory.mktemp("trained")
    shards = write_fake_set(folder / "shards")
    (folder / "small.yaml").write_text(SMALL)
    assert main(["--config", str(folder / "small.yaml"), f"data.shards={shards}", f"run.folder={folder / 'run'}"]) == 0
    return folder / "run"


def test_a_checkpoint_is_looked_at(trained: Path, tmp_path: Path) -> None:
    printed = run(CHECKPOINT, tmp_path, DINOX_RUN=str(trained))
    first, volumes, slices, attention, neighbours, _ = printed.splitlines()
    assert first.startswith("step-00000002: 5.")
    assert volumes.startswith("12 volumes")
    assert slices == "110 slices of 11 volumes: vectors of 192 numbers"
    assert re.fullmatch(r"attention of 3 heads on \d+ x \d+ patches", attention)
    missed, guess = map(float, re.findall(r"0\.\d+", neighbours))
    assert 0 <= missed < 1
    assert 0.2 < guess < 0.5
    assert not list(tmp_path.iterdir())


def test_the_run_of_the_short_demo(tmp_path: Path) -> None:
    """.ci/run makes that demo, and comes here after it."""
    demo = REPOSITORY / "demo" / "short" / "run"
    if not demo.is_dir():
        pytest.skip("no short demo was made here: make demo SHORT=1")
    assert run(CHECKPOINT, tmp_path, DINOX_RUN=str(demo)).startswith("step-")


def test_without_a_run_it_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="`make demo` makes a run, or set DINOX_RUN to one"):
        run(CHECKPOINT, tmp_path, DINOX_RUN=str(tmp_path))
