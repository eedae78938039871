"""The baseline of a class of machines: one result of each benchmark, and whether new ones are worse.

    benchmarks/results/baseline/CLASS/NAME.json      a result file (result.py) as it was measured on such a machine

A class is processor, cores and memory, rounded, and the GPU: what a rate may depend on, and a host's name may not.
Invariant: only results of the same class, of the same data and of the same form (quick or full) are compared.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import compare
import result
from result import Result, ResultError

_EPILOG = """\
examples:
  python benchmarks/baseline.py check bench           the results in bench/ against the baseline of this class
  python benchmarks/baseline.py keep bench            make them the baseline (then commit it)

exit code: 0 nothing gated is worse, or there is no baseline for this class; 1 something is worse; 2 a file is none
"""
BASELINES = Path(__file__).parent / "results" / "baseline"
GIB = 1 << 30
_FORM = ("quick", "rounds", "round_s")


def class_of(found: Mapping[str, Any], gpu: str | None = None) -> str:
    """The class of a machine as result files describe it: `amd-epyc-family-25-model-1-2-cores-24-gib`."""
    cpu = re.sub(r", stepping \w+|\(r\)|\(tm\)|@[^,]*|\bcpu (?=family)", "", str(found["cpu"]), flags=re.IGNORECASE)
    parts = [cpu, f"{found['logical_cores']} cores", f"{round(found['memory_bytes'] / GIB)} gib", gpu or ""]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def gpu_name() -> str | None:
    """Of the first GPU that torch sees; None without one, or without torch."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def results_in(folder: Path) -> dict[str, Result]:
    """By file name. ResultError where one is none."""
    return {path.name: result.read(path) for path in sorted(folder.glob("*.json"))}


def form_of(one: Result) -> dict[str, Any]:
    """How much was measured: what must be equal for two results to be of the same form."""
    return {key: one.conditions.get(key) for key in _FORM}


def check(new: Mapping[str, Result], kept: Mapping[str, Result]) -> tuple[list[str], list[str]]:
    """Lines to print, and the names of gated figures that are worse beyond the noise."""
    lines: list[str] = []
    worse: list[str] = []
    for name, one in new.items():
        before = kept.get(name)
        if before is None:
            lines.append(f"{name}: no baseline yet")
            continue
        if form_of(before) != form_of(one):
            lines.append(f"{name}: not compared: one is quick and the other is not, or of other rounds")
            continue
        try:
            judged = compare.compare(before, one, across_machines=True)
        except ResultError as error:
            lines.append(f"{name}: not compared: {error}")
            continue
        bad = [each for each in judged if each.gate and each.verdict == "worse"]
        better = sum(each.verdict == "better" for each in judged)
        lines.append(
            f"{name}: {len(judged)} figures, {sum(each.gate for each in judged)} gated: {len(bad)} worse beyond the "
            f"noise; {better} better (baseline of {before.date[:10]}, {before.commit[:10]})"
        )
        lines += [f"  {each.name}: {each.gain:.3f} of before ({each.low:.3f} to {each.high:.3f})" for each in bad]
        worse += [f"{name}: {each.name}" for each in bad]
    lines += [f"{name}: in the baseline, and not measured now" for name in kept if name not in new]
    return lines, worse


def keep(folder: Path, into: Path) -> list[str]:
    """Copy all results of a folder; those of before are replaced. ResultError where one is none."""
    names = list(results_in(folder))
    into.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(folder / name, into / name)
    return names


def _class_of_all(results: Sequence[Result]) -> str:
    """Of the machine that measured them. ResultError where it was not one."""
    classes = {class_of(one.machine, gpu_name()) for one in results}
    if len(classes) != 1:
        raise ResultError(
            f"results of {len(classes)} classes of machines: {', '.join(sorted(classes)) or 'no results'}"
        )
    return classes.pop()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("check", "keep"))
    parser.add_argument("results", metavar="FOLDER", type=Path, help="where new results lie (make bench: bench)")
    parser.add_argument("--baselines", metavar="FOLDER", type=Path, default=BASELINES, help="where baselines lie")
    given = parser.parse_args(arguments)
    try:
        new = results_in(given.results)
        place = given.baselines / _class_of_all(list(new.values()))
        if given.what == "keep":
            names = keep(given.results, place)
            print(f"kept in {place}: {', '.join(names)}")
            return 0
        kept = results_in(place)
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not kept:
        print(f"no baseline for this class of machines, {place.name}; on a quiet machine, keep this one's with")
        print(f"  python benchmarks/baseline.py keep {given.results}")
        return 0
    lines, worse = check(new, kept)
    print("\n".join(lines))
    print(f"worse beyond the noise: {', '.join(worse)}" if worse else "nothing that is gated is worse beyond the noise")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
