"""runs.py: the figures of run folders that are known, what they differ in, and a line for each that cannot be read."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml
from hypothesis import given
from hypothesis import strategies as st
from run_ledger.search import find_runs
from run_ledger.summary import ALIVE_S, RunError, lines_of, read_run
from run_ledger.table import ORDERS, differences, names_of, ordered, state_in_words, time_in_words
from supervision.ledger import Ledger, Moment

from dinox_train import __main__ as trainer
from dinox_train.config import load_config, to_yaml
from dinox_train.metrics import LineFile, read_lines
from tests.train.conftest import small_config, small_set, tiny_preset  # noqa: F401 (fixtures)

Train = Callable[..., int]
MakeRun = Callable[..., Path]
NOW = Moment(1.8e9, 5e5, "boot")


def line(update: int, batch_size: int = 8, **values: Any) -> dict[str, Any]:
    figures = {"loss_val": None, "knn_z": None, "knn_label": None}
    return {"update": update, "applied": True, "images": batch_size * update, "images_per_s": 4.0, **figures, **values}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(name, "a.b=value", …, lines=…, events=…)`: a run folder as the trainer writes one."""
    (tmp_path / "base.yaml").write_text("train: {updates: 10, batch_size: 8}\n")

    def make(
        name: str, *overrides: str, lines: list[dict[str, Any]] | None = None, events: tuple[str, ...] = ("started",)
    ) -> Path:
        folder = tmp_path / "runs" / name
        (folder / "checkpoints").mkdir(parents=True)
        config = load_config([tmp_path / "base.yaml"], [f"run.folder={folder}", *overrides])
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "env.json").write_text(json.dumps({"device": "cpu", "shards": [{"digest": "ab" * 32}]}))
        given_lines = [line(update) for update in range(1, 11)] if lines is None else lines
        for file, rows in (
            ("metrics.jsonl", given_lines),
            ("events.jsonl", [{"update": 0, "event": event, "text": f"text of {event}"} for event in events]),
        ):
            writer = LineFile(folder / file, 0)
            for row in rows:
                writer.write(row)
            writer.close()
        if given_lines:
            (folder / "heartbeat").write_text(f"{given_lines[-1]['update']}\n")
        return folder

    return make


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / "heartbeat", (then, then))


def test_a_real_run_and_its_figures(
    tmp_path: Path,
    small_config: Path,  # noqa: F811
    small_set: Path,  # noqa: F811
    tiny_preset: None,  # noqa: F811
) -> None:
    folder = tmp_path / "run"
    words = ["--config", str(small_config), f"data.shards={small_set}", f"run.folder={folder}"]
    shorter = ["train.updates=2", "schedule.updates=2", "evaluate.every=1", "evaluate.windows=6"]
    assert trainer.main([*words, *shorter, "schedule.warmup_updates=1"]) == 0
    run = read_run(folder)
    lines = read_lines(folder / "metrics.jsonl")
    assert (run.state, run.why, run.updates, run.progress.update) == ("done", "", 2, 2)
    assert run.progress.images == 8
    assert run.progress.seconds == pytest.approx(sum(4 / one["images_per_s"] for one in lines))
    evaluated = [one for one in lines if one["loss_val"] is not None]
    assert [one["update"] for one in evaluated] == [1, 2]
    best = min(evaluated, key=lambda one: one["loss_val"])
    assert vars(run.progress.best["loss_val"]) == {"value": best["loss_val"], "update": best["update"]}
    best = max(evaluated, key=lambda one: one["knn_z"])
    assert vars(run.progress.best["knn_z"]) == {"value": best["knn_z"], "update": best["update"]}
    assert "knn_label" not in run.progress.best
    assert [len(digest) for digest in run.sets] == [64]
    assert run.config == {**run.config, "model.preset": "vit_ti", "train.batch_size": 4}


def test_best_figures_are_the_first_of_equal_ones(make_run: MakeRun) -> None:
    values = [(5.0, 0.1, 0.5), (4.0, 0.3, 0.5), (4.5, 0.2, None), (4.0, 0.3, 0.4), (float("nan"), None, None)]
    lines = [
        line(update, loss_val=loss, knn_z=height, knn_label=label)
        for update, (loss, height, label) in enumerate(values, 1)
    ]
    lines[2]["applied"] = False
    progress = read_run(make_run("a", lines=lines)).progress
    found = {name: (best.value, best.update) for name, best in progress.best.items()}
    assert found == {"loss_val": (4.0, 2), "knn_z": (0.3, 2), "knn_label": (0.5, 1)}
    assert progress.not_applied == 1


def test_hours_are_those_of_updates_alone(make_run: MakeRun) -> None:
    lines = [line(1, images_per_s=4.0), line(2, images_per_s=2.0), line(3, images_per_s=16.0)]
    assert read_run(make_run("a", lines=lines)).progress.seconds == pytest.approx(2 + 4 + 0.5)


@pytest.mark.parametrize(("updates", "events", "seconds", "expected"), [
    (10, ("started", "ended"), 1e6, "done"),
    (10, ("started",), 1e6, "done"),  # killed after its last update
    (5, ("started",), 3.0, "running, heartbeat 3 s ago"),
    (5, ("started", "ended", "resumed"), 300.0, "running, heartbeat 5 min ago"),
    (5, ("started",), ALIVE_S + 7300, "silent for 2.3 h (killed, or it hangs)"),
    (5, ("started", "ended"), 3.0, "stopped (text of ended)"),
    (5, ("started", "stopped", "ended"), 3.0, "stopped (text of stopped)"),
    (5, ("started", "stopped"), 3.0, "stopped (text of stopped)"),
    (5, ("started",), -500.0, "running, heartbeat 0 s ago"),  # the clock was set back
    (0, (), None, "waiting (no update is done yet)"),
])  # fmt: skip
def test_states(make_run: MakeRun, updates: int, events: tuple[str, ...], seconds: float | None, expected: str) -> None:
    folder = make_run("a", lines=[line(update) for update in range(1, updates + 1)], events=events)
    if seconds is not None:
        age(folder, seconds)
    assert state_in_words(read_run(folder)) == expected


def test_restarts_and_why_a_supervisor_gave_up(make_run: MakeRun) -> None:
    folder = make_run("a", lines=[line(1)])
    ledger = Ledger(folder)
    for after, because in (("restart", ""), ("restart", ""), ("stop", "the same error at update 1, 3 times")):
        ledger.add("start", NOW, update=1, pid=1, process_started=1)
        ledger.add("end", NOW, update=1, why="exit code 1", error="E 1", next=after, because=because)
    run = read_run(folder)
    assert run.restarts == 2
    assert state_in_words(run) == "stopped (not started again: the same error at update 1, 3 times)"


def test_only_what_differs_is_compared(make_run: MakeRun) -> None:
    found = [
        read_run(make_run("a")),
        read_run(make_run("b", "model.preset=vit_b", "seed=7")),
        read_run(make_run("c", "views.global_scale=[0.5, 1.0]")),
    ]
    del found[2].config["seed"]
    assert differences(found) == {
        "model.preset": [found[0].config["model.preset"], "vit_b", found[0].config["model.preset"]],
        "seed": [0, 7, "-"],
        "views.global_scale": [found[0].config["views.global_scale"]] * 2 + [[0.5, 1.0]],
    }
    assert differences(found[:1]) == differences([found[0], found[0]]) == {}


def test_orders(make_run: MakeRun) -> None:
    figures = {"a": (3.0, 0.1, 900.0), "b": (None, None, 10.0), "c": (2.0, 0.5, 100.0)}
    for name, (loss, height, seconds) in figures.items():
        count = 1 + ord(name) - ord("a")
        lines = [line(update, loss_val=loss, knn_z=height) for update in range(1, count + 1)]
        age(make_run(name, lines=lines), seconds)
    found = [read_run(folder) for folder in find_runs(make_run("d", lines=[]).parent)]
    names = {by: "".join(run.folder.name for run in ordered(found, by)) for by in ORDERS}
    assert names == {"folder": "abcd", "loss_val": "cabd", "knn_z": "cabd", "knn_label": "abcd", "images": "cbad",
                     "hours": "cbad", "recent": "bcad"}  # fmt: skip


def test_runs_are_found_below_and_not_inside_runs(make_run: MakeRun, tmp_path: Path) -> None:
    one, other = make_run("x/one"), make_run("y/z/other")
    make_run(".hidden")
    make_run("x/one/inside")
    (tmp_path / "runs" / "link").symlink_to(one)
    (tmp_path / "runs" / "foreign" / "checkpoints").mkdir(parents=True)
    assert find_runs(tmp_path) == [one, other]
    assert find_runs(one) == [one]
    found = [read_run(folder) for folder in (one, other)]
    assert names_of(found) == ["x/one", "y/z/other"]
    assert names_of(found[:1]) == [str(one)]


def test_the_tables_hold_the_figures(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_run("a", lines=[line(1, loss_val=4.25, knn_z=0.5), line(2)])
    make_run("[b]", "seed=7")
    assert runs.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for part in ("2/10", "4.2500 @1", "0.5000 @1", "80", "abababababab", "seed", "7", "[b]", "done", "running"):
        assert part in text
    assert "batch_size" not in text
    assert runs.main([str(tmp_path / "runs" / "a")]) == 0
    assert "differs" not in capsys.readouterr().out


def test_json_is_whole(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_run("a", lines=[line(1, loss_val=4.25)])
    make_run("b", "seed=7", lines=[])
    assert runs.main([str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    one, other = found["runs"]
    assert one["best"] == {"loss_val": {"value": 4.25, "update": 1}, "knn_z": None, "knn_label": None}
    assert (one["images"], one["hours"], one["sets"], one["restarts"]) == (8, 2 / 3600, ["ab" * 32], 0)
    assert one["environment"]["device"] == "cpu"
    assert other["config"]["seed"] == 7
    assert other["state"] == "waiting"
    assert found["differences"] == {"seed": [0, 7]}
    assert found["unread"] == []


def test_a_folder_that_is_damaged_or_foreign_is_one_line(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = make_run("good")
    damaged = {
        "metrics": ("metrics.jsonl", b'{"update": 1}\nhalf\n{"update": 3}\n', "metrics.jsonl:"),
        "line": ("metrics.jsonl", b'{"step": 1}\n', "metrics.jsonl:1: not a line of a run"),
        "list": ("events.jsonl", b"[1]\n", "events.jsonl:1: not a JSON object"),
        "env": ("env.json", b"{", "env.json: not a JSON object"),
        "yaml": ("config.yaml", b"a: [", "config.yaml: not valid YAML"),
        "text": ("config.yaml", b"\xff\xfe", "config.yaml: not valid YAML"),
        "other": ("config.yaml", b"model: {}", "none of a run of DINOX"),
        "ledger": ("restarts.jsonl", b"7\n", "restarts.jsonl:1: not a row"),
    }
    for name, (file, data, _) in damaged.items():
        (make_run(name) / file).write_bytes(data)
    (make_run("no config") / "config.yaml").unlink()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    assert runs.main([str(tmp_path / "runs"), str(foreign), str(good)]) == 1
    said = capsys.readouterr()
    unread = said.err.splitlines()
    assert len(unread) == len(damaged) + 2
    for name, (_, _, message) in damaged.items():
        (one,) = [text for text in unread if f"/{name}/" in text or f"/{name}:" in text]
        assert message in one
    assert any("no config: not a run of DINOX: it has no config.yaml" in text for text in unread)
    assert any(text.startswith(f"{foreign}: no run of DINOX here or below") for text in unread)
    assert said.out.count("good") == 1


@given(cut=st.integers(1, 300))
def test_a_torn_last_line_is_left_out_as_the_trainer_leaves_it_out(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    """F48."""
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    data = b"".join(json.dumps(line(update)).encode() + b"\n" for update in (1, 2, 3))
    path.write_bytes(data[: max(len(data) - cut, 0)])
    assert [value for _, value in lines_of(path)] == read_lines(path)


def test_reading_changes_nothing(make_run: MakeRun) -> None:
    folder = make_run("a", lines=[line(1)])
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    assert runs.main([str(folder)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before


def test_an_earlier_version_is_read_as_far_as_it_goes(make_run: MakeRun) -> None:
    folder = make_run("a", lines=[line(1)])
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["data"]["a_key_of_another_version"] = 3
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "env.json").write_text(json.dumps({"shards_digest": "cd" * 32}))
    run = read_run(folder)
    assert run.config["data.a_key_of_another_version"] == 3
    assert run.sets == ("cd" * 32,)


def test_wrong_usage_and_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in ([], [str(tmp_path / "nowhere")], [str(tmp_path), "--sort", "loss"]):
        with pytest.raises(SystemExit) as ended:
            runs.main(arguments)
        assert ended.value.code == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"no config\.yaml"):
        read_run(tmp_path)


def test_times_in_words() -> None:
    seconds = (0.4, 119.0, 120.0, 7199.0, 7200.0, 2 * 86400.0 - 60, 2 * 86400.0, 1e6)
    assert [time_in_words(one) for one in seconds] == [
        *("0 s", "119 s", "2 min", "120 min", "2.0 h", "48.0 h", "2 days", "12 days"),
    ]
