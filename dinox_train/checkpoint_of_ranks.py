"""A checkpoint that several ranks write together: each its part, and the first one what makes it whole.

As one process writes them (checkpoint.py), but for train/shards/ (sharded_checkpoint.py). The run folder lies where all
ranks see it. Invariant: all ranks end with the folder of the checkpoint, or all with an error and nothing of it stays.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dinox_model import VisionTransformer
from dinox_train.checkpoint import CheckpointError, begin_checkpoint, finish_checkpoint
from dinox_train.part import Held
from dinox_train.sharded_checkpoint import digest_over_ranks, write


def save_together(
    root: Path,
    update: int,
    *,
    teacher: VisionTransformer | None,
    tensors: Mapping[str, Mapping[str, Held]],
    state: Mapping[str, Any],
    replicas: Mapping[str, Tensor],
    group: dist.ProcessGroup,
) -> Path:
    """Write a checkpoint and return its folder; every rank of `group` calls it.

    teacher: on the host, of the first rank; the others' is not looked at. tensors: as `write` takes them. replicas:
    what is to be the same on all ranks, on the host, and is compared first. Raises OSError on all ranks where one could
    not write, and CheckpointError where replicas differ or that checkpoint exists already.
    """
    temporary, final = _from_first(lambda: begin_checkpoint(root, update), group)
    try:
        differs = digest_over_ranks(replicas, group) if replicas else None
        if differs is not None:
            raise CheckpointError(
                f"update {update}: {differs}: the ranks' networks are no longer the same, and what they learn is worth "
                "nothing. A device or its memory is faulty, or a kernel differs between machines (env.json of each "
                "rank). The newest checkpoint is from before; start again from it."
            )
        write(temporary, tensors, group)
        _from_first(lambda: finish_checkpoint(temporary, final, teacher, state, sharded=True), group)
    except BaseException:
        if dist.get_rank(group) == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def on_all(do: Callable[[], None], group: dist.ProcessGroup) -> None:
    """Call `do`, which waits for no rank, on every rank of `group`. Where one raises, all do: OSError, or else
    CheckpointError, on those that did not."""
    failure: Exception | None = None
    try:
        do()
    except Exception as error:
        failure = error
    told: list[Any] = [None] * dist.get_world_size(group)
    own = None if failure is None else (str(failure), getattr(failure, "errno", None), isinstance(failure, OSError))
    dist.all_gather_object(told, own, group=group)
    if failure is not None:
        raise failure
    met = {rank: said for rank, said in enumerate(told) if said is not None}
    if met:
        words = "; ".join(f"rank {rank}: {text}" for rank, (text, *_) in met.items())
        if all(is_of_disk for *_, is_of_disk in met.values()):
            raise OSError(next((number for _, number, _ in met.values() if number), errno.EIO), words)
        raise CheckpointError(words)


def _from_first(make: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """What `make` gives on the first rank; where it raises, all raise."""
    if dist.get_rank(group) == 0:
        try:
            made = make()
        except Exception as error:
            dist.broadcast_object_list([None, str(error), getattr(error, "errno", None)], group_src=0, group=group)
            raise
        dist.broadcast_object_list([made, None, None], group_src=0, group=group)
        return made
    told: list[Any] = [None, None, None]
    dist.broadcast_object_list(told, group_src=0, group=group)
    made, words, number = told
    if words is None:
        return made
    if number is None:
        raise CheckpointError(f"rank 0: {words}")
    raise OSError(number or errno.EIO, f"rank 0: {words}")
