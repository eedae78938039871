#!/usr/bin/env python3
"""What each term of the objective does, in a short run: train with all of them, then with each one off.

    python benchmarks/ablation.py --output DIR                     on made-up volumes, some minutes on two cores
    python benchmarks/ablation.py --shards SHARDS --output DIR     on a set of your own

Every run has the same seed, windows and views; only the terms differ. The table shows the means of terms and health
figures over the last tenth of the updates, and knn_z of the evaluation at the end. It is written to DIR/table.md, and
to DIR/ablation.json as a result file. A run that is in DIR already is not trained again. On a CPU the same command
gives the same table. Exit codes: 0 done · 1 a run failed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import result

from dinox_train.__main__ import main as train
from dinox_train.metrics import read_lines

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
GRAM = ("objective.gram.weight=1.0", "objective.gram.start={half}")
VARIANTS: dict[str, tuple[str, ...]] = {
    "all": GRAM,
    "no DINO": (*GRAM, "objective.dino.weight=0.0"),
    "no iBOT": (*GRAM, "objective.ibot.weight=0.0"),
    "no KoLeo": (*GRAM, "objective.koleo.weight=0.0"),
    "no Gram": (),
    "DINO alone": ("objective.ibot.weight=0.0", "objective.koleo.weight=0.0"),
    "all, centering": (*GRAM, "objective.balance=centering"),
}
"""By name, what differs from configs/demo.yaml."""
COLUMNS = {
    "loss_dino": ("nats", "lower"),
    "loss_ibot": ("nats", "lower"),
    "loss_koleo": ("nats", "lower"),
    "loss_gram": ("squared cosine", "lower"),
    "teacher_entropy": ("of ln K", "lower"),
    "prototype_use": ("share", "higher"),
    "feature_std": ("of a sphere's", "higher"),
    "effective_rank": ("directions", "higher"),
    "knn_z": ("R2", "higher"),
}
"""Keys of a run's lines: their unit, and which way is better."""

Rows = Mapping[str, Mapping[str, float | None]]
"""By the name of a variant, its figure in each column; None where a term is off or nothing was evaluated."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="fake", help="a folder of shards, or fake (default)")
    parser.add_argument("--output", type=Path, required=True, help="where the runs and table.md are written")
    parser.add_argument("--updates", type=int, default=100, help="length of each run (default 100)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that all runs have")
    options = parser.parse_args(arguments)
    settings = [f"train.updates={options.updates}", *options.overrides]
    made = result.begin(
        "ablation",
        data=[{"name": Path(options.shards).name}],
        conditions={"config": f"configs/{CONFIG.name}", "settings": settings},
        versions={"dinox": machine.versions(("torch", "numpy"))},
    )
    made.notes.append("nothing is timed: load does not change these figures; they are of one seed")
    rows = {}
    for name, differs in VARIANTS.items():
        folder = options.output / name.replace(", ", "-").replace(" ", "-")
        common = (
            *(f"data.shards={options.shards}", f"run.folder={folder}", f"train.updates={options.updates}"),
            *(f"evaluate.every={options.updates}", f"checkpoint.every={options.updates}"),
        )
        own = [setting.format(half=options.updates // 2) for setting in differs]
        code = train(["--config", str(CONFIG), *common, *own, *options.overrides])
        if code:
            print(f"error: the run {name!r} ended with code {code}; see {folder}/train.log", file=sys.stderr)
            return 1
        rows[name] = figures_of(read_lines(folder / "metrics.jsonl"))
    table = as_table(rows)
    (options.output / "table.md").write_text(table, encoding="utf-8")
    for name, row in rows.items():
        for column, value in row.items():
            if value is not None:
                made.exact(f"{name}: {column}", value, COLUMNS[column][0], better=COLUMNS[column][1])
    result.finish(made, options.output / "ablation.json")
    print(table)
    return 0


def figures_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """A run's row: the mean of each column over the last tenth of its updates, of those that have it.

    lines: the run's metrics.jsonl, one an update. knn_z stands in updates that evaluate only, here the last one.
    """
    last = lines[-max(1, len(lines) // 10) :]
    found: dict[str, float | None] = {}
    for column in COLUMNS:
        values = [line[column] for line in last if line.get(column) is not None]
        found[column] = statistics.fmean(values) if values else None
    return found


def as_table(rows: Rows) -> str:
    """A Markdown table; a dash where a term is off or a figure is missing."""
    lines = ["| run | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        cells = ["-" if row[column] is None else f"{row[column]:.3f}" for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
