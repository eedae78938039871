"""Compile every kernel for every architecture, without a GPU, and keep what came out in the compile table: `--help`."""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kernel_table import table
from kernel_table.cells import Cell, everywhere
from kernel_table.proof import Row, faulty, named, prove, sources
from kernel_table.search import search

from dinox_model.kernels.architecture import ARCHITECTURES
from dinox_model.kernels.language import triton

REPOSITORY = Path(__file__).resolve().parent.parent
TABLE, DOCUMENT = REPOSITORY / "docs" / "kernels_table.json", REPOSITORY / "docs" / "kernels.md"
_EXAMPLES = """\
examples:
  python tools/compile_kernels.py                                  what changed, and write the table (all: 20 minutes)
  python tools/compile_kernels.py --check                          all of it, and compare with the table
  python tools/compile_kernels.py --check --arch gfx1151           one architecture of it
  python tools/compile_kernels.py --kernel rotate --arch sm_90     only these, printed
  python tools/compile_kernels.py --kernel attention_forward --arch gfx1151 --dtype bf16 --search
                                                                   try other tiles, print those that keep the rule

The rule: shared memory within the architecture's; where 16-bit matrix products are in a kernel also no spilled
registers, matrix instructions, 128-bit loads, and no loads of 16 bits or less. A cell that can't keep it says in
dinox_model/kernels/tiles.json what runs instead. With a Triton of another version than the table's, --check
compares nothing and checks the rule.

exit code: 0 every launch keeps the rule (and, with --check, is what the table says); 1 one does not (a line each);
           2 wrong usage, or no Triton here
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit code of the command."""
    options = parse(arguments)
    if triton is None:
        print("error: Triton is not installed: the extra [kernels] brings it", file=sys.stderr)
        return 2
    cells = chosen(options)
    if not cells:
        print("error: no kernel is shipped under this name, dtype and head_dim", file=sys.stderr)
        return 2
    if options.search:
        return search(cells, options.processes)
    begin = time.monotonic()
    if options.check:
        rows, faults = check(cells, options)
    else:
        rows, faults = show(cells, options) if is_part(options) else renew(cells, options)
    print("\n".join(faults))
    print(f"{len(rows)} of {len(cells)} launches, {len(faults)} faults, {time.monotonic() - begin:.0f} s")
    return 1 if faults else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compile every kernel for every architecture, without a GPU, and read what came out.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="compare with the table, and write nothing")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="then begin no more; --check takes those that changed first"
    )
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="only these; nothing is written")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, metavar="NAME", help="only these architectures")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "fp16", "bf16"), help="only these")
    parser.add_argument("--head-dim", nargs="+", type=int, metavar="N", help="only these")
    parser.add_argument("--search", action="store_true", help="try tiles for each of the launches that are named")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    options = parser.parse_args(arguments)
    if options.search and not options.kernel:
        parser.error("--search needs --kernel")
    return options


def is_part(options: argparse.Namespace) -> bool:
    return any((options.kernel, options.arch, options.dtype, options.head_dim))


def chosen(options: argparse.Namespace) -> list[Cell]:
    limits = [("kernel", options.kernel), ("arch", options.arch), ("dtype", options.dtype)]
    limits.append(("head_dim", options.head_dim))
    return [cell for cell in everywhere() if all(not some or getattr(cell, name) in some for name, some in limits)]


def said(row: Row) -> None:
    """Prints one row as it comes."""
    if "instead" in row:
        print(f"{named(row)}: {row['instead']} runs instead: {row['because']}")
    elif "compiled" in row:
        figures = row["compiled"]
        counts = ", ".join(f"{count} {name}" for name, count in figures["matrix"].items())
        print(
            f"{named(row)}: {figures['registers']} registers, {figures['spills']} spills, {figures['shared_bytes']} "
            f"bytes shared, {figures['wide_loads']} of {figures['loads']} loads wide{counts and '; ' + counts}"
        )


def show(cells: Sequence[Cell], options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Compiles a part and prints it."""
    rows = prove(cells, options.processes, said, 60 * options.minutes)
    return rows, faulty(rows)


def renew(cells: Sequence[Cell], options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Makes the table anew; rows of this Triton and the same source are kept. Written as far as the time goes."""
    then, before = table.read(TABLE) if TABLE.exists() else ("", [])
    kept = {named(row): row for row in before if then == triton.__version__ and row.get("faults") == []}
    digests = sources(cells, options.processes)
    is_kept = {
        cell: digest is not None and kept.get(str(cell), {}).get("source") == digest
        for cell, digest in zip(cells, digests, strict=True)
    }
    fresh = prove([cell for cell in cells if not is_kept[cell]], options.processes, dot, 60 * options.minutes)
    found = {str(cell): kept[str(cell)] for cell in cells if is_kept[cell]} | {named(row): row for row in fresh}
    rows = [found[str(cell)] for cell in cells if str(cell) in found]
    write(rows)
    lost = len(cells) - len(rows)
    said_of_lost = [f"{lost} launches are not in the table yet: run this again, it goes on from here"] * (lost > 0)
    return rows, faulty(rows) + said_of_lost


def dot(row: Row) -> None:
    """A sign of life, and what is wrong at once."""
    print("\n".join(faulty([row])) if row.get("faults") else ".", end="", file=sys.stderr, flush=True)


def write(rows: Sequence[Row]) -> None:
    """Writes the table and the document."""
    document = table.documented(DOCUMENT.read_text(encoding="utf-8"), triton.__version__, rows)
    TABLE.write_text(table.spelled(triton.__version__, rows), encoding="utf-8")
    DOCUMENT.write_text(document, encoding="utf-8")


def check(cells: Sequence[Cell], options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """The rows that the time was enough for, and what breaks the rule or is not as the table says.

    What the time isn't enough for is as the table says all the same, if it is made from the same source: compiling is a
    function of that. Such cells are taken in another order each day, so that all of them have their turn.
    """
    then, before = table.read(TABLE)
    is_same = then == triton.__version__
    if not is_same:
        print(f"the table is of Triton {then}, this is {triton.__version__}: only the rule is checked")
    table_has = {named(row): row.get("source") for row in before}
    is_changed = {
        cell: source != table_has.get(str(cell), "no row")
        for cell, source in zip(cells, sources(cells, options.processes), strict=True)
    }
    random.seed(int(time.time()) // 86400)
    order = sorted(cells, key=lambda cell: (not is_changed[cell], random.random()))
    rows = prove(order, options.processes, lambda row: None, 60 * options.minutes)
    faults, left = faulty(rows), order[len(rows) :]
    faults += [f"{cell}: changed, and no time was left to compile it" for cell in left if is_changed[cell]]
    if left:
        print(f"{len(left)} launches from the same source as in the table were not compiled again: no time was left")
    if is_same:
        gone = set() if is_part(options) else table_has.keys() - set(map(str, cells))
        seen = {named(row) for row in rows} | gone
        changed = table.differences([row for row in before if named(row) in seen], rows)
        faults += [f"{line} (python tools/compile_kernels.py makes the table anew)" for line in changed]
    return rows, faults


if __name__ == "__main__":
    sys.exit(main())
