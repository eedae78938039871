"""Processes of one run, started as torchrun starts them, and gone after the test whatever happens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SECONDS = 400.0
"""Far more than any run here takes: nothing may hang without a word."""
_MAIN = "import sys; from dinox_train.__main__ import main; sys.exit(main())"


@contextmanager
def started(
    count: int, folder: Path, *arguments: str, first: str | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """`count` processes of `python -m dinox_train ARGUMENTS`; what each says goes to FOLDER.rankN.txt.

    first: a program that each runs before: it breaks something, say.
    """
    program = ["-m", "dinox_train"] if first is None else ["-c", f"{first}\n{_MAIN}"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in world.items() if count > 1}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
        command = [sys.executable, *program, *arguments, f"run.folder={folder}"]
        with output_of(folder, rank).open("w") as output:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
            )
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def output_of(folder: Path, rank: int) -> Path:
    """What rank `rank` of the run in `folder` said."""
    return folder.with_name(f"{folder.name}.rank{rank}.txt")


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[int]:
    """Exit codes, once all have ended."""
    end_s = time.monotonic() + SECONDS
    return [process.wait(max(0.1, end_s - time.monotonic())) for process in processes]


def ran(count: int, folder: Path, *arguments: str) -> None:
    """Run to the end; fails with what was said where a process did not end well."""
    with started(count, folder, *arguments) as processes:
        codes = ended(processes)
    said = [output_of(folder, rank).read_text()[-3000:] for rank in range(count)]
    assert codes == [0] * count, "\n".join(said)


def wait_for(true: Callable[[], bool], processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until `true`, while all processes live."""
    end_s = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end_s
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
