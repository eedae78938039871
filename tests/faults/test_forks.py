"""F30: a process is forked while the loader's and the saver's threads are at work. On a CPU: a GPU's context after a
fork is the driver's matter, and was not tried.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dinox_train.__main__ import main
from tests.faults.run_outcome import assert_same_run, events, updates_saved

FORKING = """
import os, subprocess, sys, threading, time
from dataclasses import replace
import dinox_train.run as run
from dinox_model import PRESETS
from dinox_train.__main__ import main

PRESETS["vit_ti"] = replace(PRESETS["vit_ti"], num_layers=2, width=64, num_heads=2, mlp_hidden=128)
children, beat = [], run.RunFolder.beat
threads = set()

def beat_and_fork(self, update):
    # After each update: decoders work ahead, and a checkpoint is being written.
    beat(self, update)
    threads.update(thread.name.rstrip("0123456789_-") for thread in threading.enumerate())
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    child = os.fork()
    if child == 0:
        if update == 3:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            time.sleep(120)
            os._exit(0)
        sys.exit(0)   # leaves through every `finally` of the trainer, as a library's child may
    children.append(child)

run.RunFolder.beat = beat_and_fork
code = main(sys.argv[1:])
left, deadline = dict.fromkeys(children[:2] + children[3:]), time.monotonic() + 30
while any(status is None for status in left.values()) and time.monotonic() < deadline:
    for child, status in left.items():
        if status is None:
            done, found = os.waitpid(child, os.WNOHANG)
            left[child] = os.waitstatus_to_exitcode(found) if done else None
    time.sleep(0.05)
print("sleeper", children[2])
print("children", sorted(left.values(), key=str))
print("threads", sorted(threads))
sys.exit(code)
"""

LOADER = """
import os, sys, time
import dinox_io

shards = dinox_io.open_shards(sys.argv[1])
loader = dinox_io.Loader(shards, batch_size=2, threads=3, prefetch_bytes=1 << 26, timeout_s=300)
codes = []
for _ in range(20):
    next(loader)
    child = os.fork()
    if child == 0:
        try:
            next(loader)
        except dinox_io.LoaderError as error:
            loader.close()
            own = dinox_io.Loader(shards, batch_size=2, position=loader.position)
            own.close()
            sys.exit(7 if "another process" in str(error) else 1)
        sys.exit(2)
    begin = time.monotonic()
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() - begin < 20:
        time.sleep(0.01)
    codes.append(os.waitstatus_to_exitcode(ended[1]) if ended[0] else "hangs")
print(set(codes), loader.position)
loader.close()
"""


def _ran(source: str, *arguments: str) -> list[str]:
    environment = os.environ | {"PYTHONWARNINGS": "ignore::DeprecationWarning", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def settings(small_config: Path, small_set: Path, tiny_preset: None) -> list[str]:
    intervals = ["checkpoint.every=1", "evaluate.every=100", "schedule.updates=9"]
    return ["--config", str(small_config), f"data.shards={small_set}", *intervals]


def test_forks_in_the_middle_of_a_run(settings: list[str], tmp_path: Path) -> None:
    forked, straight = tmp_path / "forked", tmp_path / "straight"
    said = _ran(FORKING, *settings, f"run.folder={forked}", "train.updates=4")
    sleeper = int(next(line for line in said if line.startswith("sleeper ")).split()[1])
    try:
        assert "children [0, 0, 0]" in said, said[-3:]
        (threads,) = [line for line in said if line.startswith("threads ")]
        assert "dinox-decoder" in threads
        assert "checkpoint" in threads
        os.kill(sleeper, 0)  # a child that outlives the trainer is there, and does not keep the folder
        assert main([*settings, f"run.folder={forked}", "train.updates=5"]) == 0
        os.kill(sleeper, 0)
    finally:
        os.kill(sleeper, signal.SIGKILL)
    assert main([*settings, f"run.folder={straight}", "train.updates=5"]) == 0
    assert_same_run(forked, straight)
    assert updates_saved(forked) == updates_saved(straight)
    names = [name for name, _ in events(forked)]
    assert names == ["started", "ended", "resumed", "ended"], "a child wrote among the trainer's events"


def test_a_loader_in_a_fork(small_set: Path) -> None:
    """It says at once whose it is, closing it waits for no thread, and another one can be made there."""
    assert _ran(LOADER, str(small_set)) == ["{7} 20"]
