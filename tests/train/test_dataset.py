"""What a run trains on: whose data it is, and that a run does not go on over a patient who withdrew."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinox_io.about import read_about
from dinox_io.manifest import build_manifest, commit_set, read_manifest
from dinox_io.output import OutputFolder
from dinox_io.remove import remove_patient
from dinox_train.checkpoint import newest_checkpoint
from dinox_train.config import ConfigError
from dinox_train.data import open_dataset, tell_provenance
from dinox_train.fake import write_fake_set
from dinox_train.metrics import VARYING
from dinox_train.sections import DataSection


def described(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Give a set a description; its manifest."""
    before = read_manifest(folder)
    sides = {volume["id"]: volume["split"] for volume in before["volumes"]}
    manifest = build_manifest(
        [], sides=sides, options={}, rejected_by_code={}, config_digest="fake", leaks=[], packer="fake",
        sources={"files": 0, "bytes": 0}, previous=before, about=about,
    )  # fmt: skip
    return commit_set(folder, manifest)


def test_a_run_whose_patient_withdrew_does_not_go_on(tmp_path: Path, repository: Path) -> None:
    folder = write_fake_set(tmp_path / "set", {0: "train", 1: "train", 2: "val"})
    data, said = DataSection(shards=str(folder)), []
    began = read_manifest(folder)["self"]
    grown = described(folder, read_about(repository / "configs/about/lidc_idri.yaml"))
    with OutputFolder(folder).held() as held:
        remove_patient(held, held.previous["volumes"][0]["patient"])  # type: ignore[index]
    for digest in (began, grown["self"]):
        with pytest.raises(ConfigError, match=rf"withdrawn.*{digest}.*have seen that patient.*run\.folder"):
            open_dataset(data, tmp_path / "run", [(digest, 1.0)], said.append)
    assert said == []
    fresh = open_dataset(data, tmp_path / "run", None, said.append)
    assert len(fresh.volumes) == 2
    again = open_dataset(data, tmp_path / "run", fresh.began, said.append)
    assert again.began == fresh.began
    for dataset in (fresh, again):
        dataset.sources[0].shards.close()


def removed_from(folder: Path, volume: int) -> tuple[str, str]:
    """The digests of the set before and after the patient of that volume was removed."""
    with OutputFolder(folder).held() as held:
        assert held.previous is not None
        before = held.previous["self"]
        remove_patient(held, held.previous["volumes"][volume]["patient"])
    return before, read_manifest(folder)["self"]


def test_a_run_that_is_told_goes_on_without_the_patient(tmp_path: Path) -> None:
    folder = write_fake_set(tmp_path / "set", {0: "train", 1: "train", 2: "val"})
    before, now = removed_from(folder, 0)
    said: list[str] = []

    def opened(*digests: str) -> Any:
        data = DataSection(shards=str(folder), after_removal=digests)
        return open_dataset(data, tmp_path / "run", [(before, 1.0)], said.append, update=7)

    for wrong in ("0" * 64, before, now[1:]):
        with pytest.raises(ConfigError, match=rf"data\.after_removal=\[{now}\]"):
            opened(wrong)
    assert said == []
    for digest in (now, now[:16]):
        dataset = opened("0" * 16, digest)
        assert dataset.began == [(now, 1.0)]
        assert len(dataset.volumes) == 2
        assert dataset.removals == ({"update": 7, "began": before, "now": now},)
        assert [before in text and now in text for text in dataset.removals_told(7)] == [True]
        assert dataset.removals_told(8) == []
        dataset.sources[0].shards.close()
    assert all("stays in its weights" in text for text in said)
    assert len(said) == 2
    with pytest.raises(ValueError, match="after_removal"):
        DataSection(shards=str(folder), after_removal=(now[:15],))


def test_nobody_trains_on_the_validation_side_because_all_others_withdrew(tmp_path: Path) -> None:
    folder = write_fake_set(tmp_path / "set", {0: "train", 1: "val"})
    before, now = removed_from(folder, 0)
    data = DataSection(shards=str(folder), after_removal=(now,))
    with pytest.raises(ConfigError, match="no volume to train on is left"):
        open_dataset(data, tmp_path / "run", [(before, 1.0)], print)


def test_a_removal_is_told_kept_and_resumed_over(
    tmp_path: Path, train: Callable[..., int], tiny_preset: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_fake_set(tmp_path / "set", {0: "train", 1: "train", 2: "train", 3: "val"})
    settings = (f"data.shards={folder}", "evaluate.every=100", "checkpoint.every=2")
    assert train(tmp_path / "run", *settings, "train.updates=2") == 0
    before, now = removed_from(folder, 0)
    assert train(tmp_path / "run", *settings, "train.updates=6") == 2
    assert f"data.after_removal=[{now}]" in capsys.readouterr().err
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    told = f"data.after_removal=[{now}]"
    assert train(tmp_path / "run", *settings, told, "train.updates=4") == 0
    assert train(tmp_path / "run", *settings, "train.updates=6") == 0, "told once; the checkpoint has the new set"
    assert train(tmp_path / "whole", *settings, told, "train.updates=6") == 0
    lines, whole = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "whole")
    )
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6]
    varies = {*VARYING, "loss_val", "knn_z", "knn_label", "shortcut"}
    for line, other in zip(lines, whole, strict=True):
        assert {k: v for k, v in line.items() if k not in varies} == {k: v for k, v in other.items() if k not in varies}
    row = {"update": 2, "began": before, "now": now}
    for name in ("run", "whole"):
        events = [json.loads(line) for line in (tmp_path / name / "events.jsonl").read_text().splitlines()]
        assert [(one["update"], before in one["text"]) for one in events if one["event"] == "removal"] == [(2, True)]
        env = json.loads((tmp_path / name / "env.json").read_text())
        assert env["removals"] == [row]
        assert [one["digest"] for one in env["shards"]] == [now]
        newest, _ = newest_checkpoint(tmp_path / name / "checkpoints")
        assert newest is not None
        assert newest.state["removals"] == [row]
        assert newest.state["position"] == 6


@pytest.mark.parametrize(("release", "warned"), [("yes", 0), ("ask", 0), ("no", 1)])
def test_whose_data_it_is_is_said(tmp_path: Path, release: str, warned: int) -> None:
    folder = write_fake_set(tmp_path / "set", {0: "train"})
    about = {"name": "Ward 7", "version": "2", "licence": "in house", "weights_may_be_released": release}
    said: list[str] = []
    warnings: list[str] = []
    dataset = open_dataset(DataSection(shards=str(folder)), tmp_path / "run", None, said.append)
    tell_provenance(dataset, said.append, warnings.append)
    assert (said, warnings) == ([], [])
    dataset.sources[0].shards.close()
    digest = described(folder, about)["self"]
    dataset = open_dataset(DataSection(shards=str(folder)), tmp_path / "run", None, said.append)
    tell_provenance(dataset, said.append, warnings.append)
    assert said == ["data: Ward 7 2, licence in house"]
    assert len(warnings) == warned
    assert not warned or "must not be released" in warnings[0]
    (noted,) = dataset.provenance
    assert noted["digest"] == digest
    assert noted["about"] == about
    assert noted["counts"]["volumes"] == 1
    dataset.sources[0].shards.close()


def test_the_run_notes_it_and_the_command_refuses(tmp_path: Path, train: Callable[..., int]) -> None:
    folder = write_fake_set(tmp_path / "set", {0: "train", 1: "train"})
    about = {"name": "Ward 7", "licence": "in house", "weights_may_be_released": "no"}
    manifest = described(folder, about)
    settings = (f"data.shards={folder}", "evaluate.every=100")
    assert train(tmp_path / "run", *settings, "train.updates=1") == 0
    noted = json.loads((tmp_path / "run/env.json").read_text())["shards"]
    assert noted == [{"digest": manifest["self"], "about": about, "counts": manifest["counts"], "weight": 1.0}]
    log = (tmp_path / "run/train.log").read_text()
    assert "data: Ward 7, licence in house" in log
    assert "WARNING weights that are trained on Ward 7 must not be released" in log
    with OutputFolder(folder).held() as held:
        remove_patient(held, manifest["volumes"][0]["patient"])
    before = (tmp_path / "run/env.json").read_bytes()
    assert train(tmp_path / "run", *settings, "train.updates=2") == 2
    assert (tmp_path / "run/env.json").read_bytes() == before


@pytest.fixture
def two_sets(tmp_path: Path) -> list[Path]:
    sides = [{0: "train", 1: "train", 2: "val"}, {3: "train"}]
    return [write_fake_set(tmp_path / f"set-{number}", one) for number, one in enumerate(sides)]


def listed(folders: list[Path], *weights: float | None) -> str:
    rows = [
        f"{{path: {folder}}}" if weight is None else f"{{path: {folder}, weight: {weight}}}"
        for folder, weight in zip(folders, weights, strict=True)
    ]
    return f"data.shards=[{', '.join(rows)}]"


def test_a_run_draws_from_several_sets(tmp_path: Path, two_sets: list[Path], train: Callable[..., int]) -> None:
    settings = (listed(two_sets, 3, 1), "evaluate.every=2", "checkpoint.every=2")
    assert train(tmp_path / "whole", *settings, "train.updates=4") == 0
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["set_shares"] == [0.75, 0.25]
    assert lines[-1]["loss_val"] is not None
    noted = json.loads((tmp_path / "whole/env.json").read_text())["shards"]
    assert [one["weight"] for one in noted] == [3.0, 1.0]
    assert train(tmp_path / "cut", *settings, "train.updates=2") == 0
    assert train(tmp_path / "cut", *settings, "train.updates=4") == 0
    again = [json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    for line, other in zip(lines, again, strict=True):
        assert {k: v for k, v in line.items() if k not in VARYING} == {
            k: v for k, v in other.items() if k not in VARYING
        }


def test_other_weights_or_sets_are_another_run(
    tmp_path: Path, two_sets: list[Path], train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("evaluate.every=100", "schedule.updates=9")
    assert train(tmp_path / "run", listed(two_sets, 3, 1), *settings, "train.updates=1") == 0
    for shards in (listed(two_sets, 2, 1), listed(two_sets[::-1], 3, 1), f"data.shards={two_sets[0]}"):
        assert train(tmp_path / "run", shards, *settings, "train.updates=2") == 2
        assert "data.shards" in capsys.readouterr().err


def test_temperature_evens_sets_out(tmp_path: Path, two_sets: list[Path], train: Callable[..., int]) -> None:
    settings = (listed(two_sets, None, None), "data.temperature=1000", "evaluate.every=100", "train.updates=4")
    assert train(tmp_path / "run", *settings) == 0
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["set_shares"] == pytest.approx([0.5, 0.5], abs=0.1)


def test_sets_that_cannot_be_mixed(
    tmp_path: Path, two_sets: list[Path], train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    same_patient = write_fake_set(tmp_path / "leak", {2: "train"})
    only_val = write_fake_set(tmp_path / "val", {7: "val"})
    for settings, message in (
        ((listed([two_sets[0], same_patient], 1, 1),), "leak: patient"),
        ((listed([two_sets[0], only_val], 1, 1),), "has no train volume"),
        ((listed(two_sets, 1, 1), "data.temperature=2"), "temperature"),
        ((f"data.shards={two_sets[0]}", "data.temperature=2"), "temperature"),
        (("data.shards=[]",), "empty"),
        (("data.step=2", "data.step_mm=3.0"), "step or step_mm"),
    ):
        assert train(tmp_path / "run", *settings, "train.updates=1") == 2, message
        assert message in capsys.readouterr().err
