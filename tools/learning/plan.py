"""What is made and trained: settings, where each run lies, and the programs that make them.

Invariant: a product that exists is whole, so each stage is skipped or gone on with; the settings of a folder never
change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / "tools"
# Phantoms have nothing to hide: a key that everybody knows gives everybody the same patients on each side.
KEY = b"phantoms have no secrets to keep\n"
LABELS, ALL = "nodules", "all terms"
TERMS = ("dino", "ibot", "koleo")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides every figure."""

    patients: int
    size: int
    slices: int
    val_fraction: float
    seeds: int
    updates: int
    terms: list[str]
    """Those that are switched off in turn."""
    tasks: list[str]
    config: str
    overrides: list[str]


@dataclass(frozen=True)
class Arm:
    """A run of a seed: with all terms of the loss, or without one."""

    seed: int
    without: str | None

    @property
    def name(self) -> str:
        return ALL if self.without is None else f"without {self.without}"

    def folder(self, root: Path) -> Path:
        """Of the run."""
        return root / f"seed-{self.seed}" / self.name.replace(" ", "-")


def arms(settings: Settings) -> list[Arm]:
    """Seed after seed, so that a whole seed is done early."""
    return [Arm(seed, without) for seed in range(settings.seeds) for without in (None, *settings.terms)]


def data_programs(settings: Settings, root: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, words after the interpreter) of what makes the data and is still to do; a program a product."""
    phantom, shards, key = root / "phantom", root / "shards", root / "key"
    if not (shards / "labels" / f"{LABELS}.jsonl").exists():
        size = ["--patients", settings.patients, "--size", settings.size, "--slices", settings.slices]
        yield "phantom", _words(TOOLS / "make_phantom.py", phantom, *size)
        key.write_bytes(KEY)
        sides = ["--key-file", key, "--val-fraction", settings.val_fraction, "--split-seed", 4]
        yield "pack", _words(TOOLS / "pack_shards.py", phantom / "dicom", "--output", shards, *sides)
        labels = phantom / "labels" / f"{LABELS}.jsonl"
        yield "labels", _words(TOOLS / "label_series.py", labels, shards, "--key-file", key)


ALLOWED = {"pack": (0, 3)}
"""Exit codes: 3, some of the phantom's export is no volume, as of a real one."""


def training(settings: Settings, root: Path, arm: Arm) -> list[str]:
    """Words after the interpreter. The same command goes on where a run stopped."""
    given = [f"data.shards={root / 'shards'}", f"run.folder={arm.folder(root)}", f"seed={arm.seed}", "device=cpu"]
    given += [f"train.updates={settings.updates}", f"schedule.updates={settings.updates}"]
    off = [] if arm.without is None else [f"objective.{arm.without}.weight=0"]
    return _words("-m", "dinox_train", "--config", settings.config, *settings.overrides, *given, *off)


def is_trained(settings: Settings, root: Path, arm: Arm) -> bool:
    """Whether its last checkpoint is there."""
    return (arm.folder(root) / "checkpoints" / f"step-{settings.updates:08d}").is_dir()


def _words(*words: object) -> list[str]:
    return [str(word) for word in words]
