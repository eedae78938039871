"""Processes that are the ranks of one world over gloo, started for a test and gone after it, whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

COLLECTIVE_SECONDS = 120


def run_ranks(work: Callable[..., None], count: int, folder: Path, *arguments: Any, seconds: float = 400.0) -> None:
    """Call `work(rank, count, folder, *arguments)` in `count` processes of one world.

    work: a function of a module. Fails with every rank's traceback where one fails, and where they take longer than
    `seconds`; none is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(work, rank, count, folder, arguments), daemon=True) for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    ends = time.monotonic() + seconds
    try:
        for rank in ranks:
            rank.join(max(0.0, ends - time.monotonic()))
    finally:
        late = [number for number, rank in enumerate(ranks) if rank.is_alive()]
        for rank in ranks:
            rank.kill()
            rank.join()
    said = [path.read_text() for path in sorted(folder.glob("failed-*.txt"))]
    # What went wrong stands at the end: what the others say is that a rank was lost.
    said.sort(key=lambda text: "Connection closed by peer" in text, reverse=True)
    assert not said, "\n".join(said)
    assert not late, f"ranks {late} were not done after {seconds} s"
    assert [rank.exitcode for rank in ranks] == [0] * count


def _rank(work: Callable[..., None], rank: int, count: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    try:
        os.environ["OMP_NUM_THREADS"] = "1"
        warnings.simplefilter("error")
        # torch's compiler looks at what it is given, with a warning that it hides where warnings are no errors.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        import torch
        from torch import distributed

        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo",
            init_method=(folder / "rendezvous").as_uri(),
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )
        work(rank, count, folder, *arguments)
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        (folder / f"failed-{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
