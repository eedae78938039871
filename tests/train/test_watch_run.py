"""The watch beside a real run: its files, digests, the user's command, the sinks, and parts that fail."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dinox_train.config import Config, ConfigError, load_config, validate
from dinox_train.metrics import read_lines
from dinox_train.rehearsal import rehearsed, same_lines, same_tensors
from dinox_train.watch import Watch
from dinox_train.watch.command import Command
from dinox_train.watch.digest import NUM_LINES
from dinox_train.watch.gpu import GPUFigures
from dinox_train.watch.host import Host
from dinox_train.watch.machine import FIGURES, Machine
from dinox_train.watch.sinks import SINKS, Sinks, check_installed, numbers_of

Train = Callable[..., int]
CPU = torch.device("cpu")
KEEP = "import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['DINOX_EVENT']).write_text(sys.stdin.read())"
OFTEN = ("watch.every_s=0.1", "train.updates=4", "schedule.updates=9")


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, small_config: Path, small_set: Path, tiny_preset: None
) -> tuple[Path, Path]:
    """A run that is looked at often, with a command that keeps what it is given: the run folder, and what was kept."""
    from dinox_train.__main__ import main

    folder, kept = (tmp_path_factory.mktemp(name) for name in ("watched", "kept"))
    command = json.dumps([sys.executable, "-c", KEEP, str(kept)])
    given = ["--config", str(small_config), f"data.shards={small_set}", f"run.folder={folder}", *OFTEN]
    assert main([*given, f"events.command={command}"]) == 0
    return folder, kept


def test_a_run_keeps_readings_of_its_machine(watched: tuple[Path, Path]) -> None:
    readings = read_lines(watched[0] / "system.jsonl")
    assert len(readings) >= 2
    for reading in readings:
        assert tuple(reading) == ("version", "update", "elapsed_s", "since_digest_s", *FIGURES)
    assert readings[-1]["update"] == 4
    assert readings[-1]["host_free_bytes"] > 0
    assert readings[0]["elapsed_s"] < readings[-1]["elapsed_s"] < 600
    assert "of one core" in (watched[0] / "train.log").read_text()


def test_the_end_of_a_run_is_told_and_the_loader_is_seen(watched: tuple[Path, Path]) -> None:
    folder, kept = watched
    assert [path.name for path in kept.iterdir()] == ["ended"]
    digest = (kept / "ended").read_text()
    assert digest == (folder / "digest.txt").read_text()
    assert (folder / "digests.txt").read_text() == digest + "\n"
    assert len(digest.splitlines()) == NUM_LINES
    assert "progress: update 4 of 4 (100.0%), 16 images" in digest
    assert "newest: ended: done after update 4" in digest
    assert "checkpoint of update 4" in digest
    assert "DINOX " + folder.name + ": ended" in (folder / "report.html").read_text()
    assert "alarm: none" in digest
    shares = [line["loader_cpu_share"] for line in read_lines(folder / "system.jsonl")]
    assert any(share is not None and share >= 0 for share in shares) or os.uname().sysname != "Linux"


def test_watching_changes_nothing_of_what_is_learnt(watched: tuple[Path, Path], train: Train, tmp_path: Path) -> None:
    assert train(tmp_path, *OFTEN[1:], "watch.every_s=null") == 0
    for same in (same_lines, same_tensors):
        check = same(watched[0], tmp_path, None)
        assert check.passed, check.words
    assert not (tmp_path / "system.jsonl").exists()
    assert len((tmp_path / "digest.txt").read_text().splitlines()) == NUM_LINES


# --- the watch alone -------------------------------------------------------------------------------------------------


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged: after a run in this process, the logger hands nothing on to where caplog listens."""
    monkeypatch.setattr(logging.getLogger("dinox_train"), "propagate", True)
    return caplog


class Told:
    """Stands for the trainer: keeps events, and gives them back to the watch, as the trainer does."""

    def __init__(self, folder: Path, tree: dict[str, Any], machine: Machine | None = None) -> None:
        self.events: list[str] = []
        self.watch = Watch(folder, validate({"watch": {"every_s": 0.1}, **tree}), CPU, machine)
        self.watch.start(0, self.tell)

    def tell(self, event: str, text: str, alarm: str | None = None) -> None:
        self.events.append(event)
        self.watch.event(event, text, alarm)


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_throttling_is_an_event_a_digest_and_news(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    command = (sys.executable, "-c", KEEP, str(kept))
    figures = [GPUFigures(0.99, None, 92.0, 300.0, 1500.0, True)]
    machine = Machine(CPU, tmp_path, Host(tmp_path, tmp_path), lambda: figures[0])
    told = Told(tmp_path, {"events": {"command": command, "on": ("machine",)}}, machine)
    told.watch.line({"update": 1, "loss_val": None})
    wait_for(lambda: "throttling" in told.events)
    wait_for(lambda: (kept / "machine").exists() and (kept / "machine").read_text() != "")
    figures[0] = GPUFigures(0.99, None, 60.0, 300.0, 2400.0, False)
    wait_for(lambda: "throttling over" in told.events)
    told.tell("ended", "done after update 1")
    told.watch.close()
    assert told.events == ["throttling", "throttling over", "ended"]
    digest = (kept / "machine").read_text()
    assert digest.startswith(f"DINOX {tmp_path.name}: machine (throttling)\n")
    assert "alarm: throttling: the GPU's clock of 1500 MHz is held down at 92 °C" in digest
    assert "THROTTLED" in digest
    assert [path.name for path in kept.iterdir()] == ["machine"]  # the end was not asked for
    assert "alarm: none" in (tmp_path / "digest.txt").read_text()


def test_an_alarm_is_told_once_an_hour_and_outlives_its_process(tmp_path: Path) -> None:
    line = {"version": 1, "update": 3, "event": "alarm", "text": "loss is stuck", "alarm": "loss_stuck"}
    # The clock of the process before: this one knows nothing of it, and would never say that it is over.
    hot = {"version": 1, "update": 3, "event": "throttling", "text": "the clock is held down"}
    (tmp_path / "events.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(hot) + "\n")
    told = Told(tmp_path, {})
    for _ in range(3):
        told.tell("alarm", "features lie together", "feature_std")
        told.tell("alarm over", "", "feature_std")
    told.tell("alarm", "features lie together", "feature_std")
    told.watch.close()
    digests = (tmp_path / "digests.txt").read_text().split("\n\n")[:-1]
    assert len(digests) == 4
    assert "alarm: loss_stuck: loss is stuck; feature_std: features lie together" in digests[-1]
    assert "throttling" not in digests[-1]
    assert "alarm x 1" not in digests[-1]
    assert "alarm over" in digests[-1]
    watch = Watch(tmp_path, Config(), CPU)
    assert [watch._is_due("alarm", "a", now) for now in (0.0, 10.0, 3599.0, 3601.0)] == [True, False, False, True]
    assert [watch._is_due("ended", "ended", now) for now in (0.0, 1.0)] == [True, True]


def test_a_day_counts_on_over_processes(tmp_path: Path) -> None:
    (tmp_path / "system.jsonl").write_text('{"version": 1, "update": 9, "elapsed_s": 5.0, "since_digest_s": 86399.9}\n')
    told = Told(tmp_path, {})
    wait_for((tmp_path / "digest.txt").exists)
    told.watch.close()
    assert (tmp_path / "digests.txt").read_text().count("daily") == 1
    assert read_lines(tmp_path / "system.jsonl")[-1]["since_digest_s"] < 60


def test_what_cannot_be_written_or_told_is_a_warning_and_told_later(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    told = Told(folder, {})  # no such folder: no file of readings, no digest
    told.tell("alarm", "x", "loss_stuck")
    told.watch.close()
    assert "training goes on" in said.text
    figures = GPUFigures(0.99, None, 92.0, 300.0, 1500.0, True)
    closed = Told(tmp_path, {}, Machine(CPU, tmp_path, gpu=lambda: figures))
    plain, refused = closed.watch._tell, []

    def refuse_once(event: str, text: str) -> None:
        if not refused:
            refused.append(event)
            raise ValueError("write to closed file")
        plain(event, text)

    closed.watch._tell = refuse_once
    wait_for(lambda: "throttling" in closed.events)
    closed.watch.close()
    assert refused == ["throttling"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "timeout_s", "words"),
    [
        (["/nowhere/mail"], 5.0, "cannot be started: No such file or directory"),
        ([sys.executable, "-c", "import sys; sys.exit('no route to host')"], 20.0, "exit code 1: no route to host"),
        ([sys.executable, "-c", "import time; time.sleep(600)"], 0.3, "events.timeout_s, 0.3 s"),
    ],
)
def test_a_command_that_fails_is_one_warning(
    tmp_path: Path, said: pytest.LogCaptureFixture, command: list[str], timeout_s: float, words: str
) -> None:
    hands = Command(command, timeout_s, tmp_path)
    begin = time.monotonic()
    for _ in range(2):
        hands.hand("daily", "ten lines")
    assert time.monotonic() - begin < 0.2
    hands.close()
    assert time.monotonic() - begin < 40
    assert words in said.text
    assert said.text.count("Training goes on") == 1


def test_a_command_is_words_and_no_shell() -> None:
    events = validate({"events": {"command": "mail -s 'DINOX; rm -rf x' you@example.org"}}).events
    assert events.arguments == ("mail", "-s", "DINOX; rm -rf x", "you@example.org")
    assert validate({"events": {"command": ["a b", "$HOME"]}}).events.arguments == ("a b", "$HOME")
    assert Config().events.arguments is None
    for wrong in ({"command": " "}, {"command": []}, {"on": ["weekly"]}):
        with pytest.raises(ConfigError):
            validate({"events": wrong})


def test_a_rehearsal_tells_nobody(small_config: Path, tmp_path: Path) -> None:
    given = ["events.command=mail", "log.sinks=[wandb]", "rehearsal={updates: 12}"]
    small = rehearsed(load_config([small_config], given), tmp_path)
    assert (small.events.command, small.log.sinks) == (None, ())


# --- the sinks -------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_line() -> None:
    line = {
        "version": 1,
        "update": 3,
        "applied": True,
        "loss": 2.5,
        "knn_z": None,
        "stage_s": {"wait": 0.1, "save": None},
        "set_shares": [0.25, 0.75],
        "shortcut": {"name": "scanner", "accuracy": 0.5},
    }
    assert numbers_of(line) == {
        "applied": 1.0,
        "loss": 2.5,
        "stage_s/wait": 0.1,
        "set_shares/0": 0.25,
        "set_shares/1": 0.75,
        "shortcut/accuracy": 0.5,
    }


class Shown:
    """Stands for the three packages, as far as the sinks use them: keeps what they would show."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        for variable in ("WANDB_MODE", "WANDB_ERROR_REPORTING", "TRACKIO_DIR"):
            patch.delenv(variable, raising=False)
        note = self.calls.append
        run = SimpleNamespace(
            define_metric=lambda name, step_metric=None: note(("wandb defines", name, step_metric)),
            log=lambda numbers, step: note(("wandb", numbers["update"], numbers["loss"], step)),
            finish=lambda: note("wandb ends"),
        )
        wandb = {
            "Settings": dict,
            "init": lambda **given: (note(("wandb begins", given["id"], given["resume"])), run)[1],
        }
        trackio = {
            "init": lambda **given: note(("trackio begins", given["name"], given["resume"])),
            "log": lambda numbers, step: note(("trackio", step, numbers["loss"])),
            "finish": lambda: note("trackio ends"),
        }
        writer = {"SummaryWriter": self._writer}
        for name, members in (("wandb", wandb), ("trackio", trackio), ("torch.utils.tensorboard", writer)):
            module = ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name, module)
        patch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))

    def _writer(self, log_dir: str, purge_step: int) -> SimpleNamespace:
        self.calls.append(("tensorboard begins", Path(log_dir).name, purge_step))
        return SimpleNamespace(
            add_scalar=lambda name, value, update: self.calls.append(("tensorboard", update, value)),
            close=lambda: self.calls.append("tensorboard ends"),
        )

    def of(self, name: str) -> list[Any]:
        return [call for call in self.calls if str(call[0] if isinstance(call, tuple) else call).startswith(name)]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return Shown(monkeypatch)


def show(folder: Path, names: list[str], updates: list[int]) -> list[str]:
    """Put lines of these updates into the sinks; what was told."""
    told: list[str] = []
    sinks = Sinks(names, folder, lambda event, text: told.append(f"{event}: {text}"))
    for update in updates:
        sinks.put({"update": update, "loss": update / 2})
    sinks.close()
    return told


def test_a_run_that_resumes_shows_each_update_once(tmp_path: Path, shown: Shown) -> None:
    names = list(SINKS)
    assert show(tmp_path, names, [1, 2, 3]) == []
    assert show(tmp_path, names, [3, 4]) == []
    assert shown.of("tensorboard") == [
        *(("tensorboard begins", "tensorboard", 1), ("tensorboard", 1, 0.5), ("tensorboard", 2, 1.0)),
        *(("tensorboard", 3, 1.5), "tensorboard ends"),
        *(("tensorboard begins", "tensorboard", 3), ("tensorboard", 3, 1.5), ("tensorboard", 4, 2.0)),
        "tensorboard ends",
    ]
    kept = json.loads((tmp_path / "sinks.json").read_text())
    for name in ("wandb", "trackio"):
        calls = [call[:3] for call in shown.of(name) if call[0] == name]
        assert calls == [(name, 1, 0.5), (name, 2, 1.0), (name, 3, 1.5), (name, 4, 2.0)]
        begun = [call for call in shown.of(name) if call[0] == f"{name} begins"]
        assert len(begun) == 2
        assert begun[0] == begun[1]
        assert begun[0][1].endswith(kept[name]["id"])
        assert begun[0][2] == "allow"
        assert kept[name]["update"] == 4
        assert shown.of(name)[-1] == f"{name} ends"


def test_a_run_that_goes_back_makes_tensorboard_forget(tmp_path: Path, shown: Shown) -> None:
    show(tmp_path, ["tensorboard"], [1, 2, 3, 2, 3])
    assert [call[2] for call in shown.of("tensorboard begins")] == [1, 2]


def test_what_comes_after_a_rollback_is_shown_by_all(tmp_path: Path, shown: Shown) -> None:
    names = ["wandb", "trackio"]
    show(tmp_path, names, [1, 2, 3, 4, 2, 3])
    assert [call[1] for call in shown.of("trackio") if call[0] == "trackio"] == [1, 2, 3, 4, 2, 3]
    assert [call[1:] for call in shown.of("wandb") if call[0] == "wandb"][4:] == [(2, 1.0, 5), (3, 1.5, 6)]
    # Killed and resumed from update 1, it comes to the same: 2 and 3 again, a rollback at 4, and on.
    shown.calls.clear()
    show(tmp_path, names, [2, 3, 4, 2, 3, 4, 5])
    assert [call[1] for call in shown.of("trackio") if call[0] == "trackio"] == [4, 2, 3, 4, 5]
    given = [call for call in shown.of("wandb") if call[0] == "wandb"]
    assert [call[1] for call in given] == [4, 2, 3, 4, 5]
    assert [call[3] for call in given] == [7, 8, 9, 10, 11]
    assert [call[1:] for call in shown.of("wandb defines")] == [("update", None), ("*", "update")]


def test_sinks_send_nothing_unless_the_user_says_so(
    tmp_path: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(tmp_path, ["wandb", "trackio"], [1])
    assert os.environ["WANDB_MODE"] == "offline"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert os.environ["TRACKIO_DIR"] == str(tmp_path / "trackio")
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("WANDB_MODE", "online")
    show(tmp_path, ["wandb"], [2])
    assert os.environ["WANDB_MODE"] == "online"


def test_a_sink_that_fails_is_an_event_and_the_others_go_on(
    tmp_path: Path, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["trackio"], "log")
    told = show(tmp_path, ["trackio", "tensorboard"], [1, 2])
    assert len(told) == 1
    assert told[0].startswith("sink failed: trackio: AttributeError")
    assert [call[1] for call in shown.of("tensorboard") if call[0] == "tensorboard"] == [1, 2]


def test_a_run_with_a_sink(tmp_path: Path, train: Train, shown: Shown, tiny_preset: None) -> None:
    assert train(tmp_path, *OFTEN[1:], "train.updates=2", "log.sinks=[wandb]") == 0
    losses = {line["update"]: line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")}
    assert {call[1]: call[2] for call in shown.of("wandb") if call[0] == "wandb"} == losses


def test_a_missing_package_is_said_before_anything_begins(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    assert train(tmp_path, "log.sinks=[trackio]") == 2
    assert "pip install 'dinox[log]'" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()
    check_installed([])


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    read_back = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra dinox[log]"
    )
    assert show(tmp_path, ["tensorboard"], [1, 2, 3]) == []
    assert show(tmp_path, ["tensorboard"], [3, 4]) == []
    read = read_back.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
