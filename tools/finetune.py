"""Fine-tune a network for a task of the probe, and compare with the frozen one by the same folds. See `--help`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from probe import about_data, begun, hand_over, say

_EXAMPLES = """\
examples:
  python tools/finetune.py runs/lung --shards shards --output runs/lung/finetune
  python tools/finetune.py runs/lung --shards shards --task malignancy --method lora --rank 16 --steps 400
  python tools/finetune.py runs/lung --shards shards --method full --layer-decay 0.65 --learning-rate 5e-5

Each fold's network begins with the same weights, and its head with the frozen probe of that fold's training patients;
after --steps 0 it scores as that probe. Patients, folds, refusals and intervals are those of docs/evaluation.md.
docs/finetuning.md has the recipes.

exit code: 0 done; 1 it cannot be done (lora needs peft); 2 wrong usage, or nothing of that name;
           3 refused: pretraining saw patients that were to be tested, or what it saw is not known
"""
RATES = {"lora": 1e-3, "full": 1e-4}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Fine-tune by LoRA and in full, fold by fold, beside the frozen probe.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", metavar="MODEL", type=Path, help="a run, a checkpoint, or a folder of weights")
    command.add_argument("--shards", metavar="SET", type=Path, required=True, help="the folder that pack_shards made")
    command.add_argument("--labels", metavar="NAME", help="SET/labels/NAME.jsonl (default: the only ones there)")
    command.add_argument(
        "--task", metavar="TASK", default="presence", help="as of tools/probe.py, but dense (presence)"
    )
    command.add_argument("--method", choices=tuple(RATES), action="append", help="may be given again (default: both)")
    command.add_argument("--steps", metavar="N", type=int, default=40, help="updates of each fold's network (40)")
    command.add_argument("--batch-size", metavar="N", type=int, default=8, help="windows of an update (8)")
    command.add_argument("--learning-rate", metavar="X", type=float, help="at its peak (lora 1e-3, full 1e-4)")
    command.add_argument("--layer-decay", metavar="X", type=float, default=0.75, help="of full, block by block (0.75)")
    command.add_argument("--rank", metavar="N", type=int, default=8, help="of lora (8)")
    command.add_argument("--device", metavar="DEVICE", help="cpu, cuda … (default: cuda where there is one, else cpu)")
    command.add_argument("--seed", metavar="N", type=int, default=0, help="of all that is drawn but the folds (0)")
    command.add_argument("--allow-seen", action="store_true", help="test also whom pretraining saw, in tables apart")
    command.add_argument("--pretraining-set", metavar="SET", nargs="+", default=[], help="where its sets lie now")
    command.add_argument("--output", metavar="DIR", type=Path, help="for finetune.json and finetune.md, not inside SET")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    command = parser()
    given = command.parse_args(arguments)
    if given.steps < 0 or given.batch_size < 1 or given.rank < 1 or not 0 < given.layer_decay <= 1:
        command.error("--steps must be at least 0, --batch-size and --rank at least 1, --layer-decay in (0, 1]")
    from probing.errors import RefusedError, UsageError

    from dinox_io.labels import LabelUsageError

    try:
        return run(given)
    except RefusedError as error:
        print(f"finetune: refused: {error}", file=sys.stderr)
        return 3
    except (UsageError, LabelUsageError) as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"finetune: {error}; install dinox[hf], or give --method full", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 1


def run(given: argparse.Namespace) -> int:
    """All tables."""
    from inference.network import network_of
    from probing import protocol
    from probing.case import labels_of, make_case, patients_to_test
    from probing.encoders import network_encoder
    from probing.errors import UsageError
    from probing.tasks import DENSE, check_name, tasks_named
    from tuning.report import markdown
    from tuning.table import table_of

    from dinox_io import open_shards

    check_name(given.task)
    if given.task == DENSE:
        raise UsageError("--task dense is one of tools/probe.py alone")
    methods = list(dict.fromkeys(given.method or RATES))
    if "lora" in methods:
        importlib.import_module("peft")  # said before minutes of work
    recipes = [recipe_of(given, method) for method in methods]
    source, pretraining = begun(given)
    labels, sides = labels_of(given.shards, given.labels), ("val",)
    with open_shards(given.shards) as shards:
        tested = patients_to_test(shards, sides, pretraining, allow_seen=given.allow_seen)
        network = network_of(source.model, given.device, "fp32")
        case = make_case(shards, labels, tested, held_out=False)
        encoder = network_encoder("frozen", network)
        found: list[dict[str, Any]] = []
        for task in tasks_named(given.task, shards, case.joined, case.findings, case.patients):
            found += table_of(task, case, source.model, encoder, recipes, given.seed, network.device, say)
        report = {
            "protocol": protocol.in_words(),
            "network": {"digest": network.digest, "update": source.update},
            "pretraining": pretraining.json(),
            "data": about_data(shards, labels, sides, case),
            "seed": given.seed,
            "device": network.device,
            "recipes": [recipe.json() for recipe in recipes],
            "tables": found,
        }
    hand_over("finetune", report, markdown(report), given.output)
    return 0


def recipe_of(given: argparse.Namespace, method: str) -> Any:
    """The recipe of a method, with what the command line says."""
    from tuning.recipe import Recipe

    return Recipe(
        method=method,
        steps=given.steps,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate or RATES[method],
        layer_decay=given.layer_decay,
        rank=given.rank,
    )


if __name__ == "__main__":
    sys.exit(main())
