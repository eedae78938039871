#!/usr/bin/env python3
"""How soon the health guard sees a collapse: real runs that are forced to go wrong at a known update, for each alarm.

    python benchmarks/collapse.py --output DIR                 all of them on made-up volumes, a minute or two
    python benchmarks/collapse.py --output DIR --only blind    one of them

Each run trains soundly in its first stage; the second stage is the fault (two runs have it from the start). From its
first update on is counted until the event `alarm`, with the thresholds and patience that every run has. The share is
that of a run of --length updates (default 50000, configs/vit_s.yaml). The table is printed and written to DIR/table.md,
and to DIR/collapse.json as a result file. A run that is in DIR already is not trained again.
Exit codes: 0 every alarm was seen and none came before its fault · 1 not so, or a run failed
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import machine
import result
import yaml
from collapse_set import write_scanner_set

from dinox_model import PRESETS
from dinox_train.__main__ import main as train
from dinox_train.metrics import read_lines

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
SMALL = {
    "views": {"global_size": 48, "local_size": 32, "num_local": 1},
    "objective": {"head_hidden": 128, "head_bottleneck": 64},
    "train": {"batch_size": 8},
    "evaluate": {"windows": 24, "neighbours": 3},
    "log": {"every": 50},
}
"""Over configs/demo.yaml: what makes a run cheap."""
TINY = {"num_layers": 2, "width": 64, "num_heads": 2, "mlp_hidden": 128}
"""The network, instead of vit_ti's 12 blocks. Thresholds do not depend on its size."""


@dataclass(frozen=True)
class Fault:
    """One way to go wrong."""

    words: str
    alarms: tuple[str, ...]
    """Those that must begin."""
    stage: dict[str, Any]
    """The second stage."""
    run: dict[str, Any] = field(default_factory=dict)
    """What the whole run has besides."""
    from_start: bool = False
    """The whole run has the fault, and the second stage is as the first."""
    scanners: bool = False
    """Trained on volumes that have nothing in them but what two scanners left."""


FAULTS: dict[str, Fault] = {
    "blind": Fault(
        "HU windows in which every pixel is black",
        ("feature_std_low", "rank_low", "patches_alike", "entropy_uniform"),
        {"views": {"level_hu": [5000.0, 5000.0], "width_hu": [10.0, 10.0]}},
    ),
    "not balanced": Fault(
        "a running centre that stands still (no centering), from the first update on",
        ("prototypes_few", "entropy_one_hot"),
        {},
        {"objective": {"balance": "centering", "centre_momentum": 1.0, "koleo": {"weight": 0.0}}},
        from_start=True,
    ),
    "indifferent": Fault(
        "a student temperature of 1e9: every answer is the same",
        ("gradient_zero", "loss_at_ln_k"),
        {"objective": {"student_temperature": 1e9, "koleo": {"weight": 0.0}}},
    ),
    "overexcited": Fault(
        "a student temperature of 1e-4: errors count five hundred times",
        ("loss_spike", "gradient_leap"),
        {
            "objective": {
                "student_temperature": 1e-4,
                "teacher_temperature": 5e-5,
                "teacher_temperature_start": 5e-5,
            }
        },
    ),
    "forgetting": Fault(
        "a weight decay that halves the matrices in every update",
        ("knn_z_falls", "feature_std_low", "rank_low", "patches_alike", "loss_at_ln_k"),
        {
            "optimizer": {"learning_rate": 1e-8, "weight_decay": 5e7, "final_weight_decay": 5e7},
            "teacher": {"momentum": 0.0, "final_momentum": 0.0},
        },
    ),
    "scanners": Fault(
        "volumes without anatomy, of two scanners, from the first update on",
        ("shortcut",),
        {},
        from_start=True,
        scanners=True,
    ),
}
"""By name."""


def overlay(fault: Fault, *, start: int, after: int, every: int) -> dict[str, Any]:
    """The configuration of a run that goes wrong with update `start` + 1, over configs/demo.yaml and SMALL."""
    total = start + after
    return {
        **fault.run,
        "stages": [{"updates": start}, fault.stage],
        "schedule": {"shape": "constant", "warmup_updates": 10},
        "optimizer": {"final_learning_rate": None},
        "train": {"updates": total},
        "checkpoint": {"every": total},
        "evaluate": {"every": every},
    }


def seen_after(folder: Path, start: int) -> tuple[dict[str, int], list[str]]:
    """By alarm, the updates from the fault until it began; and the alarms that began before the fault."""
    events = [one for one in read_lines(folder / "events.jsonl") if one["event"] == "alarm"]
    early = [one["alarm"] for one in events if one["update"] <= start]
    seen: dict[str, int] = {}
    for one in events:
        if one["update"] > start:
            seen.setdefault(one["alarm"], one["update"] - start)
    return seen, early


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="where the runs and the table are written")
    parser.add_argument("--start", type=int, default=120, help="updates before the fault (default 120)")
    parser.add_argument("--after", type=int, default=240, help="updates with it (default 240)")
    parser.add_argument("--every", type=int, default=40, help="updates between evaluations (default 40)")
    parser.add_argument("--length", type=int, default=50_000, help="of the run that shares are of (default 50000)")
    parser.add_argument("--only", choices=FAULTS, help="one fault")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that all runs have")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    made = result.begin(
        "collapse",
        data=[{"name": "made-up volumes"}],
        conditions={
            "config": f"configs/{CONFIG.name}",
            "start": options.start,
            "after": options.after,
            "evaluate.every": options.every,
            "settings": options.overrides,
        },
        versions={"dinox": machine.versions(("torch", "numpy"))},
    )
    made.notes.append(f"nothing is timed; shares are of a run of {options.length} updates")
    rows, failed = [], False
    for name in [options.only] if options.only else list(FAULTS):
        fault, folder = FAULTS[name], options.output / name.replace(" ", "-")
        start = 0 if fault.from_start else options.start
        code = _train(fault, folder, options)
        if code:
            print(f"error: the run {name!r} ended with code {code}; see {folder}/train.log", file=sys.stderr)
            return 1
        seen, early = seen_after(folder, start)
        failed |= bool(early) or any(alarm not in seen for alarm in fault.alarms)
        for alarm in early:
            print(f"error: {name}: {alarm} began before the fault", file=sys.stderr)
        for alarm in fault.alarms:
            after = seen.get(alarm)
            rows.append((alarm, fault.words, after))
            if after is not None:
                figure = made.exact(f"{alarm} ({name})", after, "updates", better="lower")
                share = made.exact(
                    f"{alarm} ({name}), share", 100 * after / options.length, "% of a run", better="lower"
                )
                made.target(f"{figure.name} is seen within 1 % of the run", share, "at most", 1.0)
    table = as_table(rows, options.length)
    (options.output / "table.md").write_text(table, encoding="utf-8")
    result.finish(made, options.output / "collapse.json")
    print(table)
    return int(failed)


def _train(fault: Fault, folder: Path, options: argparse.Namespace) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    shards = write_scanner_set(options.output / "scanners-set") if fault.scanners else "fake"
    files = []
    whole = overlay(fault, start=options.start, after=options.after, every=options.every)
    for name, tree in (("small", SMALL), ("fault", whole)):
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(tree), encoding="utf-8")
    configs = [part for file in (CONFIG, *files) for part in ("--config", str(file))]
    with patch.dict(PRESETS, vit_ti=replace(PRESETS["vit_ti"], **TINY)):
        return train([*configs, f"data.shards={shards}", f"run.folder={folder}", *options.overrides])


def as_table(rows: Sequence[tuple[str, str, int | None]], length: int) -> str:
    """Markdown: alarm, what was forced, after how many updates it was seen, and that as a share."""
    lines = [f"| alarm | forced by | seen after, updates | of {length:,} |", "|---|---|---|---|"]
    for alarm, words, after in rows:
        cells = "not seen | -" if after is None else f"{after} | {100 * after / length:.2f} %"
        lines.append(f"| `{alarm}` | {words} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
