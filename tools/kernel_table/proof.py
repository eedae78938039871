"""Compiles cells of the table, some at a time, in processes of their own, and says which break the rule.

Compiling needs a process that does not interpret, whatever the one that asks does: so all of it happens in children
that are started without TRITON_INTERPRET, with a Triton cache that is theirs.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

from kernel_table.cells import Cell, replaced, shipped

Of = TypeVar("Of")
Gives = TypeVar("Gives")
Row = dict[str, Any]
"""A row of the table as JSON: the cell; `source` (digest), `tiles`, `compiled`, `faults`, or `instead`, `because`."""


def prove(cells: Sequence[Cell], processes: int, tell: Callable[[Row], None], seconds: float = math.inf) -> list[Row]:
    """A row for each cell, in their order, as far as `seconds` go; `tell` hears of each as it comes.

    What cannot be compiled, or is neither shipped nor replaced, is a row with faults, never an exception.
    """
    return in_processes(row_of, cells, processes, tell, seconds)


def sources(cells: Sequence[Cell], processes: int) -> list[str | None]:
    """The digest of what each cell is compiled from; None where nothing is shipped."""
    return in_processes(source_of, cells, processes)


def source_of(cell: Cell) -> str | None:
    from dinox_model.kernels.compiled import source_digest

    launch = shipped(cell.arch).get(cell)
    return None if launch is None else source_digest(launch, cell.arch)


def in_processes(
    work: Callable[[Of], Gives],
    on: Sequence[Of],
    processes: int,
    tell: Callable[[Gives], None] = lambda given: None,
    seconds: float = math.inf,
) -> list[Gives]:
    """What `work`, a function of a module, gives for each, computed in processes that compile; none is begun after
    `seconds`."""
    begin, given = time.monotonic(), []
    with (
        tempfile.TemporaryDirectory(prefix="dinox-kernels-") as cache,
        _environment_of_children(cache),
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
    ):
        for some in (on[i : i + 4 * processes] for i in range(0, len(on), 4 * processes)):
            if time.monotonic() - begin > seconds:
                break
            for one in pool.map(work, some):
                tell(one)
                given.append(one)
    return given


@contextmanager
def _environment_of_children(cache: str) -> Iterator[None]:
    """Children that are started inside compile, on one thread, into `cache`; this process' own is put back."""
    before = dict(os.environ)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update(TRITON_CACHE_DIR=cache, OMP_NUM_THREADS="1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def row_of(cell: Cell) -> Row:
    """Compiles one cell, in this process."""
    from dinox_model.kernels.compiled import compile_launch, source_digest

    row = {**asdict(cell), "facts": dict(cell.facts)}
    launch = shipped(cell.arch).get(cell)
    if launch is None:
        other = replaced(cell)
        if other is None:
            return {**row, "faults": ["not shipped here, and tiles.json does not say what runs instead"]}
        return {**row, "instead": other.backend, "because": other.because}
    how = asdict(launch.tiles)
    row |= {"source": source_digest(launch, cell.arch)}
    try:
        compiled = compile_launch(launch, cell.arch)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {**row, "tiles": how, "faults": [f"does not compile: {type(error).__name__}: {lines[-1][:300]}"]}
    return {**row, "tiles": how, "compiled": asdict(compiled), "faults": compiled.faults(launch, cell.arch)}


def faulty(rows: Iterable[Row]) -> list[str]:
    """A line for each fault."""
    return [f"{named(row)}: {fault}" for row in rows for fault in row.get("faults", ())]


def named(row: Row) -> str:
    facts = tuple(sorted(row["facts"].items()))
    return str(Cell(row["kernel"], row["arch"], row["dtype"], row["head_dim"], facts))
