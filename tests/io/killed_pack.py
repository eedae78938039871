"""Runs tools/pack_shards.py, and kills its own process before the N-th change it makes to the disk.

    python killed_pack.py TOOL N ARGUMENT ...      N = 0: never; says at the end how many changes there were

A change is a file opened for writing, renamed, linked, removed, …: the moments between which the disk differs.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

EVENTS = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree"}


def watch(kill_before: int) -> list[int]:
    """Count changes, and die before one of them."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in EVENTS or (writes and str(arguments[0]) != os.devnull):
            count[0] += 1
            if count[0] == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


if __name__ == "__main__":  # its worker processes import this file too
    tool, kill_before = sys.argv[1], int(sys.argv[2])
    sys.argv = [tool, *sys.argv[3:]]
    sys.path.insert(0, str(Path(tool).parent))  # as Python does for a script; runpy does not
    sys.dont_write_bytecode = True
    changes = watch(kill_before)
    try:
        runpy.run_path(tool, run_name="__main__")
    finally:
        print(f"changes: {changes[0]}")
