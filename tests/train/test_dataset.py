"""What a run trains on: whose data it is, and that a run does not go on over a patient who withdrew."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinox_io.about import read_about
from dinox_io.manifest import build_manifest, commit_set, read_manifest
from dinox_io.output import OutputFolder
from dinox_io.remove import remove_patient
from dinox_train.config import ConfigError, DataSection
from dinox_train.data import open_dataset, tell_provenance
from dinox_train.fake import write_fake_set


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
            open_dataset(data, tmp_path / "run", digest, said.append)
    assert said == []
    fresh = open_dataset(data, tmp_path / "run", None, said.append)
    assert len(fresh.shards.volumes) == 2
    again = open_dataset(data, tmp_path / "run", fresh.shards.digest, said.append)
    assert again.shards.digest == fresh.shards.digest
    for dataset in (fresh, again):
        dataset.shards.close()


@pytest.mark.parametrize(("release", "warned"), [("yes", 0), ("ask", 0), ("no", 1)])
def test_whose_data_it_is_is_said(tmp_path: Path, release: str, warned: int) -> None:
    folder = write_fake_set(tmp_path / "set", {0: "train"})
    about = {"name": "Ward 7", "version": "2", "licence": "in house", "weights_may_be_released": release}
    said: list[str] = []
    warnings: list[str] = []
    dataset = open_dataset(DataSection(shards=str(folder)), tmp_path / "run", None, said.append)
    tell_provenance(dataset, said.append, warnings.append)
    assert (said, warnings) == ([], [])
    dataset.shards.close()
    digest = described(folder, about)["self"]
    dataset = open_dataset(DataSection(shards=str(folder)), tmp_path / "run", None, said.append)
    tell_provenance(dataset, said.append, warnings.append)
    assert said == ["data: Ward 7 2, licence in house"]
    assert len(warnings) == warned
    assert not warned or "must not be released" in warnings[0]
    assert dataset.provenance["digest"] == digest
    assert dataset.provenance["about"] == about
    assert dataset.provenance["counts"]["volumes"] == 1
    dataset.shards.close()


def test_the_run_notes_it_and_the_command_refuses(tmp_path: Path, train: Callable[..., int]) -> None:
    folder = write_fake_set(tmp_path / "set", {0: "train", 1: "train"})
    about = {"name": "Ward 7", "licence": "in house", "weights_may_be_released": "no"}
    manifest = described(folder, about)
    settings = (f"data.shards={folder}", "evaluate.every=100")
    assert train(tmp_path / "run", *settings, "train.updates=1") == 0
    noted = json.loads((tmp_path / "run/env.json").read_text())["shards"]
    assert noted == {"digest": manifest["self"], "about": about, "counts": manifest["counts"]}
    log = (tmp_path / "run/train.log").read_text()
    assert "data: Ward 7, licence in house" in log
    assert "WARNING weights that are trained on Ward 7 must not be released" in log
    with OutputFolder(folder).held() as held:
        remove_patient(held, manifest["volumes"][0]["patient"])
    before = (tmp_path / "run/env.json").read_bytes()
    assert train(tmp_path / "run", *settings, "train.updates=2") == 2
    assert (tmp_path / "run/env.json").read_bytes() == before
