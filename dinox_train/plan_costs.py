"""What a run costs beside its time: bytes on the disk, and energy.

Invariant: only the configuration is read, and, where data.shards is a folder that is here, its manifest.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from dinox_io import ShardError
from dinox_io.manifest import manifest_in, set_folder
from dinox_model import ViTConfig
from dinox_train.config import Config
from dinox_train.objectives.objective import Objective
from dinox_train.plan import backbone_numbers, gram_of, heads_of
from dinox_train.plan_machines import Machine
from dinox_train.span import Span

LINE_BYTES = 4096
"""Of an update in metrics.jsonl, at most."""
SLICE_BYTES = Span(0.14e6, 0.22e6)
"""Of a packed slice of 512 x 512: raw / stored 3.7 to 2.4 (docs/loader.md has 2.75 of four public series)."""


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk of a run."""

    checkpoint: int
    kept: int
    """Checkpoints that lie there at the most, the one that is being written among them."""
    lines: int

    @property
    def total(self) -> int:
        return self.checkpoint * self.kept + self.lines


def disk_of(config: Config, vit: ViTConfig, objective: Objective) -> Disk:
    """What a run writes, at the most."""
    every, updates = config.checkpoint, config.train.updates
    for_ever = 0 if every.keep_every is None else updates // every.keep_every
    written = -(-updates // every.every)
    kept = min(every.keep_last + for_ever, written) + 1
    return Disk(checkpoint_bytes(vit, objective), kept, LINE_BYTES * updates)


def checkpoint_bytes(vit: ViTConfig, objective: Objective) -> int:
    """The tensors of a checkpoint, fp32: student and teacher, two moments of the optimizer, a Gram teacher."""
    backbone = backbone_numbers(vit)
    heads = sum(part.numel() for part in heads_of(objective, vit).parameters())
    return 4 * (4 * (backbone + heads) + (backbone if gram_of(objective) else 0))


def set_bytes(config: Config) -> int | None:
    """Of the shards that the configuration names; None where they are not in a folder here."""
    shards = config.data.shards
    paths = [shards] if isinstance(shards, str) else [one.path for one in shards]
    if any("://" in path or not (Path(path) / "manifest.json").is_file() for path in paths):
        return None
    try:
        manifests = [manifest_in(set_folder(path)[0]) for path in paths]
    except (ShardError, OSError):
        return None
    return sum(shard["size"] for manifest in manifests for shard in manifest["shards"])


def free_bytes(config: Config) -> int:
    """What a run may write where its folder is, or will be: what is free, and what earlier checkpoints of it take."""
    folder = Path(config.run.folder).absolute()
    checkpoints = folder / "checkpoints"
    taken = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file())
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free + taken


def kilowatt_hours(config: Config, machine: Machine, seconds: Span) -> Span | None:
    """The energy of a run; None where nobody knows what the machine draws."""
    watts = Span(config.plan.watts, config.plan.watts) if config.plan.watts else machine.watts
    if watts is None:
        return None
    return Span(watts.low * seconds.low / 3.6e6, watts.high * seconds.high / 3.6e6)


def costs_lines(config: Config, vit: ViTConfig, objective: Objective) -> list[str]:
    """Disk, in words."""
    disk, found = disk_of(config, vit, objective), set_bytes(config)
    size = (
        f"the set {found / 2**30:.2f} GiB"
        if found is not None
        else f"the set is not here (a slice of 512 x 512 takes about {SLICE_BYTES.times(1e-6).words('MB')})"
    )
    return [
        f"disk: a checkpoint {disk.checkpoint / 2**30:.2f} GiB, at most {disk.kept} of them "
        f"{disk.checkpoint * disk.kept / 2**30:.1f} GiB; {size}"
    ]


def energy_line(config: Config, machine: Machine, seconds: Span) -> str:
    """Energy, in words."""
    found = kilowatt_hours(config, machine, seconds)
    if found is None:
        return "energy: not known here; plan.watts says what this machine draws"
    whose = "of plan.watts" if config.plan.watts else "of the board alone"
    return f"energy: {found.words('kWh')}, {whose}"
