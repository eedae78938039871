"""Threads that decode planned batches into memory, and hand them over in the order of the plan.

    plan (a pure function of the sequence number) -> placement -> jobs -> threads -> Batch -> its memory again

Invariant: what comes out depends on the plan alone, not on the threads. Memory is written only while nobody holds a
batch that lies in it. The threads hold the `Pipeline`, never the iterator that a user holds: dropping that ends them.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from io import UnsupportedOperation
from typing import Protocol

import numpy as np

from dinox_io.batch import Batch, Room
from dinox_io.decoder import ThreadDecoder
from dinox_io.errors import LoaderError, LoaderStalled, ShardError
from dinox_io.memory import Allocate, plain_memory
from dinox_io.pace import Pace
from dinox_io.placement import Job, Placed, WindowSource
from dinox_io.plan import Plan

_JOIN_S = 1.5


class Placement(Protocol):
    """See placement.py."""

    def place(self, sequence: int, plan: Plan, sizes: np.ndarray) -> Placed | None: ...
    def release(self, placed: Placed) -> None: ...


class Pipeline:
    """`take()` gives batch after batch, from sequence number `first` on, until `plan` gives None."""

    def __init__(
        self,
        sources: Sequence[WindowSource],
        plan: Callable[[int], Plan | None],
        placement: Placement,
        *,
        first: int,
        ahead: int,
        slice_size: tuple[int, int],
        pace: Pace,
        timeout_s: float,
        filtered: bool = False,
        allocate: Allocate = plain_memory,
    ) -> None:
        """sources: what Plan.set counts. ahead: batches that may be on their way. slice_size: of `Batch.images`."""
        if ahead < 1 or not timeout_s > 0:
            raise ValueError("a loader makes at least 1 batch ahead, and timeout_s is above 0")
        self._sources, self._plan, self._placement, self._timeout_s = sources, plan, placement, timeout_s
        self._ahead, self._filtered = ahead, filtered
        self.room = Room(slice_size, allocate)
        self._pace = pace
        self._changed = threading.Condition()
        self._process = os.getpid()
        self._jobs: deque[Job] = deque()  # not begun
        self._running: list[Job] = []
        self._on_the_way: deque[Placed] = deque()
        self._planned: tuple[int, Plan, np.ndarray] | None = None  # waits for room
        self._held: Placed | None = None
        self._next_planned = first
        self._planning = self._ended = self._stopped = False
        self._error: BaseException | None = None
        self.wait_s = 0.0
        self.decoders = [sources[0].new_decoder() for _ in range(pace.threads)]
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"dinox-decoder-{number}", daemon=True)
            for number in range(pace.threads)
        ]
        for thread in self._threads:
            thread.start()

    # --- the consumer ------------------------------------------------------------------------------------------

    def take(self) -> Batch | None:
        """The next batch, None at the end of the plan. The one before becomes invalid.

        Raises ShardError for damage, LoaderError for any other failure of a thread, LoaderStalled after timeout_s.
        """
        if os.getpid() != self._process:
            raise LoaderError("this loader is another process's: a fork has none of its threads; make one here")
        begin_s = time.monotonic()
        with self._changed:
            if self._held is not None:
                self._placement.release(self._held)
                self._held = None
            self._pace.asked(has_come=self._has_come(), full=len(self._on_the_way) >= self._ahead)
            self._changed.notify_all()
            come = self._changed.wait_for(self._has_come, self._timeout_s)
            self.wait_s += time.monotonic() - begin_s
            if self._error is not None:
                raise self._error
            if self._stopped:
                raise LoaderError("the loader is closed")
            if not come:
                self._stall()
            if not self._on_the_way:
                return None
            self._held = self._on_the_way.popleft()
            self._changed.notify_all()
        return self._batch(self._held)

    def _has_come(self) -> bool:
        if self._error is not None or self._stopped:
            return True
        if self._on_the_way:
            return all(job.done for job in self._on_the_way[0].jobs)
        return self._ended

    def _batch(self, placed: Placed) -> Batch:
        plan = placed.plan
        return Batch(
            windows=placed.windows,
            filtered=self._filtered,
            filters=self._of_each(plan, lambda source, volume: source.filter_of(volume)),
            assembled=placed.images,
            room=self.room,
            sizes=placed.sizes.astype(np.int32),
            set=plan.set,
            volume=plan.volume,
            center=plan.center,
            epoch=plan.epoch,
            rows=plan.rows,
            spacing_mm=self._of_each(plan, lambda source, volume: source.spacing_of(volume)),
            position=plan.position,
            part=plan.part,
        )

    def _stall(self) -> None:
        running = f"; decoding {self._running[0].text}" if self._running else ""
        self._error = LoaderStalled(
            f"no batch in {self._timeout_s:g} s{running}. The stacks of all threads are on standard error; is the "
            "storage reachable? timeout_s sets the limit"
        )
        self._stopped = True
        self._changed.notify_all()
        _dump_stacks()
        raise self._error

    def stop(self) -> None:
        """End all threads, waiting at most 1.5 s for them: one that hangs in the storage is left behind, a daemon.

        In a fork there are none, and the lock may be held for ever by one that there was: nothing is done.
        """
        if os.getpid() != self._process:
            return
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        deadline_s = time.monotonic() + _JOIN_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(deadline_s - time.monotonic(), 0))

    # --- the threads -------------------------------------------------------------------------------------------

    def _work(self, number: int) -> None:
        decoder = self.decoders[number]
        try:
            while (job := self._next_job(number)) is not None:
                self._decode(job, decoder)
                with self._changed:
                    job.done = True
                    self._running.remove(job)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._stopped = True
                self._changed.notify_all()

    def _next_job(self, number: int) -> Job | None:
        """What to decode next; plans a batch when there is nothing, and room; None when there is no more."""
        with self._changed:
            while not self._stopped:
                delay_s = self._pace.delay_s(number)
                if delay_s is None or delay_s > 0:
                    self._changed.wait(delay_s)
                elif self._jobs:
                    job = self._jobs.popleft()
                    self._running.append(job)
                    self._pace.began(job.out.nbytes)
                    return job
                elif self._ended and self._planned is None:
                    return None
                elif self._planning or len(self._on_the_way) >= self._ahead or not self._begin_batch():
                    self._changed.wait()
        return None

    def _begin_batch(self) -> bool:
        """Whether there is something new to do."""
        if self._planned is None:
            self._plan_next()
            return True
        placed = self._placement.place(*self._planned)
        if placed is None:
            return False
        self._planned = None
        self._on_the_way.append(placed)
        for job in placed.jobs:
            if not job.begun:
                job.begun = True
                self._jobs.append(job)
        self._changed.notify_all()
        return True

    def _plan_next(self) -> None:
        """Called with the lock held, which is let go while planning."""
        sequence, self._planning = self._next_planned, True
        self._changed.release()
        try:
            plan = self._plan(sequence)
            sizes = None if plan is None else self._of_each(plan, lambda source, volume: source.size_of(volume))
        finally:
            self._changed.acquire()
            self._planning = False
        if plan is None or sizes is None:
            self._ended = True
        else:
            self._planned = sequence, plan, sizes
            self._next_planned += 1
        self._changed.notify_all()

    def _decode(self, job: Job, decoder: ThreadDecoder) -> None:
        try:
            if job.before:
                job.before()
            job.source.read_frames_into(job.volume, job.slices, job.out, decoder, filtered=self._filtered)
        except ShardError:
            raise
        except Exception as error:
            raise LoaderError(f"{job.text}: {type(error).__name__}: {error}") from error

    def _of_each(self, plan: Plan, fact: Callable[[WindowSource, np.ndarray], np.ndarray]) -> np.ndarray:
        """(b, …): a fact of the volume of each row, from the set that it is in."""
        if len(self._sources) == 1:
            return fact(self._sources[0], plan.volume)
        parts = [(plan.set == number, source) for number, source in enumerate(self._sources)]
        found = [(rows, fact(source, plan.volume[rows])) for rows, source in parts]
        result = np.empty((len(plan.volume), *found[0][1].shape[1:]), found[0][1].dtype)
        for rows, values in found:
            result[rows] = values
        return result


def default_threads() -> int:
    """As many as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dump_stacks() -> None:
    for stream in (sys.stderr, sys.__stderr__):
        try:
            faulthandler.dump_traceback(file=stream, all_threads=True)  # type: ignore[arg-type]
        except (AttributeError, UnsupportedOperation, ValueError, RuntimeError):
            continue  # a stream without a file descriptor: try the process's own
        return
