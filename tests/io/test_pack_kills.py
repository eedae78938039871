"""F12: the packer is killed with SIGKILL, again and again, at random moments; what it ends with is always the same.

DINOX_FAULT_KILLS and DINOX_FAULT_SEED: see CONTRIBUTING.md.
"""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dinox_io.manifest import read_manifest
from tests.io.small_packs import KEY, contents, facts, patients

Packer = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def packer(repository: Path) -> Packer:
    """(kill before change number, arguments) -> how the command ended; 0: it is let live."""
    command = [sys.executable, repository / "tests/io/killed_pack.py", repository / "tools/pack_shards.py"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}

    def run(kill_before: int, *arguments: object) -> "subprocess.CompletedProcess[str]":
        process = subprocess.run(
            [*map(str, command), str(kill_before), *map(str, arguments)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        # 3: the input has a series that is too short; 0: a part that does not have it.
        assert process.returncode in (0, 3) or (kill_before and process.returncode == -signal.SIGKILL), process.stderr
        return process

    return run


def changes(process: "subprocess.CompletedProcess[str]") -> int:
    return int(process.stdout.splitlines()[-1].removeprefix("changes: "))


def campaign(packer: Packer, out: Path, whole: Path, arguments: Sequence[object], last: int, kills: int) -> None:
    """Kill one pack after the other, each into a folder of its own, twice; then let it end."""
    moments = random.Random(int(os.environ.get("DINOX_FAULT_SEED", "0")))
    expected = contents(whole)
    killed = 0
    for number in range(kills):
        target = out / str(number)
        for kill_before in moments.choices(range(1, last + 1), k=1 + number % 2):
            killed += packer(kill_before, *arguments, "--output", target).returncode == -signal.SIGKILL
            if (target / "manifest.json").exists():
                read_manifest(target)
        packer(0, *arguments, "--output", target)
        assert contents(target) == expected, number
    assert killed >= kills


@pytest.fixture
def options(tmp_path: Path) -> list[object]:
    """A command line, but for --output: 2 workers, shards of one or two series, a key."""
    (tmp_path / "key").write_bytes(KEY)
    source = patients(tmp_path / "in", 8)
    return [source, "--workers", 2, "--shard-size", 24_000, "--key-file", tmp_path / "key"]


@pytest.mark.parametrize(
    "kills", [3, pytest.param(50, id="campaign", marks=[pytest.mark.fault, pytest.mark.timeout(3600)])]
)
def test_a_killed_pack_ends_with_the_same_bytes(
    packer: Packer, tmp_path: Path, options: list[object], kills: int
) -> None:
    last = changes(packer(0, *options, "--output", tmp_path / "whole"))
    assert last > 40
    kills = kills if kills == 3 else int(os.environ.get("DINOX_FAULT_KILLS", str(kills)))
    campaign(packer, tmp_path / "out", tmp_path / "whole", options, last, kills)


@pytest.mark.fault
@pytest.mark.timeout(3600)
def test_killed_parts_and_a_killed_merge_end_with_the_same_set(
    packer: Packer, tmp_path: Path, options: list[object]
) -> None:
    moments = random.Random(int(os.environ.get("DINOX_FAULT_SEED", "0")))
    packer(0, *options, "--output", tmp_path / "whole")
    for number in range(int(os.environ.get("DINOX_FAULT_KILLS", "15")) // 3):
        out = tmp_path / f"out{number}"
        for part in ("1/2", "2/2"):
            packer(moments.randrange(1, 50), *options, "--output", out, "--part", part)
            packer(0, *options, "--output", out, "--part", part)
        for kill_before in moments.choices(range(1, 60), k=3):
            packer(kill_before, "--output", out, "--merge")
        assert packer(0, "--output", out, "--merge").returncode == 3
        assert facts(out) == facts(tmp_path / "whole")
        assert [path.name for path in out.iterdir() if path.name.startswith("part-")] == []
