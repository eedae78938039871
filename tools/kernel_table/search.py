"""Tries tiles for a launch by compiling, and ranks those that keep the rule.

On AMD the rank is the bound that the hot loop's instructions allow: RDNA and CDNA issue matrix and vector instructions
of a wave one after the other, so the loop is at best matrix / (matrix + vector + 4 transcendental + memory) of the
peak, a matrix instruction counted as 32 cycles. On NVIDIA, where they overlap, it is registers times threads: how many
programs share a multiprocessor. Both rank tiles; neither is a speed. Timing decides: `platform tune`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dinox_model.kernels.architecture import ARCHITECTURES
from dinox_model.kernels.tiles import Launch, Tiles
from kernel_table.cells import Cell, shipped
from kernel_table.proof import in_processes

EDGES = (16, 32, 64, 128)
STAGES = {"amd": (1, 2), "nvidia": (1, 2, 3)}  # more than 2 crash AMD's pipeliner (triton-lang/triton#9815)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One way to compile a launch, and what came of it. `rank`: higher is better; None: `fault` says why not."""

    tiles: Tiles
    rank: float | None
    fault: str
    about: str


def search(cells: Sequence[Cell], processes: int) -> int:
    """Prints, for each cell, the tiles that keep the rule, best first. 1: a cell has none."""
    hopeless = 0
    for cell in cells:
        ways = list(candidates(launch_like(cell), ARCHITECTURES[cell.arch].vendor))
        found = in_processes(trial, [(cell, tiles) for tiles in ways], processes)
        good = sorted((one for one in found if one.rank is not None), key=lambda one: -(one.rank or 0.0))
        print(f"{cell}: {len(good)} of {len(ways)} keep the rule")
        for one in good[:10]:
            print(f"  {one.rank:.2f}  {one.tiles.sizes} {_options(one.tiles)}  {one.about}")
        if not good:
            hopeless += 1
            for one in found[:3]:
                print(f"  {one.tiles.sizes} {_options(one.tiles)}: {one.fault}")
    return 1 if hopeless else 0


def launch_like(cell: Cell) -> Launch:
    """The launch of this cell; where it is not shipped on this architecture, the one that another ships."""
    archs = (cell.arch, *(name for name in ARCHITECTURES if name != cell.arch))
    return next(launch for arch in archs if (launch := shipped(arch).get(replace(cell, arch=arch))) is not None)


def candidates(launch: Launch, vendor: str) -> Iterator[Tiles]:
    """Every size of each BLOCK_… of the launch (other sizes stay), with 4 and 8 warps."""
    blocks = [name for name in launch.tiles.sizes if name.startswith("BLOCK")]
    for edges in itertools.product(EDGES, repeat=len(blocks)):
        sizes = {**launch.tiles.sizes, **dict(zip(blocks, edges, strict=True))}
        for warps, stages in itertools.product((4, 8), STAGES[vendor]):
            yield replace(launch.tiles, sizes=sizes, num_warps=warps, num_stages=stages)


def trial(what: tuple[Cell, Tiles]) -> Tried:
    """Compiles one, in a process of its own."""
    from dinox_model.kernels.compiled import compile_launch

    cell, tiles = what
    launch = replace(launch_like(cell), tiles=tiles)
    try:
        compiled = compile_launch(launch, cell.arch)
    except Exception as error:
        return Tried(tiles=tiles, rank=None, fault=f"{type(error).__name__}: {str(error)[-200:]}", about="")
    faults = compiled.faults(launch, cell.arch) + [f"{compiled.spills} spills"] * (compiled.spills > 0)
    about = f"{compiled.registers} registers, {compiled.shared_bytes} bytes shared"
    if compiled.hot_loop:
        about += f", hot loop {compiled.hot_loop}"
    if faults:
        return Tried(tiles=tiles, rank=None, fault=", ".join(faults), about=about)
    rank = bound(compiled.hot_loop) if compiled.hot_loop else 65536 / (compiled.registers * 32 * tiles.num_warps)
    return Tried(tiles=tiles, rank=rank, fault="", about=about)


def bound(loop: dict[str, int]) -> float:
    """Matrix cycles over all that the loop issues."""
    matrix = 32 * loop["matrix"]
    others = loop["vector"] + 4 * loop["transcendental"] + loop["shared"] + loop["memory"]
    return matrix / max(matrix + others, 1)


def _options(tiles: Tiles) -> dict[str, Any]:
    return {name: value for name, value in asdict(tiles).items() if name != "sizes"}
