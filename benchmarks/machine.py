"""What ran a benchmark: processor, memory, load, versions, commit; and how it is held to one core.

Invariant: nothing here names a person, a host or a folder outside the repository: results are published.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
ONE_THREAD: dict[str, str] = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS", "NUMEXPR_NUM_THREADS"), "1"
)
"""Environment of every process whose figure is "one core": libraries start no threads of their own."""


@contextmanager
def one_core() -> Iterator[int]:
    """Hold this process, and those it starts meanwhile, to one core (the last it may use); gives the core's number.

    Where the system has no such call (macOS), nothing is held, and -1 is given.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield -1
        return
    before = os.sched_getaffinity(0)
    core = max(before)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)


def describe() -> dict[str, Any]:
    """Processor, cores, memory (bytes) and system: what must be equal for two results to be compared."""
    return {
        "cpu": _cpu_model(),
        "logical_cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "architecture": platform.machine(),
        "system": platform.system(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    values: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    names = ("model name", "cpu family", "model", "stepping")
    return ", ".join(
        values[name] if name == "model name" else f"{name} {values[name]}" for name in names if name in values
    )


def filesystem(folder: Path) -> str:
    """Kind of the file system that holds a folder (tmpfs, ext4 …); "unknown" where the system does not say."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text("utf-8").splitlines()]
    except OSError:
        return "unknown"
    inside = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(inside, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]


def load() -> float:
    """Processes that ran or waited in the last minute, on average."""
    return round(os.getloadavg()[0], 2)


def busy_warning(before: float, after: float) -> list[str]:
    """What a result must say if something else ran beside it. One core is ours."""
    if before > 0.5 or after > 1.5:
        return [f"the machine was busy: load {before} before and {after} after; use the ratios with care, or repeat"]
    return []


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with `+changes` where files differ from it; "unknown" outside of git."""
    try:
        name = _git("rev-parse", "HEAD")
        return name + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def command_line(arguments: Sequence[str] | None = None) -> list[str]:
    """The command as it can be published: of a path outside the repository only its name is left."""
    return [_public(text) for text in (sys.argv if arguments is None else arguments)]


def _public(text: str) -> str:
    flag, equals, value = text.partition("=")
    if text.startswith("--") and equals:
        return f"{flag}={_public(value)}"
    path = Path(text)
    if path.is_absolute() or ".." in path.parts:
        path = Path(os.path.abspath(path))  # noqa: PTH100 (a link keeps the name that was given)
        return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else f"…/{path.name}"
    return text


def child_environment(changes: Mapping[str, str] | None = None, *, ours: bool) -> dict[str, str]:
    """Environment of a worker: one thread, and our packages to be found only where they are wanted."""
    environment = {**os.environ, **ONE_THREAD, **(changes or {})}
    environment.pop("PYTHONPATH", None)
    if ours:
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).strip(
            os.pathsep
        )
    return environment
