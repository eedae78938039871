"""What supervise.py decides with, each part alone: policy, heartbeat, ledger, last words, the command's run folder."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import supervise
from hypothesis import given
from hypothesis import strategies as st
from supervision.command import run_folder
from supervision.errors import LARGEST_BYTES, ErrorStream, fingerprint, updates_done
from supervision.heartbeat import Heartbeat, Rhythm, limit_s
from supervision.ledger import DAY_S, Ledger, Moment, read_rows
from supervision.policy import LONGEST_WAIT_S, SAME_ERROR_RESTARTS, Decision, End, decide

from dinox_train.config import Config, load_config, to_yaml, validate
from dinox_train.sections import StageSection

NOW = Moment(wall_s=1.8e9, monotonic_s=5e5, boot="this")


class History:
    """Ends, as a ledger would hold them."""

    def __init__(self, folder: Path, *, max_restarts: int = 20) -> None:
        self.ledger, self.max_restarts = Ledger(folder), max_restarts

    def then(self, end: End, now: Moment = NOW) -> Decision:
        found = decide(end, self.ledger.ends(), now, max_restarts=self.max_restarts, first_wait_s=10.0)
        self.ledger.add("start", now, update=end.update, pid=1, process_started=1)
        after = "restart" if found.restarts else "stop"
        self.ledger.add("end", now, update=end.update, why=end.why, error=end.error, next=after)
        return found


def failed(update: int, error: str = "E 1", code: int = 1, hung: bool = False) -> End:
    return End(code, hung, update, error)


@pytest.mark.parametrize("code", [0, 2, 4, 130, 143, -15, -2, -1])
def test_done_refused_unhealthy_and_told_are_final(tmp_path: Path, code: int) -> None:
    assert not History(tmp_path).then(failed(3, code=code)).restarts


@pytest.mark.parametrize("code", [1, 5, -9, -11, -6, -7, 127, 139])
def test_errors_stalls_and_crashes_are_not(tmp_path: Path, code: int) -> None:
    assert History(tmp_path).then(failed(3, code=code)).restarts


def test_the_same_error_again_is_the_same_kind_of_end_with_the_same_words_at_the_same_place(tmp_path: Path) -> None:
    history = History(tmp_path)
    assert history.then(failed(100)).restarts
    for other in (failed(100, "E 2"), failed(100, code=5), failed(100, code=-9), failed(100, hung=True), failed(103)):
        assert history.then(other).restarts
    assert history.then(failed(101)).restarts  # an update late is the same place
    last = history.then(failed(100))
    assert not last.restarts
    assert "the same error at update 100" in last.because


def test_who_starts_again_after_a_stop_has_looked(tmp_path: Path) -> None:
    history = History(tmp_path)
    for _ in range(2):
        found = [history.then(failed(7)).restarts for _ in range(SAME_ERROR_RESTARTS + 1)]
        assert found == [True] * SAME_ERROR_RESTARTS + [False]


def test_a_ledger_bounds_restarts_over_restarts_of_the_supervisor(tmp_path: Path) -> None:
    history = History(tmp_path, max_restarts=3)
    for update in (10, 20, 30):
        assert history.then(failed(update)).restarts
    found = History(tmp_path, max_restarts=3).then(failed(40))
    assert not found.restarts
    assert "3 restarts within 24 hours" in found.because


def test_a_day_is_a_day_by_the_monotonic_clock_whatever_the_wall_says(tmp_path: Path) -> None:
    """F40."""
    history = History(tmp_path, max_restarts=1)
    history.then(failed(10))
    set_on = Moment(NOW.wall_s + 400 * DAY_S, NOW.monotonic_s + 60, NOW.boot)
    assert not decide(failed(20), history.ledger.ends(), set_on, max_restarts=1, first_wait_s=1).restarts
    set_back = Moment(NOW.wall_s - 400 * DAY_S, NOW.monotonic_s + DAY_S, NOW.boot)
    assert decide(failed(20), history.ledger.ends(), set_back, max_restarts=1, first_wait_s=1).restarts


def test_over_two_boots_only_the_wall_clock_is_left(tmp_path: Path) -> None:
    history = History(tmp_path, max_restarts=1)
    history.then(failed(10))
    for days, restarts in ((0.5, False), (1.01, True), (-3.0, False)):
        later = Moment(NOW.wall_s + days * DAY_S, 12.0, "another")
        found = decide(failed(20), history.ledger.ends(), later, max_restarts=1, first_wait_s=1)
        assert found.restarts == restarts


def test_waits_double_without_progress_and_begin_anew_with_it(tmp_path: Path) -> None:
    history = History(tmp_path, max_restarts=100)
    waits = [history.then(failed(update, f"E {update}")).wait_s for update in (50, 40, 30, 20, 60, 55)]
    assert waits == [10, 20, 40, 80, 10, 20]
    for update in range(54, 30, -2):
        longest = history.then(failed(update, f"F {update}")).wait_s
    assert longest == LONGEST_WAIT_S


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["", "E 1", "E 2"]), st.sampled_from([1, 5, -9])),
                max_size=40))  # fmt: skip
def test_no_error_is_restarted_more_than_twice_at_one_update(ends: list[tuple[int, str, int]]) -> None:
    rows: list[dict[str, Any]] = []
    for update, error, code in ends:
        end = End(code, False, update, error)
        found = decide(end, rows, NOW, max_restarts=30, first_wait_s=1)
        same = sum((row["update"], row["error"], row["why"]) == (update, error, end.why) for row in rows)
        assert not (found.restarts and same >= SAME_ERROR_RESTARTS)
        assert 0 <= found.wait_s <= LONGEST_WAIT_S
        rows.append({"update": update, "error": error, "why": end.why, "next": "restart", "boot": NOW.boot,
                     "monotonic_s": NOW.monotonic_s})  # fmt: skip


def beat(folder: Path, update: int, time_s: float) -> None:
    (folder / "heartbeat").write_text(f"{update}\n")
    os.utime(folder / "heartbeat", (time_s, time_s))


def test_silence_counts_only_while_we_are_awake(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 100.0, longest_gap_s=5.0)
    for now_s in (101.0, 102.0, 104.0):
        heartbeat.look(now_s)
    assert heartbeat.silent_s == 4.0
    heartbeat.look(50_000.0)  # stopped, or the machine slept
    assert heartbeat.silent_s == 9.0
    assert heartbeat.beats == 0


def test_beats_are_changes_under_our_eyes_whatever_the_clock(tmp_path: Path) -> None:
    """F40."""
    beat(tmp_path, 40, 1e9)
    heartbeat = Heartbeat(tmp_path, 0.0, longest_gap_s=5.0)
    heartbeat.look(1.0)
    assert (heartbeat.beats, heartbeat.update, heartbeat.silent_s) == (0, None, 1.0)  # an earlier trainer's
    for number, time_s in enumerate((2e9, 1e8, 1e8 + 1), 1):  # set forward, and back
        beat(tmp_path, 40 + number, time_s)
        heartbeat.look(1.0 + number)
        assert (heartbeat.beats, heartbeat.update, heartbeat.silent_s) == (number, 40 + number, 0.0)
    beat(tmp_path, 43, 1e8 + 2)  # the same update again, after a resume: the time tells
    heartbeat.look(6.0)
    assert heartbeat.beats == 4
    (tmp_path / "heartbeat").write_text("no number")
    heartbeat.look(7.0)
    assert heartbeat.update == 43


def test_slow_updates_are_known_from_the_resolved_configuration(tmp_path: Path) -> None:
    stages = (StageSection(updates=25), StageSection(updates=30), StageSection())
    tree = Config(stages=stages).model_dump(mode="json")
    tree["train"]["updates"], tree["evaluate"]["every"], tree["checkpoint"]["every"] = 100, 10, 40
    (tmp_path / "config.yaml").write_text(to_yaml(validate(tree)))
    rhythm = Rhythm.read(tmp_path)
    assert [done for done in range(60) if rhythm.is_slow(done)] == [9, 19, 25, 29, 39, 49, 55, 59]
    assert [done for done in range(90, 103) if rhythm.is_slow(done)] == [99, 100, 101, 102]
    assert rhythm.loader_timeout_s == Config().data.timeout_s


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "evaluate: 3", "stages: 7", "stages: [3]", "evaluate: {every: x}"])
def test_a_configuration_that_says_nothing_makes_no_update_slow(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert Rhythm.read(tmp_path) == Rhythm.read(tmp_path / "none") == Rhythm()
    assert not Rhythm().is_slow(0)


def test_first_updates_may_take_as_long_as_slow_ones(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0.0, longest_gap_s=5.0)
    found = []
    for number in range(1, 6):
        found.append(limit_s(heartbeat, Rhythm(evaluate_every=5), hang_s=1.0, slow_s=7.0))
        beat(tmp_path, number, float(number))
        heartbeat.look(float(number))
    assert found == [7.0, 7.0, 7.0, 1.0, 7.0]


def test_a_torn_row_is_cut_off_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    """F48."""
    ledger = Ledger(tmp_path)
    for update in (1, 2):
        ledger.add("end", NOW, update=update, why="exit code 1", error="", next="restart")
    path = tmp_path / "restarts.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[1]) + 1):
        path.write_bytes(whole[:-cut])
        assert [row["update"] for row in read_rows(tmp_path)] == [1]
        Ledger(tmp_path).add("end", NOW, update=3, why="hang", error="", next="stop")
        assert [row["update"] for row in read_rows(tmp_path)] == [1, 3]
    for damage in (
        b"{}\n",
        b"7\n",
        b"torn\n",
        b'{"event": "end", "time": "x", "monotonic_s": 1, "boot": "", "update": 1}\n',
    ):
        path.write_bytes(whole.splitlines(keepends=True)[0] + damage + whole)
        with pytest.raises(ValueError, match=r"restarts\.jsonl:2: not a row"):
            Ledger(tmp_path)


def spoken(folder: Path, *, errors: str = "", log: str = "") -> str:
    stream = ErrorStream(folder)
    with stream.open() as file:
        file.write(errors.encode())
    with (folder / "train.log").open("a") as file:
        file.write(log)
    return stream.last()


def test_last_words_are_those_of_this_start(tmp_path: Path) -> None:
    trace = "a warning\nTraceback (most recent call last):\n  File x\nKeyError: 'a'\n"
    logged = "2026-01-01 00:00:00,000 ERROR checkpoint FAILED\n2026-01-01 00:00:01,000 INFO on\n"
    assert spoken(tmp_path, errors=trace, log=logged) == "KeyError: 'a'"
    assert spoken(tmp_path, errors="warned\nerror: no checkpoint is whole\n  one\n", log=logged) == (
        "error: no checkpoint is whole"
    )
    assert spoken(tmp_path, errors="warned\n", log=logged) == "checkpoint FAILED"
    assert spoken(tmp_path, errors="Segmentation fault\n\n") == "Segmentation fault"
    assert spoken(tmp_path) == ""


def test_standard_error_is_kept_within_bounds(tmp_path: Path) -> None:
    (tmp_path / "stderr.log").write_bytes(b"x" * (LARGEST_BYTES + 1))
    assert spoken(tmp_path, errors="new\n") == "new"
    assert (tmp_path / "stderr.log").read_text() == "new\n"
    assert (tmp_path / "stderr.log.1").stat().st_size == LARGEST_BYTES + 1


def test_a_fingerprint_knows_an_error_by_its_words_alone() -> None:
    one = fingerprint("torch.OutOfMemoryError: tried 2.00 GiB at 0x7f12ab (12 MiB free)")
    assert one == fingerprint("torch.OutOfMemoryError: tried 3.50 GiB at 0x1 (7 MiB free)")
    assert one.startswith("torch.OutOfMemoryError ")
    assert one != fingerprint("torch.OutOfMemoryError: another")
    assert "MUSTERMANN" not in fingerprint("MUSTERMANN ERIKA said")
    assert fingerprint(" \n") == ""


def test_updates_done_are_those_of_whole_lines(tmp_path: Path) -> None:
    assert updates_done(tmp_path) == 0
    lines = [json.dumps({"update": number, "loss": 0.5, "images": "x" * 3000}) + "\n" for number in range(1, 60)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"update": 60, "lo')
    assert updates_done(tmp_path) == 59


@pytest.mark.parametrize("words", [
    ["--config", "one.yaml"],
    ["--config", "one.yaml", "--config=two.yaml"],
    ["--config", "two.yaml", "--config", "one.yaml"],
    ["--config", "one.yaml", "run.folder=runs/c"],
    ["--config", "one.yaml", "run.folder=runs/c", "train.updates=7", "run={folder: runs/d}"],
    ["--config", "one.yaml", "--config", "three.yaml"],
])  # fmt: skip
def test_the_run_folder_is_read_as_the_trainer_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    (tmp_path / "one.yaml").write_text("run: {folder: runs/a}\ntrain: {updates: 3}\n")
    (tmp_path / "two.yaml").write_text("run: {folder: runs/b, init_from: null}\n")
    (tmp_path / "three.yaml").write_text("run: {init_from: null}\n")
    monkeypatch.chdir(tmp_path)
    files = [word.removeprefix("--config=") for word in words if word.endswith(".yaml")]
    config = load_config(files, [word for word in words if "=" in word and not word.startswith("-")])
    command = ["env", "A=1", "python", "-m", "dinox_train", *words]
    assert run_folder(command) == Path(config.run.folder)
    given_options, trainer, folder = supervise.parse(["--hang-minutes", "0.5", "--", *command])
    assert (given_options.hang_minutes, trainer, folder) == (0.5, command, Path(config.run.folder))


def test_a_command_that_does_not_say_its_folder_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bad.yaml").write_text("run: [")
    (tmp_path / "none.yaml").write_text("train: {updates: 3}")
    configured = [["dinox_train", "--config", str(file)] for file in (*tmp_path.glob("*.yaml"), "nowhere.yaml")]
    for words in (["sh", "train.sh"], *configured):
        assert run_folder(words) is None
        with pytest.raises(SystemExit) as ended:
            supervise.parse(["--", *words])
        assert ended.value.code == 2
        assert "give --folder RUN" in capsys.readouterr().err
        assert supervise.parse(["--folder", "r", "--", *words])[2] == Path("r")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--folder", "r"], "behind --"),
    (["--folder", "r", "--", "dinox_train", "run.folder=other"], "leave --folder away"),
    (["--", "dinox_train", "run.folder=r", "--plan"], "--plan makes no run"),
    (["--hang-minutes", "0", "--", "dinox_train", "run.folder=r"], "must be more than 0"),
    (["--hang-minutes", "nan", "--", "dinox_train", "run.folder=r"], "must be more than 0"),
    (["--max-restarts", "-1", "--", "dinox_train", "run.folder=r"], "must be 0 or more"),
])  # fmt: skip
def test_wrong_usage_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        supervise.parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_numbers_of_signals_have_their_names() -> None:
    assert End(-11, False, 3, "").why == "signal SIGSEGV"
    assert End(-11, False, 3, "").exit_code == 139
    assert End(-9, True, 3, "").exit_code == 5
    assert math.isclose(Moment.now().since({"boot": Moment.now().boot, "monotonic_s": Moment.now().monotonic_s}), 0,
                        abs_tol=5)  # fmt: skip
