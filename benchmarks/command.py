"""What benchmarks have in common on their command lines: data, peers, how much is measured, what is shown in the end.

Invariant: an option means the same in each of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import result
from harness import Worker
from result import Result

if TYPE_CHECKING:
    import cases

MB = 1e6


@dataclass(frozen=True)
class Plan:
    """How much is measured: rounds, and about how long each contender's turn lasts in each (s)."""

    rounds: int
    round_s: float
    quick: bool

    @classmethod
    def of(cls, quick: bool) -> Plan:
        """The full plan, or a few rounds that only show that everything runs."""
        return cls(3, 0.02, True) if quick else cls(25, 0.3, False)

    def conditions(self, core: int) -> dict[str, Any]:
        """What a result says about how it was measured."""
        return {"core": core, "rounds": self.rounds, "round_s": self.round_s, "seed": 0, "quick": self.quick}


def add_options(parser: argparse.ArgumentParser, default_output: str, *, peers: bool = True) -> None:
    """`--data --output --quick`, and `--peers` where there are some."""
    parser.add_argument(
        "--data", metavar="FOLDER", type=Path, nargs="+", default=[],
        help="folders of DICOM: every 512 x 512 series in them (default: the made-up phantom)",
    )  # fmt: skip
    if peers:
        parser.add_argument(
            "--peers", metavar="PYTHON", help="interpreter that has benchmarks/peers.txt (default: peers are left out)"
        )
    add_output(parser, default_output)


def add_output(parser: argparse.ArgumentParser, default_output: str) -> None:
    """`--output --quick`."""
    parser.add_argument(
        "--output", metavar="FILE", type=Path, default=Path(default_output), help=f"result (default: {default_output})"
    )
    parser.add_argument("--quick", action="store_true", help="few slices, settings and rounds: does it run at all?")


def load_cases(folders: Sequence[Path], *, quick: bool) -> list[cases.Case]:
    """The cases that were asked for. CasesError if there are none."""
    import cases  # here: a benchmark of networks runs where what dinox_io needs is missing

    return cases.from_folders(folders) if folders else cases.phantom(quick=quick)


def open_peers(
    stack: ExitStack, python: str | None, module: str, arguments: dict[str, Any], notes: list[str]
) -> Worker | None:
    """The peers' worker; without `python` none, and a warning that says so. WorkerError if it cannot start."""
    if python is None:
        notes.append("no peers were measured: --peers was not given")
        return None
    return stack.enter_context(Worker(python, module, arguments, environment="peers"))


def tell(name: str) -> None:
    """Progress of a measurement."""
    print(f"  preparing {name}", file=sys.stderr, flush=True)


def finish(made: Result, output: Path) -> int:
    """Write the result whole, and show it. Returns a program's exit code: 0, whatever came out."""
    result.finish(made, output)
    print("\n".join(result.lines(made)))
    print(f"written: {output}")
    return 0
