"""One run folder in a few figures, read line by line: a long run's metrics are gigabytes.

Invariant: nothing is written, and a folder that cannot be read is a RunError with its reason, not a guess.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from supervision.ledger import read_rows, restarts

ALIVE_S = 900.0
"""A heartbeat that is not older than that is of a run that goes on."""
BEST = {"loss_val": min, "knn_z": max, "knn_label": max}


class RunError(ValueError):
    """A folder that is no run, or whose files are damaged: which, why."""


@dataclass(frozen=True)
class Best:
    """The best value of a figure, and the update it is of."""

    value: float
    update: int


@dataclass
class Progress:
    """What metrics.jsonl tells of a run."""

    update: int = 0
    images: int = 0
    seconds: float = 0.0
    """Of updates, as images / images_per_s: without pauses, evaluations, checkpoints, and without work that was lost
    and done again."""
    not_applied: int = 0
    best: dict[str, Best] = field(default_factory=dict)

    def take(self, line: Mapping[str, Any]) -> None:
        """One line. Raises KeyError, TypeError, ValueError where it is none of ours."""
        update, images = int(line["update"]), int(line["images"])
        speed = _finite(line.get("images_per_s"))
        if speed:
            self.seconds += (images - self.images) / speed
        self.update, self.images = update, images
        self.not_applied += line.get("applied") is False
        for name, better in BEST.items():
            value = _finite(line.get(name))
            before = self.best.get(name)
            if value is not None and (before is None or better(value, before.value) != before.value):
                self.best[name] = Best(value, update)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder. `config` is its resolved configuration, flat (`model.preset`); `age_s`: of its heartbeat."""

    folder: Path
    config: dict[str, Any]
    updates: int
    progress: Progress
    state: str
    """done, running, silent (no word for ALIVE_S and no end), waiting (no update yet) or stopped."""
    why: str
    age_s: float | None
    sets: tuple[str, ...]
    environment: dict[str, Any]
    restarts: int

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        best = {name: vars(found) for name, found in self.progress.best.items()}
        environment = {name: self.environment.get(name) for name in ("commit", "device", "gpu", "packages")}
        return {
            "folder": str(self.folder),
            "state": self.state,
            "why": self.why,
            "heartbeat_age_s": self.age_s,
            "update": self.progress.update,
            "updates": self.updates,
            "images": self.progress.images,
            "hours": self.progress.seconds / 3600,
            "not_applied": self.progress.not_applied,
            "best": {name: best.get(name) for name in BEST},
            "sets": list(self.sets),
            "restarts": self.restarts,
            "environment": environment,
            "config": self.config,
        }


def read_run(folder: Path) -> Run:
    """The run in a folder. Raises RunError."""
    try:
        config = _config(folder)
        updates = config.get("train.updates")
        if not isinstance(updates, int):
            raise RunError(f"{folder}: config.yaml is none of a run of DINOX: it has no train.updates")
        progress = Progress()
        for number, line in lines_of(folder / "metrics.jsonl"):
            try:
                progress.take(line)
            except (KeyError, TypeError, ValueError):
                raise RunError(f"{folder / 'metrics.jsonl'}:{number}: not a line of a run of DINOX") from None
        events = [line for _, line in lines_of(folder / "events.jsonl")]
        environment = _environment(folder)
        rows = read_rows(folder)
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None
    except RunError:
        raise
    except (ValueError, RecursionError) as error:
        raise RunError(str(error)) from None
    age_s = _age_s(folder)
    state, why = _state(progress.update >= updates, events, rows, age_s)
    return Run(
        folder=folder,
        config=config,
        updates=updates,
        progress=progress,
        state=state,
        why=why,
        age_s=age_s,
        sets=_sets(environment),
        environment=environment,
        restarts=restarts(rows),
    )


def lines_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line of a JSON-lines file; a torn last line is left out, a missing file is empty.

    Raises RunError for another line that is no JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n"):
                    return
                value = None
            if not isinstance(value, dict):
                raise RunError(f"{path}:{number}: not a JSON object; the file is damaged") from None
            yield number, value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration's tree as `{"a.b": value}`; lists stay values."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    if not file.is_file():
        raise RunError(f"{folder}: not a run of DINOX: it has no config.yaml")
    try:
        tree = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise RunError(f"{file}: not valid YAML; the file is damaged") from None
    if not isinstance(tree, dict):
        raise RunError(f"{file}: holds no configuration")
    return flat(tree)


def _environment(folder: Path) -> dict[str, Any]:
    file = folder / "env.json"
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RunError(f"{file}: not a JSON object; the file is damaged")
    return value


def _sets(environment: Mapping[str, Any]) -> tuple[str, ...]:
    shards = environment.get("shards")
    noted = [one.get("digest") for one in shards if isinstance(one, dict)] if isinstance(shards, list) else []
    noted.append(environment.get("shards_digest"))  # where earlier versions noted the one set there was
    return tuple(digest for digest in noted if isinstance(digest, str))


def _age_s(folder: Path) -> float | None:
    try:
        return max(time.time() - (folder / "heartbeat").stat().st_mtime, 0.0)
    except OSError:
        return None


def _state(
    done: bool, events: list[dict[str, Any]], rows: list[dict[str, Any]], age_s: float | None
) -> tuple[str, str]:
    if done:
        return "done", ""
    last = events[-1].get("event") if events else None
    if last in ("ended", "stopped"):
        # The guard's reason stands before the end.
        said = [event for event in events[-2:] if event.get("event") in ("stopped", "ended")]
        why = str(said[0].get("text", ""))
        return "stopped", f"{why}; {_left(rows)}" if _left(rows) else why
    if _left(rows):
        return "stopped", _left(rows)
    if age_s is None:
        return "waiting", "no update is done yet"
    return ("running", "") if age_s <= ALIVE_S else ("silent", "killed, or it hangs")


def _left(rows: list[dict[str, Any]]) -> str:
    """Why a supervisor does not start it again; empty where it does, or there is none."""
    if rows and rows[-1]["event"] == "end" and rows[-1]["next"] == "stop":
        return f"not started again: {rows[-1].get('because', '')}"
    return ""


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
