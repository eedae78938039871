"""Processors, memory and limits of the host: facts -> findings."""

from __future__ import annotations

from checkup.finding import Outcome, fail, ok, warn
from checkup.machine import Machine
from dinox_train.platform.memory import HOST_RESERVE

_GIB = 2**30
OPEN_FILES_BESIDE = 64
"""That a run has open beside its shards."""
FEW_OPEN_FILES = 1024
SMALL_MEMORY = 8 * _GIB


def memory(machine: Machine) -> Outcome:
    """Whether there is memory for a run now."""
    host = machine.host
    if host.available_bytes is None:
        return None
    seen = f"{host.available_bytes / _GIB:.1f} of {host.memory_bytes / _GIB:.1f} GiB are free"
    taken = machine.taken
    if taken is not None and taken.is_gpu and taken.unified and host.available_bytes < 2 * HOST_RESERVE:
        return warn(
            "memory",
            seen,
            why="the GPU takes its memory from there; below 13 GiB for the host its queues stand still (halogen#85)",
            mend="end what else runs here",
        )
    if host.available_bytes < SMALL_MEMORY / 4:
        return fail("memory", seen, why="no run fits beside what is there", mend="end what else runs here")
    if host.available_bytes < SMALL_MEMORY:
        return warn(
            "memory",
            seen,
            why="the loader alone may take 2.3 GiB, and checkpoints a copy of the networks",
            mend="end what else runs here, or lower data.pool_mib and data.prefetch_mib",
        )
    return ok("memory", seen)


def memory_limit(machine: Machine) -> Outcome:
    """A control group that may take less than there is."""
    host = machine.host
    if host.memory_limit_bytes is None or host.memory_limit_bytes >= host.memory_bytes:
        return None
    return warn(
        "memory-limit",
        f"this process may take {host.memory_limit_bytes / _GIB:.1f} of {host.memory_bytes / _GIB:.1f} GiB",
        why="at the limit the kernel kills the run; the loader heeds it, networks and checkpoints do not",
        mend="raise it (--memory of a container, MemoryMax of a unit, --mem of a job), or keep data.pool_mib, "
        "data.prefetch_mib and data.cache_mib well below it",
    )


def processors(machine: Machine) -> Outcome:
    """Processors, and a control group that may use fewer."""
    host = machine.host
    if host.cpu_limit is not None and host.cpu_limit < host.cores:
        return warn(
            "processors",
            f"this process may use {host.cpu_limit:g} of {host.cores}",
            why="threads are counted by processors; those beyond the limit are stopped together, again and again",
            mend="raise it (--cpus of a container, CPUQuota of a unit), or set "
            f"data.threads={max(1, int(host.cpu_limit))} and OMP_NUM_THREADS={max(1, int(host.cpu_limit))}",
        )
    return ok("processors", f"{host.cores}")


def swap(machine: Machine) -> Outcome:
    """Memory that lies on the disk."""
    host = machine.host
    if not host.swap_bytes:
        return ok("swap", "none")
    seen = f"{host.swap_used_bytes / _GIB:.1f} of {host.swap_bytes / _GIB:.1f} GiB in use"
    if host.swap_used_bytes > 0.1 * host.memory_bytes:
        return warn(
            "swap",
            seen,
            why="memory was short: what lies there comes back page by page, in the middle of a run",
            mend="end what took it, then sudo swapoff -a && sudo swapon -a",
        )
    return ok("swap", seen)


def overcommit(machine: Machine) -> Outcome:
    """A kernel that promises no more memory than it has."""
    if machine.host.overcommit != 2:
        return None
    return warn(
        "overcommit",
        "vm.overcommit_memory is 2",
        why="drivers of GPUs reserve far more addresses than they use, and fail where these count as memory",
        mend="sudo sysctl vm.overcommit_memory=0",
    )


def open_files(machine: Machine) -> Outcome:
    """Shards are open files."""
    limit, shards = machine.host.open_files, machine.wanted.shards
    if limit is None:
        return ok("open-files", "without a limit")
    mend = "ulimit -n 65536 before the run, LimitNOFILE=65536 in a unit"
    if shards is not None:
        seen = f"{limit} may be open, the set has {shards} shards"
        if limit < shards + OPEN_FILES_BESIDE:
            return fail("open-files", seen, why="each shard is a file that stays open", mend=mend)
        return ok("open-files", seen)
    if limit < FEW_OPEN_FILES:
        return warn("open-files", f"{limit} may be open", why="each shard is a file that stays open", mend=mend)
    return ok("open-files", f"{limit} may be open")


CHECKS = (processors, memory, memory_limit, swap, overcommit, open_files)
