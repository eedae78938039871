"""The SLURM script on a machine without SLURM: `srun` and `scontrol` are stand-ins that do what their manuals say, and
nodes are processes of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from dinox_train.checkpoint import list_checkpoints
from dinox_train.metrics import read_lines

SRUN = """#!/bin/bash
# One task a node at a time with all others; SIGTERM goes on to all; the code is the highest of theirs.
while [[ $1 == --* ]]; do echo "$1" >> "$STAND_IN/srun-options"; shift; done
tasks=()
trap 'kill -TERM "${tasks[@]}"' TERM
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do
    while :; do
        wait "$task"; ended=$?
        kill -0 "$task" 2>/dev/null || break
    done
    ((ended > code)) && code=$ended
done
exit $code
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) tr ',' '\\n' <<< "$3" ;;
    requeue) echo "$2" >> "$STAND_IN/requeued" ;;
esac
"""
PYTHON = """#!/bin/bash
# What a torchrun would be asked for; on SIGTERM it takes a moment, as a checkpoint does.
printf '%s\\n' "$@" > "$STAND_IN/node-$SLURM_NODEID"
trap 'sleep 0.3; echo saved >> "$STAND_IN/saved"; exit $TERMINATED' TERM
for ((i = 0; i < LASTS; i++)); do sleep 0.05; done
exit $CODE
"""
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="the script is bash")


class Job:
    """A job as SLURM would start it, on `nodes` nodes."""

    def __init__(self, repository: Path, folder: Path, *arguments: str, python: Path | str, nodes: int = 2,
                 variables: Mapping[str, str] | None = None) -> None:  # fmt: skip
        commands = folder / "bin"
        commands.mkdir(parents=True, exist_ok=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        self.folder = folder
        given = {
            "PATH": f"{commands}:{os.environ['PATH']}", "STAND_IN": str(folder), "DINOX_PYTHON": str(python),
            "SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_ON_NODE": "1",
            "SLURM_JOB_NODELIST": ",".join(["localhost", *(f"node{n}" for n in range(1, nodes))]),
        }  # fmt: skip
        with (folder / "output").open("ab") as output:
            self.process = subprocess.Popen(
                ["bash", str(repository / "configs" / "cluster" / "train.slurm"), *arguments],
                env=os.environ | given | dict(variables or {}), stdout=output, stderr=subprocess.STDOUT, cwd=repository,
            )  # fmt: skip

    def terminate(self) -> int:
        """What SLURM does before the end of an allocation: only the script itself gets the signal."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(timeout=240)

    def said(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []


def stand_in(repository: Path, folder: Path, *arguments: str, **variables: str) -> Job:
    """A job whose torchrun is a stand-in, too."""
    folder.mkdir(exist_ok=True)
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    settings = {"LASTS": "2", "CODE": "0", "TERMINATED": "1"} | variables
    return Job(repository, folder, *arguments, python=python, variables=settings)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} does not appear"
        time.sleep(0.01)


def test_each_node_gets_one_torchrun_for_all(repository: Path, tmp_path: Path) -> None:
    job = stand_in(repository, tmp_path, "--config", "a file.yaml", "seed=3")
    assert job.wait() == 0
    first, second = job.said("node-0"), job.said("node-1")
    assert first == second
    options = dict(zip(first[2::2], first[3::2], strict=False))
    assert first[:2] == ["-m", "torch.distributed.run"]
    assert options["--nnodes"] == "2"
    assert options["--nproc-per-node"] == "1"
    assert options["--rdzv-endpoint"] == "localhost:24242"
    assert options["--rdzv-id"] == "4242-0"
    assert first[first.index("dinox_train") + 1 :] == ["--config", "a file.yaml", "seed=3"]
    assert job.said("srun-options") == ["--kill-on-bad-exit=0", "--wait=900"]
    assert job.said("requeued") == []


def test_an_error_is_not_requeued(repository: Path, tmp_path: Path) -> None:
    job = stand_in(repository, tmp_path, CODE="3")
    assert job.wait() == 3
    assert job.said("requeued") == []


@pytest.mark.parametrize("finished", [False, True])
def test_the_end_of_an_allocation(repository: Path, tmp_path: Path, *, finished: bool) -> None:
    """All nodes save, then the job goes back into the queue, unless the run was done."""
    job = stand_in(repository, tmp_path, LASTS="1000", TERMINATED="0" if finished else "1")
    for node in range(2):
        wait_for(tmp_path / f"node-{node}")
    time.sleep(0.1)  # its trap is set after the file is there: one instruction
    assert job.terminate() == (0 if finished else 1)
    assert job.said("saved") == ["saved", "saved"]
    assert job.said("requeued") == ([] if finished else ["4242"])


@pytest.mark.fault
def test_a_run_goes_on_after_its_allocation_ended(
    repository: Path, tmp_path: Path, small_config: Path, small_set: Path
) -> None:
    """The real torchrun and trainer: two nodes, cut in the middle, requeued; then one node to the end."""
    folder = tmp_path / "run"
    arguments = ["--config", str(small_config), f"data.shards={small_set}", f"run.folder={folder}"]
    arguments += ["parallel.mode=ddp", "train.updates=400", "schedule.updates=400", "checkpoint.every=100"]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    job = Job(repository, tmp_path, *arguments, python=sys.executable, variables=variables)
    wait_for(folder / "metrics.jsonl")
    while len(read_lines(folder / "metrics.jsonl")) < 5:
        assert job.process.poll() is None, "\n".join(job.said("output"))
        time.sleep(0.05)
    assert job.terminate() == 1, "\n".join(job.said("output"))
    assert job.said("requeued") == ["4242"]
    saved = list_checkpoints(folder / "checkpoints")[-1]
    reached = len(read_lines(folder / "metrics.jsonl"))
    assert saved.name == f"step-{reached:08d}"
    again = [*arguments, f"train.updates={reached + 3}"]
    job = Job(repository, tmp_path, *again, python=sys.executable, nodes=1, variables=variables)
    assert job.wait() == 0, "\n".join(job.said("output"))
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["update"] for line in lines] == list(range(1, reached + 4))
    assert job.said("requeued") == ["4242"]
