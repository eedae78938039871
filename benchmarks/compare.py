"""Compare two result files of one benchmark: is the second worse, beyond what noise explains?"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from result import Figure, Result, ResultError, read

_EPILOG = """\
A figure is worse (or better) if the interval of the ratio leaves 1 out and its median lies beyond the noise floor, the
larger one of both files. Only gated figures decide the exit code: sizes and ratios measured side by side; rates of two
days differ for reasons that are not in the code.

example:
  python benchmarks/compare.py benchmarks/results/codec.json new.json

exit code: 0 nothing is worse; 1 a gated figure is worse; 2 these files cannot be compared
"""


@dataclass(frozen=True)
class Judgement:
    """B against A: gain above 1 is better, with its interval; `floor`, the noise as a fraction; same, better, worse, no
    ratio (of a figure that is 0)."""

    name: str
    gain: float
    low: float
    high: float
    floor: float
    verdict: str
    gate: bool


def judge(before: Figure, after: Figure) -> Judgement:
    """Compare one figure. Its two medians are independent: their relative errors add in quadrature."""
    a, b = (before, after) if before.better == "higher" else (after, before)
    floor, gate = max(before.noise, after.noise), before.gate and after.gate
    if min(a.low, b.low) <= 0:
        if gate:
            raise ResultError(f"{before.name}: {min(a.low, b.low)} has no ratio; what is gated must be positive")
        return Judgement(before.name, math.nan, math.nan, math.nan, floor, "no ratio", False)
    gain = b.value / a.value
    down = math.hypot(math.log(b.value / b.low), math.log(a.high / a.value))
    up = math.hypot(math.log(b.high / b.value), math.log(a.value / a.low))
    low, high = gain * math.exp(-down), gain * math.exp(up)
    verdict = "same"
    if high < 1 and gain < 1 / (1 + floor):
        verdict = "worse"
    elif low > 1 and gain > 1 + floor:
        verdict = "better"
    return Judgement(before.name, gain, low, high, floor, verdict, gate)


def compare(before: Result, after: Result, *, across_machines: bool = False) -> list[Judgement]:
    """Judge every figure that both have. ResultError if they are of other benchmarks, data or machines."""
    if before.benchmark != after.benchmark:
        raise ResultError(f"one is of the benchmark {before.benchmark}, the other of {after.benchmark}")
    if before.data != after.data:
        raise ResultError("they were measured on different data, so that no figure can be compared")
    if before.machine != after.machine and not across_machines:
        different = [key for key in before.machine if before.machine.get(key) != after.machine.get(key)]
        raise ResultError(
            f"they come from different machines ({', '.join(different)}); --across-machines compares them all the same"
        )
    second = {figure.name: figure for figure in after.figures}
    pairs = [(one, second[one.name]) for one in before.figures if one.name in second]
    for one, other in pairs:
        if (one.unit, one.better) != (other.unit, other.better):
            raise ResultError(f"{one.name}: its unit or its direction changed")
    if not pairs:
        raise ResultError("they have no figure in common")
    return [judge(one, other) for one, other in pairs]


def table(judgements: Sequence[Judgement]) -> list[str]:
    """Lines to print."""
    width = max(len(one.name) for one in judgements)
    lines = [f"{'figure':{width}}   gain  95 % interval   noise  verdict"]
    for one in judgements:
        verdict = one.verdict + ("" if one.gate or one.verdict != "worse" else " (not gated)")
        interval = f"{one.low:.3f} to {one.high:.3f}"
        lines.append(f"{one.name:{width}}  {one.gain:.3f}  {interval}  {100 * one.floor:4.1f} %  {verdict}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", metavar="A.json", type=Path)
    parser.add_argument("after", metavar="B.json", type=Path)
    parser.add_argument("--across-machines", action="store_true", help="compare results of different machines")
    given = parser.parse_args(arguments)
    try:
        before, after = read(given.before), read(given.after)
        judgements = compare(before, after, across_machines=given.across_machines)
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(judgements)))
    for name, one in ((given.before, before), (given.after, after)):
        for note in one.notes:
            print(f"note on {name}: {note}")
    worse = [one.name for one in judgements if one.gate and one.verdict == "worse"]
    print(f"worse beyond the noise: {', '.join(worse)}" if worse else "nothing that is gated is worse beyond the noise")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
