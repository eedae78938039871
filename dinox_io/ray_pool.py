"""Series packed on a Ray cluster (the extra `cluster`): the face of a WorkerPool, with its tasks on other machines.

Invariant: results come in the order of the tasks, and each is what a worker process here would have made of it: a
machine whose code, versions or files differ is refused, and each task runs there in a worker process of workers.py.
What is lost with a worker or a machine is done again. At most two tasks a core are under way or wait for their turn;
what they made waits in Ray's memory, not here. Nothing that is in a task gets into an exception or a log.
"""

import hashlib
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from dinox_io.output import PackError
from dinox_io.versions import tool_versions
from dinox_io.workers import Failure, WorkerPool

LOSSES = 10
"""Times that a task may be lost with its worker; then it is given up, as one whose worker crashes (workers.py)."""
OUT_OF_MEMORY = 3
"""Times that Ray may end a task because its machine is out of memory."""
PATIENCE_S = 600.0
"""How long a cluster may be without any core."""
LOOK_EVERY_S = 5.0
GRACE_S = 30.0
"""After which a machine's tasks must have been reported as lost once Ray has taken it for dead."""
CONNECT_S = 10.0

_ADDRESS = re.compile(r"auto|local|(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):\d{1,5}")


def check_address(address: str) -> None:
    """ValueError unless it is what --ray takes."""
    if not _ADDRESS.fullmatch(address):
        raise ValueError(f"{address!r} is no address of a Ray cluster: give auto, local, or HOST:PORT")


@dataclass(frozen=True)
class _Unfit:
    """A machine that cannot do what this one would: its code, or its files, are others."""

    machine: str
    differs: Literal["code", "files"]
    details: str = ""


@dataclass
class _Task:
    number: int
    argument: Any
    sight: str
    begun_s: float = 0.0
    """When it was last handed to Ray."""
    losses: int = 0
    result: Any = None
    """Ray's reference to it, once it is there."""
    failure: Failure | None = None


_UnderWay = dict[Any, tuple[_Task, Any]]
"""Ray's reference to the state of a try, which is small and comes here at once, to the task and to its result."""


class RayPool:
    """The cores of a Ray cluster. A context manager: entering it connects, leaving it ends what is at work."""

    def __init__(
        self, address: str, *, local_cores: int, sight: Callable[[Any], str], patience_s: float = PATIENCE_S
    ) -> None:
        """Args:
        address: `auto` (the cluster that this machine is in), `local` (begin one here, for as long as this lives), or
            HOST:PORT of a cluster's head, from a machine that is in it.
        local_cores: for `local`. sight: a digest of what a machine sees of the files of a task's argument.
        """
        check_address(address)
        self._address, self._local_cores, self._sight, self._patience_s = address, local_cores, sight, patience_s
        self._ray: Any = None
        self._window, self._counted_s, self._seen_s = 2, float("-inf"), time.monotonic()
        self._alive: set[str] = set()
        self._died_s: float | None = None
        self.repeats = 0
        """How often a task was handed to Ray once more, as its worker or machine was lost, or may have been."""

    def __enter__(self) -> "RayPool":
        # Read when Ray is imported and where it starts processes: nothing is reported to anyone, nothing is warned of.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            self._ray = import_module("ray")
        except ImportError:
            raise PackError("--ray needs Ray, which is not installed: pip install 'dinox[cluster]'") from None
        own = {"num_cpus": self._local_cores, "include_dashboard": False} if self._address == "local" else {}
        try:
            if ":" in self._address:  # Ray itself goes on trying for minutes
                host, _, port = self._address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
            self._ray.init(self._address, log_to_driver=False, logging_level=logging.CRITICAL, **own)
        except (OSError, OverflowError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            raise PackError(
                f"no Ray cluster could be reached at {self._address} ({type(error).__name__}): run this on a machine "
                "that `ray start` has made one of the cluster, with the same Ray and Python, and its token"
            ) from None
        self._run = self._ray.remote(_run)
        self._affinity = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        self._expected = self._ray.put((_code(), tool_versions()))
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def describe(self) -> str:
        """One line for a log: how many cores and machines there are now."""
        cores = int(self._ray.cluster_resources().get("CPU", 0))
        return f"Ray {self._ray.__version__} at {self._address}: {cores} cores on {len(self._machines())} machines"

    def _machines(self) -> set[str]:
        """Those with cores that Ray takes for alive."""
        nodes = self._ray.nodes()
        return {node["NodeID"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) > 0}

    def map(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """(argument, result or `Failure`) in the order of the arguments; as WorkerPool.map.

        PackError if a machine differs from this one, cannot run the task, or the cluster has had no core for long.
        """
        source = enumerate(arguments)
        following = next(source, None)
        under_way: _UnderWay = {}
        done: dict[int, _Task] = {}
        turn = 0
        while True:
            self._look_around()
            while following and following[0] < turn + self._window:
                number, argument = following
                self._submit(function, _Task(number, argument, self._sight(argument)), under_way)
                following = next(source, None)
            if turn in done:
                task = done.pop(turn)
                lost, outcome = self._fetched(task)
                if lost:
                    self._submit(function, task, under_way)
                else:
                    yield task.argument, outcome
                    turn += 1
                continue
            if not under_way:
                return
            self._repeat_silent(function, under_way)
            for reference in self._finished(list(under_way)):
                if reference not in under_way:  # another try of its task came in with it
                    continue
                task, result = under_way.pop(reference)
                others = [other for other, (same, _) in under_way.items() if same is task]
                if self._settled(reference, task):
                    task.result = result
                    done[task.number] = task
                    for other in others:
                        del under_way[other]
                elif not others:
                    self._submit(function, task, under_way)

    def _submit(self, function: Callable[[Any], Any], task: _Task, under_way: "_UnderWay") -> None:
        options: dict[str, Any] = {"num_cpus": 1, "num_returns": 2, "max_retries": 0}
        machines = sorted(self._machines()) if task.begun_s else []
        if machines:
            # Where Ray is free to choose, it may still wait for a machine that is gone to say whether it has room.
            machine = machines[self.repeats % len(machines)]
            options["scheduling_strategy"] = self._affinity(machine, soft=True)
        task.begun_s = time.monotonic()
        given = (function, task.argument, task.sight, self._sight, self._expected)
        state, result = self._run.options(**options).remote(*given)
        under_way[state] = task, result

    def _repeat_silent(self, function: Callable[[Any], Any], under_way: "_UnderWay") -> None:
        """Hand over again what has been under way since before a machine died: Ray tells of a task on a machine whose
        network was cut only after minutes (the keep-alive of its connections), and never where a task is. All tries of
        a task give the same; the first that comes is taken."""
        if self._died_s is None or time.monotonic() - self._died_s < GRACE_S:
            return
        tasks = {task.number: task for task, _ in under_way.values() if task.begun_s < self._died_s}
        self._died_s = None
        for task in tasks.values():
            self.repeats += 1
            self._submit(function, task, under_way)

    def _look_around(self) -> None:
        """As machines come and go, so does what may be under way. PackError where there has been none for long."""
        now_s = time.monotonic()
        if now_s - self._counted_s < LOOK_EVERY_S:
            return
        self._counted_s = now_s
        alive = self._machines()
        if self._alive - alive:
            self._died_s = now_s
        self._alive = alive
        cores = int(self._ray.cluster_resources().get("CPU", 0))
        if cores:
            self._seen_s, self._window = now_s, 2 * cores
        elif now_s - self._seen_s > self._patience_s:
            raise PackError(
                f"the Ray cluster at {self._address} has had no core for {self._patience_s:.0f} s: start machines of "
                "it, and run the same command again to go on behind the last finished shard"
            )

    def _finished(self, references: list[Any]) -> list[Any]:
        """Those of the references whose task has ended, or was lost; none if none does so for a while."""
        self._ray.wait(references, timeout=LOOK_EVERY_S)
        return self._ray.wait(references, num_returns=len(references), timeout=0)[0]

    def _settled(self, reference: Any, task: _Task) -> bool:
        """Whether the task is done, or given up; False: it is to be done again. PackError."""
        lost, state = self._got(reference, task)
        if isinstance(state, _Unfit):
            self._refuse(state, task)
            return False
        return not lost

    def _refuse(self, unfit: _Unfit, task: _Task) -> None:
        """PackError, unless the files have become others meanwhile, here too."""
        if unfit.differs == "code":
            raise PackError(
                f"{unfit.machine} of the Ray cluster has another dinox or other packages than this machine "
                f"({unfit.details}): its shards could differ. Install the same on all machines"
            )
        sight = self._sight(task.argument)
        if sight == task.sight:
            raise PackError(
                f"{unfit.machine} of the Ray cluster does not see the files of INPUT that this machine sees: INPUT "
                "must lie on a file system that all its machines have at the same path"
            )
        task.sight = sight

    def _fetched(self, task: _Task) -> tuple[bool, Any]:
        """(whether it was lost, what the task made)"""
        return (False, task.failure) if task.failure else self._got(task.result, task)

    def _got(self, reference: Any, task: _Task) -> tuple[bool, Any]:
        """(whether it is to be done again, the value of a reference of the task, or its Failure). PackError."""
        errors = self._ray.exceptions
        try:
            return False, self._ray.get(reference)
        except errors.RayTaskError as error:
            cause = error.cause
            missing = f" of {cause.name}" if isinstance(cause, ImportError) else ""
            raise PackError(
                f"a machine of the Ray cluster cannot run dinox ({type(cause).__name__}{missing}): install the same "
                "on all machines, or start Ray there where it is found"
            ) from None
        except (errors.LocalRayletDiedError, errors.RaySystemError, errors.OutOfDiskError) as error:
            raise PackError(
                f"the Ray cluster at {self._address} has failed ({type(error).__name__}): run the same command again "
                "when it works, to go on behind the last finished shard"
            ) from None
        except errors.RayError as error:
            kind: Literal["memory", "crashed"] = "memory" if isinstance(error, errors.OutOfMemoryError) else "crashed"
        task.losses += 1
        self.repeats += 1
        if task.losses < (OUT_OF_MEMORY if kind == "memory" else LOSSES):
            return True, None
        task.failure = Failure(kind)
        return False, task.failure


# ------------------------------------------------------------------------------------- on a machine of the cluster

_own_worker: WorkerPool | None = None


def _run(
    function: Callable[[Any], Any], argument: Any, sight: str, sight_of: Callable[[Any], str],
    expected: tuple[str, dict[str, str]],
) -> tuple[_Unfit | None, Any]:  # fmt: skip
    """A task of Ray: `function(argument)`, or a Failure, in a worker process that is kept for the next task."""
    global _own_worker
    differing = _differing(*expected)
    if differing:
        return _Unfit(socket.gethostname(), "code", differing), None
    if sight_of(argument) != sight:
        return _Unfit(socket.gethostname(), "files"), None
    if _own_worker is None:
        # Its process would import the script of Ray's own process, and all of Ray with it, to find nothing there.
        sys.modules["__main__"].__dict__.pop("__file__", None)
        _own_worker = WorkerPool(1)
    [(_, outcome)] = _own_worker.map(function, [argument])
    return None, outcome


def _differing(code: str, versions: dict[str, str]) -> str:
    """What differs from the machine that asks; empty if nothing does."""
    here = tool_versions()
    names = [name for name in sorted(versions.keys() | here.keys()) if versions.get(name) != here.get(name)]
    found = [f"{name} {here.get(name, 'missing')}, not {versions.get(name, 'installed')}" for name in names]
    return "; ".join(found) or ("" if code == _code() else "the source of dinox_io")


@cache
def _code() -> str:
    """sha256 of the source of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        with suppress(FileNotFoundError):  # an editor's, that came and went
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
