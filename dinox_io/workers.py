"""Processes that read untrusted files: what crashes, hangs or eats memory in one loses one task, not the run.

Invariant: results come in the order of the tasks, whatever finished first; at most `2 * count` tasks are under way or
wait for their turn, so that memory is bounded. A worker prints nothing: codecs write what they like to stderr.
"""

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Literal

MEMORY_BYTES = 16 << 30
"""Address space of a worker: a volume of 4 GiB, its compressed form, and the way to the parent, with room to spare."""
TIMEOUT_S = 1800.0
ATTEMPTS = 2


@dataclass(frozen=True)
class Failure:
    """A task that gave no result; `error` is the name of an exception's type (never its text: it may quote a file)."""

    kind: Literal["crashed", "memory", "timeout", "error"]
    error: str = ""


@dataclass
class _Task:
    number: int
    argument: Any
    attempts: int = 0


class _Worker:
    def __init__(self, memory_bytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, memory_bytes), daemon=True)
        self.process.start()
        theirs.close()
        self.task: _Task | None = None
        self.deadline = 0.0

    def stop(self) -> None:
        self.pipe.close()
        if self.task is not None:
            self.process.kill()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


class WorkerPool:
    """`count` processes, started when first needed. A context manager: leaving it ends them all."""

    def __init__(self, count: int, *, memory_bytes: int = MEMORY_BYTES, timeout_s: float = TIMEOUT_S) -> None:
        if count < 1:
            raise ValueError(f"{count} workers: at least one is needed")
        self._count, self._memory_bytes, self._timeout_s = count, memory_bytes, timeout_s
        self._workers: list[_Worker] = []

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; those that are at work are killed."""
        while self._workers:
            self._workers.pop().stop()

    def map(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """(argument, result or `Failure`) in the order of the arguments; function and both must be picklable.

        A task whose worker dies is tried once more in a new one.
        """
        source = enumerate(arguments)
        following = next(source, None)
        waiting: list[_Task] = []
        done: dict[int, tuple[Any, Any]] = {}
        turn = 0
        while True:
            while turn in done:
                yield done.pop(turn)
                turn += 1
            while following and self._busy() + len(waiting) < self._count and following[0] < turn + 2 * self._count:
                waiting.append(_Task(*following))
                following = next(source, None)
            while waiting:
                self._start(function, waiting.pop(0))
            if not self._busy():
                return
            for task, outcome in self._collect():
                if isinstance(outcome, Failure) and outcome.kind == "crashed" and task.attempts < ATTEMPTS:
                    waiting.append(task)
                else:
                    done[task.number] = (task.argument, outcome)

    def _busy(self) -> int:
        return sum(worker.task is not None for worker in self._workers)

    def _start(self, function: Callable[[Any], Any], task: _Task) -> None:
        worker = next((worker for worker in self._workers if worker.task is None), None)
        if worker is None:
            worker = _Worker(self._memory_bytes)
            self._workers.append(worker)
        task.attempts += 1
        worker.task = task
        worker.deadline = time.monotonic() + self._timeout_s
        with suppress(OSError):  # it has died meanwhile: _collect sees its end
            worker.pipe.send((function, task.argument))

    def _collect(self) -> list[tuple[_Task, Any]]:
        """Outcomes of the workers that finished, died or are late; waits until there is one."""
        busy = [worker for worker in self._workers if worker.task is not None]
        wait_s = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        ready = set(connection.wait([worker.pipe for worker in busy], timeout=wait_s))
        outcomes: list[tuple[_Task, Any]] = []
        for worker in busy:
            task = worker.task
            assert task is not None
            if worker.pipe in ready:
                try:
                    outcome = worker.pipe.recv()
                    worker.task = None
                except (EOFError, OSError):
                    outcome = Failure("crashed")
            elif time.monotonic() >= worker.deadline:
                outcome = Failure("timeout")
            else:
                continue
            if worker.task is not None:
                self._workers.remove(worker)
                worker.stop()
            outcomes.append((task, outcome))
        return outcomes


def _serve(pipe: connection.Connection, memory_bytes: int) -> None:
    """The life of a worker: a task, its result, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent ends us
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with suppress(EOFError, OSError):
        while True:
            function, argument = pipe.recv()
            pipe.send(_outcome(function, argument))


def _outcome(function: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return function(argument)
    except MemoryError:
        return Failure("memory")
    except Exception as error:  # anything: the task is lost and said so, the worker lives on
        return Failure("error", type(error).__name__)
