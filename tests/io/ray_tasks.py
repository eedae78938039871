"""Tasks for a RayPool that misbehave. Each runs in a worker process of workers.py, whose parent is a process of Ray."""

import os
import signal
import time
from pathlib import Path

Order = tuple[int, Path]
"""A number, and a folder for notes of what was begun."""


def sight(order: Order) -> str:
    """As if all machines saw the same."""
    return str(order[0])


def own_sight(_: Order) -> str:
    """As if no two processes saw the same."""
    return str(os.getpid())


def begun(folder: Path) -> list[str]:
    """`number.process` of all that was begun, in order of the numbers."""
    return sorted(path.name for path in folder.glob("*.*"))


def held_task(order: Order) -> int:
    """Notes that it has begun, and waits for a file `go` beside the note."""
    number, folder = order
    (folder / f"{number}.{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.02)
    return number * number


def loses_its_ray_worker(order: Order) -> int:
    """Number 1 kills Ray's process the first time, number 2 its own, each time; number 3 raises what quotes a name."""
    number, folder = order
    first = not begun(folder / str(number))
    (folder / str(number) / f"{number}.{os.getpid()}").touch()
    if number == 1 and first:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3:
        raise ValueError("ZZPLANTED")
    return number * number
