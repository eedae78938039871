"""What a network's frozen features tell of labelled findings, by the protocol of docs/evaluation.md: see `--help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported when there is something to do: --help does without
    from probing.case import Case, Labels
    from probing.pretraining import Pretraining
    from probing.source import Source

    from dinox_io import ShardSet

_EXAMPLES = """\
examples:
  python tools/probe.py runs/lung --shards shards --output runs/lung/probe
  python tools/probe.py runs/lung --shards shards --labels lidc --task malignancy --task dense --beside dinov3_vitl16
  python tools/probe.py runs/lung --shards shards --task rating:spiculation:3 --allow-seen
  python tools/probe.py runs/lung --shards shards --labels lidc --task malignancy --final --output final
  python tools/probe.py heatmap runs/lung --shards shards --count 50 --seed 0 --output runs/lung/heatmap

MODEL is a run's folder (its newest whole checkpoint), a checkpoint's, or any folder of weights that
dinox_model.load_pretrained reads. Nothing of it is trained: probes learn from its features alone.

Tasks: presence (does a mark touch the window's slice?), type (solid or not, by texture), malignancy (LIDC-IDRI's
ratings), rating:NAME:ABOVE (median of a rating), label:NAME (one label against the others), dense (Dice of outlines).
Beside the network stand, always and by the same folds: the same network at random initialisation, raw pixels, and
statistics of size and intensity; and whatever --beside names.

Patients of the side val are tested; pretraining must not have seen them, which the checkpoint and its sets' manifests
tell. Labels of train and val are learnt from. The side test is opened by --final alone, and each opening is noted in
a ledger beside the set.

exit code: 0 done; 1 something is damaged, or holds nothing that can be probed; 2 wrong usage, or nothing of that name;
           3 refused: pretraining saw patients that were to be tested, or what it saw is not known; 130 interrupted
"""
SIDES = {"val": ("val",), "train": ("train",), "both": ("train", "val")}


def parser(*, heatmap: bool = False) -> argparse.ArgumentParser:
    """The command line of a probe, or of `heatmap`."""
    command = argparse.ArgumentParser(
        prog="probe.py heatmap" if heatmap else "probe.py",
        description="Draw where a network looks at random findings, and what looks like findings to it."
        if heatmap
        else "Probe a network's frozen features with kNN, logistic and dense probes, beside baselines.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", metavar="MODEL", type=Path, help="a run, a checkpoint, or a folder of weights")
    command.add_argument("--shards", metavar="SET", type=Path, required=True, help="the folder that pack_shards made")
    command.add_argument("--labels", metavar="NAME", help="SET/labels/NAME.jsonl (default: the only ones there)")
    command.add_argument("--device", metavar="DEVICE", help="cpu, cuda … (default: cuda where there is one, else cpu)")
    command.add_argument("--seed", metavar="N", type=int, default=0, help="of all that is drawn but the folds (0)")
    command.add_argument("--side", choices=tuple(SIDES), help="whose patients are tested (default: val)")
    command.add_argument("--allow-seen", action="store_true", help="test also whom pretraining saw, in tables apart")
    command.add_argument(
        "--pretraining-set", metavar="SET", nargs="+", default=[], help="where sets that pretraining saw lie now"
    )
    if heatmap:
        command.add_argument("--output", metavar="DIR", type=Path, required=True, help="for heatmap.png and .json")
        command.add_argument("--count", metavar="N", type=_count, default=50, help="findings on the sheet (50)")
        return command
    command.add_argument("--output", metavar="DIR", type=Path, help="for probe.json and probe.md, not inside SET")
    command.add_argument("--task", metavar="TASK", action="append", help="may be given again (default: presence)")
    command.add_argument("--beside", metavar="FOLDER", type=Path, action="append", default=[], help="another network")
    command.add_argument("--dtype", choices=("fp32", "bf16"), help="of matrix products and attention (default: fp32)")
    command.add_argument("--batch-size", metavar="N", type=_count, default=8, help="windows at a time (8)")
    command.add_argument("--final", action="store_true", help="open the side test, once and for all to see")
    command.add_argument("--ledger", metavar="FILE", type=Path, help="of its openings (default: beside SET)")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    heatmap = words[:1] == ["heatmap"]
    command = parser(heatmap=heatmap)
    given = command.parse_args(words[1:] if heatmap else words)
    if not heatmap and given.final and given.side:
        command.error("--final tests the side test; --side names another")
    if not heatmap and given.ledger and not given.final:
        command.error("--ledger is of --final")
    from probing.errors import RefusedError, UsageError

    from dinox_io.labels import LabelUsageError

    try:
        return (run_heatmap if heatmap else run_probe)(given)
    except KeyboardInterrupt:
        print("probe: interrupted; nothing was written", file=sys.stderr)
        return 130
    except RefusedError as error:
        print(f"probe: refused: {error}", file=sys.stderr)
        return 3
    except (UsageError, LabelUsageError) as error:
        print(f"probe: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"probe: {error.filename or given.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    except (ValueError, ImportError) as error:  # ShardError, LabelError, WeightsError and ProbeError are ValueErrors
        print(f"probe: {error}", file=sys.stderr)
        return 1


def run_probe(given: argparse.Namespace) -> int:
    """All tables of a probe."""
    from probing import protocol
    from probing.case import labels_of, make_case, patients_to_test
    from probing.opened import ledger_of, open_test
    from probing.report import markdown
    from probing.tasks import check_name
    from probing.work import encoders_of, tables

    from dinox_io import open_shards

    names = list(dict.fromkeys(given.task or ["presence"]))
    for name in names:
        check_name(name)
    sides = ("test",) if given.final else SIDES[given.side or "val"]
    source, pretraining = begun(given)
    labels = labels_of(given.shards, given.labels)
    with open_shards(given.shards) as shards:
        tested = patients_to_test(shards, sides, pretraining, allow_seen=given.allow_seen)
        network, encoders = encoders_of(source.model, given.device, given.dtype, given.beside, given.seed, say)
        final = None
        if given.final:
            ledger = given.ledger or ledger_of(given.shards)
            before = open_test(ledger, shards, network.digest, names, labels.digest)
            say(f"the test side is opened; it had been opened {before} times before ({ledger})")
            final = {"opened_before": before}
        case = make_case(shards, labels, tested, held_out=given.final)
        found = tables(
            case, encoders, names, batch_size=given.batch_size, seed=given.seed, device=network.device, say=say
        )
        report = {
            "protocol": protocol.in_words(),
            "network": {"digest": network.digest, "update": source.update},
            "pretraining": pretraining.json(),
            "data": about_data(shards, labels, sides, case),
            "seed": given.seed,
            "device": network.device,
            "dtype": network.dtype,
            "encoders": [{"name": one.name, "digest": one.digest} for one in encoders],
            "final": final,
            "tables": found,
        }
    hand_over("probe", report, markdown(report), given.output)
    return 0


def run_heatmap(given: argparse.Namespace) -> int:
    """The sheet and its figures."""
    from inference.network import usable_device
    from probing import protocol
    from probing.case import labels_of, make_case, patients_to_test
    from probing.heatmap import sheet_of
    from probing.work import untrained

    from dinox_io import open_shards
    from dinox_io.atomic import write_atomically

    sides, device = SIDES[given.side or "val"], usable_device(given.device)
    source, pretraining = begun(given)
    labels = labels_of(given.shards, given.labels)
    with open_shards(given.shards) as shards:
        tested = patients_to_test(shards, sides, pretraining, allow_seen=given.allow_seen)
        case = make_case(shards, labels, tested, held_out=False)
        models = (source.model, untrained(source.model, given.seed))
        page, figures = sheet_of(case, models, device, given.count, given.seed)
        report = {
            "protocol_version": protocol.VERSION,
            "network": {"update": source.update},
            "pretraining": pretraining.json(),
            "data": about_data(shards, labels, sides, case),
            "seed": given.seed,
            "device": device,
            **figures,
        }
    given.output.mkdir(parents=True, exist_ok=True)
    page.write(given.output / "heatmap.png")
    write_atomically(given.output / "heatmap.json", as_json(report))
    for line in figures_in_words(report):
        say(line)
    say(f"heatmap.png and heatmap.json written to {given.output}")
    return 0


def begun(given: argparse.Namespace) -> tuple[Source, Pretraining]:
    """The network, and what its pretraining saw. UsageError for a set or an output that cannot be."""
    from probing.errors import UsageError
    from probing.pretraining import pretraining_of
    from probing.source import open_source

    from dinox_io.verify import is_set_folder

    if not given.shards.is_dir() or not is_set_folder(given.shards):
        raise UsageError(f"{given.shards} is not a set of shards: give the folder that pack_shards made")
    if given.output is not None and given.output.resolve().is_relative_to(given.shards.resolve()):
        raise UsageError("--output lies in the set, which holds nothing but what was packed and its labels")
    source = open_source(given.model)
    for note in source.notes:
        say(note)
    return source, pretraining_of(source, [given.shards, *given.pretraining_set])


def about_data(shards: ShardSet, labels: Labels, sides: Sequence[str], case: Case) -> dict[str, Any]:
    """What was probed on: counts and digests, no patient."""
    return {
        "set": shards.digest,
        "labels": {"name": labels.name, "sha256": labels.digest, "marks": len(labels.marks)},
        "sides": list(sides),
        "tested_patients": {kind: len(patients) for kind, patients in case.tested.items()},
        "findings": len(case.findings),
        "partial_marks": case.joined.partial,
        "marks_outside": case.joined.outside,
        "marks_of_other_series": case.joined.foreign,
    }


def hand_over(name: str, report: dict[str, Any], page: str, folder: Path | None) -> None:
    """Write NAME.json and NAME.md into the folder, if there is to be one, and print the page."""
    from dinox_io.atomic import write_atomically

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.json", as_json(report))
        write_atomically(folder / f"{name}.md", page.encode())
        say(f"{name}.json and {name}.md written to {folder}")
    print(page, end="")


def figures_in_words(report: dict[str, Any]) -> list[str]:
    """A line for each map of each network."""
    from probing.table import interval_of

    return [
        f"{network}, {name}: AUROC of patches inside against outside {interval_of(one['auroc_by_patient'])}, "
        f"{one['patients']} patients"
        for network, maps in report["maps"].items()
        for name, one in maps.items()
        if one["auroc_by_patient"] is not None
    ]


def as_json(report: dict[str, Any]) -> bytes:
    """One spelling for equal reports."""
    return json.dumps(report, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
