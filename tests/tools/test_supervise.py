"""supervise.py with processes: small scripts in the trainer's place, that beat, fail, hang and die as it does."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import supervise
from supervision import child as child_module
from supervision.ledger import read_rows, restarts
from supervision.supervisor import FolderBusy, Supervisor, locked
from supervision.watch import Settings

# A plan a start, the last one for all later starts: steps that are separated by commas.
TRAINER = r"""
import ctypes, faulthandler, fcntl, json, os, signal, subprocess, sys, time
from pathlib import Path

run, plans = Path(sys.argv[1]), sys.argv[2:]
lock = (run / ".lock").open("a")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
starts = run / "starts"
number = int(starts.read_text()) if starts.exists() else 0
starts.write_text(str(number + 1))
(run / "pid").write_text(str(os.getpid()))

def save(signal_number, frame):
    (run / "saved").write_text(str(signal_number))
    os._exit(128 + signal_number)

for step in plans[min(number, len(plans) - 1)].split(","):
    name, _, value = step.partition("=")
    if name == "update":
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"update": int(value)}) + "\n")
        (run / ".heartbeat.tmp").write_text(value)
        (run / ".heartbeat.tmp").replace(run / "heartbeat")
        time.sleep(0.04)
    elif name == "sleep":
        time.sleep(float(value))
    elif name == "saves":
        signal.signal(signal.SIGTERM, save)
        signal.signal(signal.SIGINT, save)
    elif name == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif name == "stacks":
        faulthandler.register(signal.SIGUSR1)
    elif name == "raise":
        raise ValueError(value)
    elif name == "log":
        (run / "train.log").open("a").write(f"2026-01-01 00:00:00,000 ERROR {value}\n")
    elif name == "exit":
        sys.exit(int(value))
    elif name == "kill":
        os.kill(os.getpid(), int(value))
    elif name == "helper":
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        (run / "helper").write_text(str(other.pid))
    elif name == "uninterruptible":
        # The parent of a vfork waits in state D until its child ends or runs something else.
        if ctypes.CDLL(None).vfork() == 0:
            time.sleep(60)
    elif name == "hang":
        (run / "hangs").write_text("")
        while True:
            time.sleep(0.01)
"""

FAST = Settings(
    hang_s=0.6, slow_s=4.0, grace_s=0.6, first_wait_s=0.02, max_restarts=20, poll_s=0.02, dump_s=0.2, unkillable_s=0.5
)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run folder; what a failed test left running is ended."""
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "trainer.py").write_text(TRAINER)
    yield folder
    for name in ("pid", "helper"):
        if (folder / name).exists():
            pid = int((folder / name).read_text())
            if psutil.pid_exists(pid) and str(folder) in " ".join(psutil.Process(pid).cmdline()):
                psutil.Process(pid).kill()


def command(run: Path, *plans: str) -> list[str]:
    return [sys.executable, "-S", str(run.parent / "trainer.py"), str(run), *plans]


def supervised(run: Path, *plans: str, **changes: Any) -> int:
    settings = Settings(**(FAST.__dict__ | changes))
    return Supervisor(command(run, *plans), run, settings).run()


def ends(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run) if row["event"] == "end"]


def starts(run: Path) -> int:
    return int((run / "starts").read_text())


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


class Program:
    """supervise.py in a process of its own."""

    def __init__(self, run: Path, *plans: str, options: tuple[str, ...] = ()) -> None:
        self.run = run
        fast = ("--poll-seconds", "0.02", "--backoff-seconds", "0.02", "--hang-minutes", "0.05", "--grace-minutes")
        words = [sys.executable, supervise.__file__, "--folder", str(run), *fast, "0.01", *options, "--"]
        self.output = run.parent / "output"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen([*words, *command(run, *plans)], stderr=output)

    def end(self, *numbers: int) -> int:
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.1)
        return self.process.wait(timeout=20)


@pytest.mark.parametrize("code", [0, 2, 4, 143, 130])
def test_ends_that_another_start_cannot_help_are_final(run: Path, code: int) -> None:
    assert supervised(run, f"update=1,exit={code}") == code
    assert starts(run) == 1
    (row,) = ends(run)
    assert (row["exit_code"], row["update"], row["next"]) == (code, 1, "stop")


def test_errors_stalls_and_crashes_are_followed_by_another_start(run: Path) -> None:
    plans = ("update=3,exit=1", "update=5,kill=11", "update=7,exit=5", "update=9,kill=9", "update=11,exit=0")
    assert supervised(run, *plans) == 0
    rows = ends(run)
    assert [row["why"] for row in rows] == ["exit code 1", "signal SIGSEGV", "exit code 5", "signal SIGKILL",
                                            "exit code 0"]  # fmt: skip
    assert [row["update"] for row in rows] == [3, 5, 7, 9, 11]
    assert [row["next"] for row in rows] == ["restart"] * 4 + ["stop"]
    assert restarts(read_rows(run)) == 4
    assert [row["event"] for row in read_rows(run)] == ["start", "end"] * 5
    times = [row["monotonic_s"] for row in read_rows(run)]
    assert times == sorted(times)


def test_the_same_error_at_the_same_update_is_not_tried_a_third_time(run: Path, capfd: pytest.CaptureFixture) -> None:
    assert supervised(run, "update=7,raise=the volume 0a1b is damaged") == 1
    assert starts(run) == 3
    assert [row["next"] for row in ends(run)] == ["restart", "restart", "stop"]
    assert "the same error at update 7, 3 times" in ends(run)[-1]["because"]
    assert "ValueError: the volume 0a1b is damaged" in capfd.readouterr().err  # and what it said is seen here


def test_a_crash_by_a_signal_that_goes_on_ends_as_a_shell_says_it(run: Path) -> None:
    assert supervised(run, "update=2,kill=11") == 128 + 11
    assert starts(run) == 3


def test_a_stopped_trainer_is_let_go_on_to_save_and_is_started_again(run: Path, capfd: pytest.CaptureFixture) -> None:
    """F41."""
    frozen = f"saves,update=1,update=2,update=3,kill={int(signal.SIGSTOP)},hang"
    assert supervised(run, frozen, "update=4,exit=0") == 0
    assert (run / "saved").read_text() == str(int(signal.SIGTERM))
    assert [(row["why"], row["exit_code"]) for row in ends(run)] == [("hang", 143), ("exit code 0", 0)]
    assert "is stopped (SIGSTOP)" in capfd.readouterr().err


def test_a_deaf_trainer_is_killed_with_all_it_started(run: Path, capfd: pytest.CaptureFixture) -> None:
    assert supervised(run, "deaf,stacks,helper,update=1,update=2,update=3,hang", "exit=0") == 0
    assert [(row["why"], row["exit_code"], row["update"]) for row in ends(run)] == [
        ("hang", -9, 3),
        ("exit code 0", 0, 3),
    ]
    wait_for(lambda: not psutil.pid_exists(int((run / "helper").read_text())))
    said = capfd.readouterr().err
    assert "no heartbeat for" in said
    assert "SIGKILL to all its processes" in said
    assert "most recent call first" in said  # its stacks, as it handles SIGUSR1
    assert "trainer.py" in said


def test_hangs_at_the_same_update_are_not_tried_a_third_time(run: Path) -> None:
    assert supervised(run, "update=1,update=2,update=3,hang") == 5
    assert starts(run) == 3
    assert {row["exit_code"] for row in ends(run)} == {-15}  # no SIGUSR1 for one that would die of it


def test_a_trainer_that_waits_in_the_kernel_is_said(run: Path, capfd: pytest.CaptureFixture) -> None:
    assert supervised(run, "update=1,update=2,update=3,uninterruptible", "exit=0") == 0
    assert "cannot be interrupted (state D" in capfd.readouterr().err


def test_one_that_not_even_sigkill_ends_is_never_doubled(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    tries = []

    def spared(pid: int) -> None:
        tries.append(pid)
        if len(tries) == 1:  # as if it were deep in a driver; it comes out later
            threading.Timer(1.2, os.kill, (pid, signal.SIGKILL)).start()

    monkeypatch.setattr(child_module, "kill_group", spared)
    assert supervised(run, "deaf,update=1,update=2,update=3,hang", "exit=0") == 0
    assert starts(run) == 2
    assert len(tries) == 1
    assert "not even SIGKILL ends it" in capfd.readouterr().err


def test_a_slow_start_and_a_slow_evaluation_are_no_hangs(run: Path) -> None:
    (run / "config.yaml").write_text("{evaluate: {every: 5}, checkpoint: {every: 100}, train: {updates: 1000}}")
    in_time = "sleep=1.2,update=1,update=2,update=3,update=4,sleep=1.2,update=5,exit=0"
    assert supervised(run, in_time) == 0
    ordinary = "update=6,update=7,update=8,sleep=1.2,update=9,exit=0"
    assert supervised(run, "", ordinary, "exit=0") == 0
    assert [row["why"] for row in ends(run)] == ["exit code 0", "hang", "exit code 0"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_a_signal_is_passed_on_and_its_checkpoint_awaited(run: Path, number: int, code: int) -> None:
    program = Program(run, "saves,update=1,hang")
    wait_for((run / "hangs").exists)
    assert program.end(number) == code
    assert (run / "saved").exists()
    assert [(row["exit_code"], row["next"]) for row in ends(run)] == [(code, "stop")]
    assert starts(run) == 1


def test_a_third_signal_kills(run: Path) -> None:
    program = Program(run, "deaf,update=1,hang", options=("--slow-minutes", "10"))
    wait_for((run / "hangs").exists)
    assert program.end(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM) == 137
    assert not psutil.pid_exists(int((run / "pid").read_text()))


def test_a_signal_between_two_starts_ends_at_once(run: Path) -> None:
    program = Program(run, "update=1,exit=1", options=("--backoff-seconds", "60"))
    wait_for(lambda: ends(run))
    assert program.end(signal.SIGTERM) == 143
    assert starts(run) == 1


def test_a_trainer_that_loses_its_supervisor_saves_and_ends(run: Path) -> None:
    program = Program(run, "saves,update=1,hang", "update=2,exit=0")
    wait_for((run / "hangs").exists)
    assert program.end(signal.SIGKILL) == -9
    wait_for((run / "saved").exists)
    assert Program(run, "", "update=2,exit=0").process.wait(timeout=20) == 0
    assert [row["event"] for row in read_rows(run)] == ["start", "start", "end"]


def test_a_hanging_trainer_that_a_killed_supervisor_left_is_ended_first(run: Path) -> None:
    program = Program(run, "deaf,update=1,hang", "update=2,exit=0")
    wait_for((run / "hangs").exists)
    assert program.end(signal.SIGKILL) == -9
    left = int((run / "pid").read_text())
    assert psutil.pid_exists(left)
    after = Program(run, "", "update=2,exit=0")
    assert after.process.wait(timeout=20) == 0, after.output.read_text()
    assert f"process {left}, which an earlier supervisor left" in after.output.read_text()
    assert starts(run) == 2


def test_one_supervisor_and_one_trainer_a_folder(run: Path, capfd: pytest.CaptureFixture) -> None:
    with locked(run), pytest.raises(FolderBusy, match="another supervisor"):
        supervised(run, "exit=0")
    with (run / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert supervise.main(["--folder", str(run), "--", *command(run, "exit=0")]) == 1
    assert "another process trains in this folder" in capfd.readouterr().err
    assert not (run / "starts").exists()


def test_a_command_that_does_not_exist_is_wrong_usage(run: Path, capfd: pytest.CaptureFixture) -> None:
    assert supervise.main(["--folder", str(run), "--", str(run / "nothing")]) == 2
    assert "cannot be started (No such file or directory)" in capfd.readouterr().err


def test_a_full_disk_takes_rows_but_not_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("supervision.ledger.os.fsync", full)
    assert supervised(run, "update=1,exit=1", "update=2,exit=0") == 0
    assert "restarts.jsonl cannot be written (No space left on device)" in capfd.readouterr().err
    assert (run / "restarts.jsonl").read_bytes() == b""


def test_nothing_of_an_error_but_its_kind_is_in_the_ledger(run: Path) -> None:
    assert supervised(run, "update=1,raise=/data/MUSTERMANN ERIKA/1.dcm", "log=MUSTERMANN,exit=1", "exit=0") == 0
    assert "MUSTERMANN" not in (run / "restarts.jsonl").read_text()
    errors = [row["error"] for row in ends(run)]
    assert errors[0].startswith("ValueError ")
    assert errors[0] != errors[1] != ""
    assert errors[2] == ""
    assert (run / "stderr.log").stat().st_mode & 0o077 == 0


def test_the_ledger_is_json_lines_by_both_clocks(run: Path) -> None:
    before = time.time()
    assert supervised(run, "exit=0") == 0
    start, end = (json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines())
    assert start["pid"] == int((run / "pid").read_text())
    assert start["boot"] == end["boot"]
    assert 0 <= end["monotonic_s"] - start["monotonic_s"] < 20
    assert 0 < end["ran_s"] < 20
    assert abs(datetime.fromisoformat(end["time"]).timestamp() - before) < 60
