"""The worker pool: order, bounded work, and tasks that crash, hang or eat memory (fault F11)."""

import os
import signal
import time

import numpy as np
import pytest

from dinox_io.workers import Failure, WorkerPool


def task(argument: tuple[str, float]) -> float:
    kind, value = argument
    if kind == "sleep":
        time.sleep(value)
    elif kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "memory":
        np.zeros(1 << 40, np.uint8)
    elif kind == "error":
        raise RuntimeError("quotes a patient's name")
    elif kind == "print":
        os.write(1, b"noise")
        os.write(2, b"noise")
    return value


def test_results_come_in_order_whatever_happens_to_some(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        ("sleep", 0.4), ("fine", 1.0), ("segfault", 2.0), ("print", 3.0), ("memory", 4.0), ("error", 5.0),
        ("fine", 6.0),
    ]  # fmt: skip
    with WorkerPool(2) as pool:
        results = list(pool.map(task, iter(arguments)))
        again = [outcome for _, outcome in pool.map(task, [("fine", 7.0)])]
    assert [argument for argument, _ in results] == arguments
    assert [outcome for _, outcome in results] == [
        0.4, 1.0, Failure("crashed"), 3.0, Failure("memory"), Failure("error", "RuntimeError"), 6.0,
    ]  # fmt: skip
    assert again == [7.0]
    assert capfd.readouterr() == ("", "")


def test_a_task_that_hangs_is_given_up() -> None:
    with WorkerPool(1, timeout_s=2.0) as pool:
        results = [outcome for _, outcome in pool.map(task, [("sleep", 600.0), ("fine", 1.0)])]
    assert results == [Failure("timeout"), 1.0]


def test_no_more_is_under_way_than_the_window_allows() -> None:
    taken: list[int] = []

    def arguments():
        for number in range(12):
            taken.append(number)
            yield ("sleep", 0.5) if number == 0 else ("fine", float(number))

    with WorkerPool(2) as pool:
        for turn, _ in enumerate(pool.map(task, arguments())):
            assert len(taken) <= turn + 2 * 2 + 2


def test_a_pool_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="at least one"):
        WorkerPool(0)
