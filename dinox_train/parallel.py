"""Several processes of one run: how they come together, what they agree on, and how gradients are summed.

The only file that decides between one process, `ddp` and `fsdp` (the section `parallel`), on torch.distributed. Of one
process nothing of it is ever initialised. Invariant: what decides over the course of a run (a signal, damage, a health
stop, a checkpoint) is agreed on by all ranks at the same place of the loop, so that none waits for one that has left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import init_device_mesh

from dinox_model.execution import Execution
from dinox_train.config import Config, ConfigError
from dinox_train.network import Forward, Networks, Shards
from dinox_train.platform import choose_device
from dinox_train.ranks import ALONE, Ranks
from dinox_train.stages import stages_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Result = TypeVar("Result")


class GradientMissing(RuntimeError):
    """A parameter that should learn does not."""


class PeerFailed(RuntimeError):
    """Another rank met an error, and this one ends with it: which rank, and what it said."""


@dataclass(frozen=True)
class Parallel:
    """One process among those of a run."""

    device: torch.device
    mode: Literal["none", "ddp", "fsdp"] = "none"
    """none: it is alone."""
    ranks: Ranks = ALONE
    hosts: ProcessGroup | None = None
    """Between the processes themselves, whatever their devices."""
    saving: ProcessGroup | None = None
    """The same, for the thread that writes checkpoints."""
    on_host: int = 1
    """Processes of the run on this machine, which share its memory."""
    mesh: DeviceMesh | None = None
    """The ranks, as fsdp wants them."""
    _checked: list[bool] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        """Whether this process owns the run folder."""
        return self.ranks.rank == 0

    def own(self, config: Config) -> Config:
        """What this process runs with: the first alone tells others of the run."""
        if self.is_first:
            return config
        events = config.events.model_copy(update={"command": None})
        log = config.log.model_copy(update={"sinks": ()})
        return config.model_copy(update={"events": events, "log": log})

    def largest(self, *values: int) -> tuple[int, ...]:
        """Elementwise over the ranks; each must come here."""
        if self.hosts is None:
            return values
        agreed = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.hosts)
        return tuple(agreed.tolist())

    def from_first(self, make: Callable[[], Result]) -> Result:
        """What `make` gives on the first rank, on all of them. Where it raises, the others raise PeerFailed."""
        if self.hosts is None:
            return make()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = make()
            except Exception as error:
                dist.broadcast_object_list([None, _in_words(error)], src=0, group=self.hosts)
                raise
        dist.broadcast_object_list(told, src=0, group=self.hosts)
        if told[1] is not None:
            raise PeerFailed(f"rank 0 ended: {told[1]}")
        return told[0]

    def together(self, do: Callable[[], Result], *failures: type[Exception]) -> Result:
        """What `do` gives, once all have theirs. Where a rank raises one of `failures`, the others raise PeerFailed."""
        if self.hosts is None:
            return do()
        own: list[Result] = []
        failure: Exception | None = None
        try:
            own.append(do())
        except failures as error:
            failure = error
        if self.largest(failure is not None)[0]:
            told: list[str | None] = [None] * self.ranks.count
            dist.all_gather_object(told, failure and _in_words(failure), group=self.hosts)
            raise failure or PeerFailed("; ".join(f"rank {rank}: {said}" for rank, said in enumerate(told) if said))
        return own[0]

    @property
    def shards(self) -> Shards | None:
        """What shares weights out under fsdp; None where each rank has all of them."""
        if self.mesh is None:
            return None
        from dinox_train.sharded_weights import ShardedWeights

        mesh = self.mesh
        return lambda network, precision: ShardedWeights(network, mesh, precision)

    def prepare(self, networks: Networks, unread: Sequence[str]) -> None:
        """Have gradients summed over the ranks from now on. unread: parameters (or the beginnings of their names) that
        the objective does not read in each update."""
        if self.mode == "ddp":
            networks.sums_gradients = DataParallel(networks.student, unread, copied=self.device.type == "cuda")

    def check_gradients(self, named: Sequence[tuple[str, nn.Parameter]], unread: Sequence[str]) -> None:
        """Once, after the first update: raise GradientMissing where a trainable parameter of several ranks has no
        gradient, and should."""
        if self.mode == "none" or self._checked:
            return
        self._checked.append(True)
        beginnings = tuple(unread)
        missing = [
            name for name, one in named if one.requires_grad and one.grad is None and not name.startswith(beginnings)
        ]
        if missing:
            raise GradientMissing(
                f"parameters without a gradient in the first update of this process: {', '.join(missing[:5])} ("
                f"{len(missing)} in all). Several ranks sum the gradients of all: an objective says in `unread` what "
                "its losses never read (dinox_train/objectives/objective.py)"
            )


class DataParallel:
    """torch's DistributedDataParallel about the student: it sums gradients while the backward still goes on."""

    def __init__(self, student: nn.Module, unread: Sequence[str], *, copied: bool) -> None:
        """copied: gradients are tensors of their own, at the aligned addresses that the fused optimizer wants, and not
        views of what is sent."""
        self._module = nn.parallel.DistributedDataParallel(
            _Forward(student),
            gradient_as_bucket_view=not copied,
            find_unused_parameters=bool(unread),
        )
        # Shares of a loss add up. Its own hook would divide by the number of ranks.
        self._module.register_comm_hook(None, _sum)

    def __call__(self, forward: Forward, *, last: bool) -> dict[str, Tensor]:
        if not last:
            with self._module.no_sync():
                return self._module(forward)
        return self._module(forward)


class _Forward(nn.Module):
    """What DistributedDataParallel wraps: its forward is a micro-batch's losses, whatever passes those take."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, forward: Forward) -> dict[str, Tensor]:
        return forward()


def _sum(group, bucket):  # torch wants annotations to be types themselves, not words for them
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


@contextmanager
def joined(config: Config) -> Iterator[Parallel]:
    """This process with the others that torchrun started beside it, if any. Raises ConfigError where the configuration
    does not fit them, or a device is not there."""
    rank, count, local_rank = launched()
    device = _device(config, count, local_rank)
    if count == 1:
        yield Parallel(device)
        return
    mode = config.parallel.mode
    if mode == "none":
        raise ConfigError(
            f"parallel.mode is none, and {count} processes were started (WORLD_SIZE): each would train for itself. Set "
            "parallel.mode=ddp, or fsdp where the networks do not fit"
        )
    if mode == "fsdp":
        _check_fsdp(config)
    timeout = timedelta(seconds=config.parallel.timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    hosts = dist.new_group(backend="gloo", timeout=timeout)
    saving = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(hosts, dist.ProcessGroup)
    assert isinstance(saving, dist.ProcessGroup)
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    mesh = init_device_mesh(device.type, (count,)) if mode == "fsdp" else None
    yield Parallel(device, mode, Ranks(rank, count, _all_reduce), hosts, saving, on_host, mesh)
    # Only where all went well: after an error the others may not come, and the process ends anyway.
    dist.destroy_process_group()


def lost_rank_in_words(error: BaseException, config: Config) -> str | None:
    """Words for an error of a collective, of which there is one where another rank died; None: it is another error."""
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(sign in text for sign in _SIGNS):
        return None
    return (
        "the processes of the run lost each other: another rank has ended or hangs, its own output says why (rank 0 "
        f"logs to {config.run.folder}/train.log, others to {config.run.folder}/ranks/). Collectives wait "
        f"parallel.timeout_s={config.parallel.timeout_s} s at most. The newest checkpoint is intact: the same command "
        f"goes on from it, with as many processes or another number of them. ({text.strip().splitlines()[0][:300]})"
    )


_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


def launched() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, as torchrun says them; of one process 0, 1, 0."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    try:
        rank, count, local_rank = (int(os.environ.get(name, "0")) for name in names)
    except ValueError:
        given = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise ConfigError(f"the environment says {given}: those must be numbers, as torchrun sets them") from None
    return rank, count, local_rank


def _device(config: Config, count: int, local_rank: int) -> torch.device:
    try:
        device = choose_device(config.device)
        if device.type != "cuda" or count == 1:
            return device
        if device.index is not None:
            raise ValueError(f"device: {config.device} is one GPU, and {count} processes were started; set device=cuda")
        return choose_device(f"cuda:{local_rank}")
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_fsdp(config: Config) -> None:
    from dinox_train.sharded_weights import check_execution, check_torch

    try:
        check_torch()
        for stage in stages_of(config):
            check_execution(Execution(compile=stage.config.execution.compile))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _all_reduce(values: Tensor, operation: Literal["sum", "max"]) -> Tensor:
    reduced = values.detach().clone()
    dist.all_reduce(reduced, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
    return reduced


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
