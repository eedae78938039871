"""ranks.py with scripts in the places of runs: who has a turn alone runs, and nobody is left behind."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest
from harness import AGAIN, measure
from monitor_load import LoadError
from ranks import ONE_THREAD, TWO_PROCESSES, TWO_THREADS, Processes, Start, Turn, command_of, family, main

# Updates of 0.02 s of each of its processes, which wait for each other as ranks do: the second one is a child's.
RUN = """
import json, subprocess, sys, time
from pathlib import Path
run, seconds = Path(sys.argv[1]), float(sys.argv[2])
run.mkdir(exist_ok=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
with (run / "metrics.jsonl").open("a") as file:
    for update in range(1, 100000):
        time.sleep(seconds)
        print(json.dumps({"update": update, "images_per_s": 8 / seconds}), file=file, flush=True)
        (run / ".new").write_text(str(update))
        (run / ".new").replace(run / "heartbeat")
"""
SHORT = """
import sys, time
from pathlib import Path
run, wanted = Path(sys.argv[1]), int(sys.argv[2])
run.mkdir(exist_ok=True)
lines = run / "metrics.jsonl"
time.sleep(0.1)
with lines.open("a") as file:
    while lines.read_bytes().count(b"\\n") < wanted:
        print("{}", file=file, flush=True)
(run / "checkpoint").touch()
"""


def test_only_whose_turn_it_is_runs(tmp_path: Path) -> None:
    seconds = {ONE_THREAD: 0.04, TWO_THREADS: 0.02, TWO_PROCESSES: 0.03}
    command = [sys.executable, "-c", RUN]
    runs = {
        name: Processes([*command, str(tmp_path / name), str(of_one)], tmp_path / name, tmp_path / "log", 1)
        for name, of_one in seconds.items()
    }
    with runs[ONE_THREAD] as one, runs[TWO_THREADS] as two, runs[TWO_PROCESSES] as both:
        everyone = [process for run in (one, two, both) for process in family(run._process)]
        assert len(everyone) >= 3
        for run in (one, two, both):
            run.first()
        done = one._done()
        turns = [Turn(name, run, images=8, updates=3) for name, run in runs.items() if name != ONE_THREAD]
        measured = measure([*turns, Turn(TWO_THREADS + AGAIN, two, 8, 3)], rounds=3, round_s=0.0)
        assert one._done() - done <= 1  # the one that was under way
    assert measured.figure(lambda times: times[TWO_THREADS]).value == pytest.approx(0.02)
    assert measured.ratio(TWO_PROCESSES, TWO_THREADS).value == pytest.approx(2 / 3)
    deadline = time.monotonic() + 20
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in everyone):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.02)


def test_a_start_is_timed_until_its_first_update(tmp_path: Path) -> None:
    before, folder, log = tmp_path / "before", tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-c", SHORT, str(folder)]
    new = Start("start", [*command, "1"], folder, None, log).round()
    assert 0.1 < new.seconds < 20
    assert (folder / "checkpoint").exists()  # it was let end
    folder.rename(before)
    assert Start("go on", [*command, "2"], folder, before, log).round().seconds > 0.1
    assert (folder / "metrics.jsonl").read_bytes().count(b"\n") == 2
    with pytest.raises(LoadError, match="ended"):
        Start("go on", [*command, "1"], folder, before, log).round()


def test_a_run_that_ends_is_an_error(tmp_path: Path) -> None:
    with Processes([sys.executable, "-c", "print('why')"], tmp_path, tmp_path / "log", 1) as run:
        with pytest.raises(LoadError, match="why"):
            run.first()
        with pytest.raises(LoadError, match="ended"):
            run.go_on()


def test_commands_are_those_of_a_user(tmp_path: Path) -> None:
    alone, four = (command_of(count, Path("c.yaml"), tmp_path, "seed=1") for count in (1, 4))
    assert alone[1:5] == ["-m", "dinox_train", "--config", "c.yaml"]
    assert four[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert four[6:8] == ["-m", "dinox_train"]
    assert four[-1] == "parallel.mode=ddp"
    assert not any("parallel" in word for word in alone)


def test_what_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: {batch_size: 8}\nno_such_key: 1\n")
    assert main(["--config", str(broken), "--quick", "--output", str(tmp_path / "ranks.json")]) == 2
    assert "no_such_key" in capsys.readouterr().err
    assert not (tmp_path / "ranks.json").exists()
