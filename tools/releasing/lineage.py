"""Where a network comes from: sets, configuration, code, updates, images, hours and energy, as the run recorded them.

Invariant: what was not recorded is None, never guessed; no path of the machine that trained it, and no patient, is in
it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probing.ancestry import ancestry_of
from probing.pretraining import manifest_of
from probing.source import Source

from dinox_train.metrics import read_lines

PUBLIC_SECTIONS = (
    *("model", "views", "objective", "optimizer", "schedule", "teacher", "train", "stages"),
    *("precision", "seed", "execution", "kernels", "deterministic"),
)
"""Of the configuration, what a reader needs to train alike. The others name folders, commands and machines."""
PUBLIC_DATA = ("depth", "step", "step_mm", "every", "every_mm", "edge", "limit", "mode", "run_length", "temperature")


@dataclass(frozen=True)
class Set:
    """A set that the network, or one that it began with, was trained on."""

    digest: str
    about: dict[str, str] | None
    found: bool
    """Whether its manifest lies somewhere that was looked at."""


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Of one network."""

    sets: tuple[Set, ...]
    """Those of earlier runs that it began with come after its own."""
    started_from: str | None
    """Weights without a record of ours that the first of these runs began with."""
    config: dict[str, Any]
    config_digest: str
    """sha256 of the whole configuration, with what `config` leaves out."""
    commit: str | None
    was_changed: bool | None
    """Whether the code differed from that commit."""
    dinox_version: str | None
    machine: dict[str, Any]
    update: int
    images: int | None
    hours: float | None
    """Spent in updates; of this run alone, without those that it began with."""
    gpu_kwh: float | None

    def json(self) -> dict[str, Any]:
        """As it stands in lineage.json."""
        return {
            "sets": [{"digest": one.digest, "about": one.about} for one in self.sets],
            "started_from": self.started_from,
            "config": self.config,
            "config_digest": self.config_digest,
            "commit": self.commit,
            "code_was_changed": self.was_changed,
            "machine": self.machine,
            "updates": self.update,
            "images": self.images,
            "hours": self.hours,
            "gpu_kwh": self.gpu_kwh,
            "dinox_version": self.dinox_version,
        }


def lineage_of(source: Source, run: Path | None, places: Sequence[Path]) -> Lineage:
    """What is known. run: the folder of the run, for its lines; places: where sets may lie, beside where they did.

    Raises ValueError for weights without a record of their training.
    """
    if source.state is None or source.update is None:
        raise ValueError(f"{source.folder}: these weights have no record of their training; give a run or a checkpoint")
    config = source.state["config"]
    sets, started_from = _ancestry(source, places)
    known = json.loads((run / "env.json").read_bytes()) if run and (run / "env.json").is_file() else {}
    facts = (known.get("platform") or {}).get("facts") or {}
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["update"] <= source.update] if run else []
    return Lineage(
        sets=tuple(sets),
        started_from=started_from,
        config=public_config(config),
        config_digest=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        commit=known.get("commit"),
        was_changed=known.get("dirty"),
        dinox_version=(known.get("packages") or {}).get("dinox"),
        machine={name: facts.get(name) for name in ("kind", "name")} | {"torch": facts.get("torch")},
        update=source.update,
        images=lines[-1].get("images") if lines else None,
        hours=hours_of(lines),
        gpu_kwh=kwh_of(read_lines(run / "system.jsonl"), source.update) if run else None,
    )


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """The sections of PUBLIC_SECTIONS, and of the data what says how windows are cut."""
    found = {name: config[name] for name in PUBLIC_SECTIONS if name in config}
    return found | {"data": {name: config["data"][name] for name in PUBLIC_DATA if name in config["data"]}}


def hours_of(lines: Sequence[dict[str, Any]]) -> float | None:
    """The time of all updates: images of each over its images a second. None where a line does not say."""
    seconds, before = 0.0, 0
    for line in lines:
        images, speed = line.get("images"), line.get("images_per_s")
        if images is None or not speed:
            return None
        seconds, before = seconds + (images - before) / speed, images
    return round(seconds / 3600, 4) if lines else None


def kwh_of(lines: Sequence[dict[str, Any]], update: int) -> float | None:
    """Energy of the GPU by system.jsonl, up to an update: its power, by the trapezoid between samples of one process.
    None where a sample lacks it."""
    used = [line for line in lines if line.get("update", 0) <= update]
    if not used or any(line.get("gpu_power_w") is None for line in used):
        return None
    joules = 0.0
    for before, now in itertools.pairwise(used):
        spent_s = now["elapsed_s"] - before["elapsed_s"]
        if spent_s > 0:  # else another process began
            joules += spent_s * (before["gpu_power_w"] + now["gpu_power_w"]) / 2
    return round(joules / 3.6e6, 4)


def _ancestry(source: Source, places: Sequence[Path]) -> tuple[list[Set], str | None]:
    """The sets of the network and of those that it began with; and the weights without a record at the beginning."""
    assert source.state is not None
    ancestry, sets = ancestry_of(source.state, source.folder), {}
    for state, folder in ancestry.runs:
        named = state["config"]["data"]["shards"]
        own = [named] if isinstance(named, str) else [one["path"] for one in named]
        if own == ["fake"]:
            own = [str(folder.parent.parent / "fake-shards")]
        for digest, _ in state["shards"]:
            manifest = manifest_of(digest, [*places, *own])
            if digest not in sets or manifest is not None:
                sets[digest] = Set(digest, None if manifest is None else manifest.get("about"), manifest is not None)
    return list(sets.values()), ancestry.weights
