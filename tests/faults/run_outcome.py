"""What a run has come to, without what depends on the clock and the machine."""

from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file

from dinox_train.checkpoint import list_checkpoints
from dinox_train.evaluate import Evaluation
from dinox_train.metrics import VARYING, read_lines

EVALUATED = {field.name for field in fields(Evaluation)}
"""A run evaluates where it ends, so that one which was cut in two has more of these."""


def lines(folder: Path) -> list[dict[str, object]]:
    """The lines of the run folder without what may vary."""
    return [
        {key: value for key, value in line.items() if key not in VARYING | EVALUATED}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def events(folder: Path) -> list[tuple[str, str]]:
    """Names and texts of the run's events."""
    return [(event["event"], event["text"]) for event in read_lines(folder / "events.jsonl")]


def updates_saved(folder: Path) -> list[int]:
    """The updates of the checkpoints that stand."""
    return [int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints")]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by file and name."""
    return {
        f"{file.relative_to(checkpoint)}/{name}": value
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_same_run(first: Path, second: Path) -> None:
    """Bit for bit: every line, and every tensor of the last checkpoint."""
    assert lines(first) == lines(second)
    last = updates_saved(first)[-1]
    assert updates_saved(second)[-1] == last
    name = f"checkpoints/step-{last:08d}"
    one, other = tensors(first / name), tensors(second / name)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
