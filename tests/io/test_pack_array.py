"""The script of a job array (configs/cluster/pack.slurm): its own commands, with processes in the place of SLURM."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.io.dicom_factory import set_pixels, stored_slice, write_series
from tests.io.small_packs import KEY, contents, facts, patients

SBATCH = """#!/bin/bash
echo "sbatch $*" >> "$CALLS"
array= script=
while [[ "$1" == --* ]]; do
    case "$1" in --array=1-*) array="${1#--array=1-}" ;; esac
    shift
done
export SLURM_CPUS_PER_TASK=1 SLURM_JOB_ID=100
if [ -z "$array" ]; then
    bash "$@" >&2
    exit
fi
for number in $(seq "$array"); do
    SLURM_ARRAY_TASK_ID="$number" SLURM_ARRAY_TASK_MAX="$array" bash "$@" >&2 || echo "failed: $number" >> "$CALLS"
done
echo "100;cluster"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
"""

Environment = dict[str, str]


@pytest.fixture
def slurm(repository: Path, tmp_path: Path) -> Environment:
    """An environment whose sbatch runs jobs at once, one after the other, and whose scontrol notes what it is asked."""
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "key").write_bytes(KEY)
    return {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls.txt"),
        "DINOX_PYTHON": sys.executable, "PYTHONPATH": str(repository),
    }  # fmt: skip


def commands(repository: Path) -> str:
    """Those at the head of the script."""
    text = (repository / "configs/cluster/pack.slurm").read_text("utf-8")
    return "".join(f"{line}\n" for line in re.findall(r"^#     (.+)$", text, re.MULTILINE))


def test_the_commands_of_the_script_pack_the_set(repository: Path, tmp_path: Path, slurm: Environment) -> None:
    source = patients(tmp_path / "in", 4)
    text = commands(repository)
    for before, after in (
        ("/shared/scans", source), ("/shared/shards", tmp_path / "out"), ("--array=1-16", "--array=1-3"),
        ("/shared/private/dinox.key", tmp_path / "key"),
    ):  # fmt: skip
        assert before in text
        text = text.replace(before, str(after))
    done = subprocess.run(["bash", "-euc", text], cwd=repository, env=slurm, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert [call.split()[1:3] for call in calls] == [
        ["--parsable", "--array=1-3"], ["--dependency=afterany:100", "configs/cluster/pack.slurm"],
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["manifests", "private"]
    tool = [sys.executable, "tools/pack_shards.py", source, "--output", tmp_path / "whole", "--key-file"]
    subprocess.run([*map(str, tool), str(tmp_path / "key")], cwd=repository, env=slurm, capture_output=True)
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


def test_the_commands_of_the_guide_are_those_of_the_script(repository: Path) -> None:
    guide = (repository / "docs/cluster.md").read_text("utf-8")
    assert commands(repository) in guide


def until(true: Callable[[], object]) -> None:
    end_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_part_at_the_end_of_its_allocation_is_queued_again_and_goes_on(
    repository: Path, tmp_path: Path, slurm: Environment
) -> None:
    for number in range(8):
        write_series(
            tmp_path / "in" / str(number), 12, series=f"1.7.{number}", patient=f"P{number}",
            change=lambda z, dataset, seed=100 * number: set_pixels(dataset, stored_slice(z + seed, 256, 256)),
        )  # fmt: skip
    write_series(tmp_path / "in/short", 2, series="1.9")
    job = {"SLURM_JOB_ID": "103", "SLURM_ARRAY_TASK_ID": "1", "DINOX_PARTS": "1", "SLURM_ARRAY_TASK_MAX": "7"}
    script = ["bash", "configs/cluster/pack.slurm", str(tmp_path / "in"), "--key-file", str(tmp_path / "key")]
    script += ["--shard-size", "1MB"]

    def begun(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*script, "--output", str(tmp_path / name)], cwd=repository, env={**slurm, **job},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    first = begun("out")
    # The first of two is finished in the journal, too.
    until(lambda: len(list(tmp_path.glob("out/part-1-of-1/shard-*.tar"))) > 1 or first.poll() is not None)
    first.terminate()
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 143, said
    assert (tmp_path / "calls.txt").read_text() == "scontrol requeue 103\n"
    again = begun("out")
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert "taken over from an interrupted run" in said
    assert "TOO_FEW_SLICES" in said
    begun("whole").communicate(timeout=60)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (tmp_path / "calls.txt").read_text() == "scontrol requeue 103\n"
