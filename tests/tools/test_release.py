"""release.py on a checkpoint of a real run: what is in the folder, who may load it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import probe
import pytest
import release
import torch
from hypothesis import given
from hypothesis import strategies as st
from probing import protocol
from releasing.licences import OPEN, judge, judge_terms, licence_of_weights
from releasing.lineage import hours_of, kwh_of, public_config

import dinox_model
from dinox_io import open_shards
from dinox_io.manifest import read_manifest
from tests.io.conftest import make_volume, write_set  # noqa: F401 (fixtures)
from tests.tools.test_probe import folder, run  # noqa: F401 (fixtures)
from tests.train.conftest import small_config, tiny_preset  # noqa: F401 (fixtures)


def call(*words: object) -> int:
    return release.main([str(word) for word in words])


# ------------------------------------------------------------------------------------------ licences


@pytest.mark.parametrize(
    ("licence", "verdict"),
    [
        ("CC-BY-3.0", "allowed"),
        ("CC BY 4.0", "allowed"),
        ("cc0-1.0", "allowed"),
        ("CC-BY-NC-4.0", "allowed"),
        ("CC-BY-ND-4.0", "forbidden"),
        ("CC-BY-NC-ND-4.0", "forbidden"),
        ("For research; must not be redistributed", "forbidden"),
        ("Data use agreement: not to be shared", "forbidden"),
        ("No derivatives without consent", "forbidden"),
        ("CC-BY-3.0 and a data use agreement", "unknown"),
        ("ask Dr. Muster", "unknown"),
        ("MITIGATED", "unknown"),
    ],
)
def test_a_licence_is_allowed_forbidden_or_unknown(licence: str, verdict: str):
    found = judge_terms("a set", licence)
    assert ("forbidden" if found.forbidden else "unknown" if found.unknown else "allowed") == verdict
    assert judge_terms("a set", licence, "no").forbidden
    asked = judge_terms("a set", licence, "ask")
    assert asked.unknown or asked.forbidden


@given(st.text(max_size=60))
def test_nothing_is_allowed_that_no_rule_names(licence: str):
    import re

    found = judge_terms("a set", licence)
    spelt = "-".join(licence.split())
    named = any(re.fullmatch(pattern.replace(" ", "-"), spelt, re.IGNORECASE) for pattern, _ in OPEN)
    assert bool(found.forbidden or found.unknown) == (not named)


def test_the_licence_of_weights_keeps_what_the_data_ask():
    free, closed = judge_terms("a", "CC-BY-4.0"), judge_terms("b", "CC-BY-NC-4.0")
    assert licence_of_weights([free], None) == "CC-BY-4.0"
    assert licence_of_weights([free, closed], "CC-BY-NC-4.0") == "CC-BY-NC-4.0"
    with pytest.raises(ValueError, match="b is non-commercial"):
        licence_of_weights([free, closed], "MIT")
    with pytest.raises(ValueError, match="share-alike"):
        licence_of_weights([judge_terms("c", "CC-BY-SA-4.0")], "CC-BY-4.0")
    for several in ([free, closed], [judge(None, "d" * 64)]):
        with pytest.raises(ValueError, match="give that of the weights by --licence"):
            licence_of_weights(several, None)


# ------------------------------------------------------------------------------------------ figures


def test_hours_and_energy_are_sums_of_what_was_recorded():
    lines = [{"images": 8, "images_per_s": 2.0}, {"images": 24, "images_per_s": 4.0}]
    assert hours_of(lines) == pytest.approx(8 / 3600, abs=1e-4)
    assert hours_of([{"images": 8, "images_per_s": None}]) is None
    samples = [(1, 0.0, 100.0), (2, 36000.0, 300.0), (3, 0.0, 100.0), (4, 36000.0, 100.0), (9, 72000.0, 900.0)]
    system = [{"update": update, "elapsed_s": at, "gpu_power_w": power} for update, at, power in samples]
    assert kwh_of(system, 4) == pytest.approx(2.0 + 1.0)  # nothing between two processes, nothing past the update
    assert kwh_of([*system, {"update": 1, "elapsed_s": 1.0, "gpu_power_w": None}], 4) is None
    assert kwh_of([], 4) is None


def test_a_configuration_is_public_without_folders_and_commands():
    config = {
        "run": {"folder": "/home/name/run"},
        "data": {"shards": "/data/hospital", "depth": 3},
        "events": {"command": "curl https://…"},
        "model": {"preset": "vit_s"},
        "evaluate": {"labels": "/data/labels.json"},
    }
    assert public_config(config) == {"model": {"preset": "vit_s"}, "data": {"depth": 3}}


# ------------------------------------------------------------------------------------------ the folder


def test_a_release_holds_all_and_names_no_place(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(protocol, "RESAMPLES", 20)
    monkeypatch.setattr(protocol, "DRAWS", 1)
    words = [run, "--shards", folder, "--task", "type", "--device", "cpu", "--output", tmp_path / "probe"]
    assert probe.main([str(word) for word in words]) == 0
    out, report = tmp_path / "release", tmp_path / "probe" / "probe.json"
    assert call(run, "--output", out) == 3  # a set that says nothing of its licence
    assert "says nothing of its licence" in capsys.readouterr().err
    assert call(run, "--output", out, "--licence-checked") == 3  # and weights need one
    assert not out.exists()
    given = ["--output", out, "--licence", "CC-BY-4.0", "--licence-checked", "--probe", report]
    assert call(run, *given) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocess.json", "README.md", "dinox", "lineage.json",
                     "evaluation.json", "evaluation.md"}  # fmt: skip
    checkpoint = next((run / "checkpoints").iterdir())
    trained, released = dinox_model.load(checkpoint), dinox_model.load(out / "dinox")
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, released.state_dict()[name])
    theirs, _ = dinox_model.load_pretrained(out)
    hu = torch.zeros(1, trained.config.in_channels, 32, 32, dtype=torch.int16)
    [one, other] = [dinox_model.encode(model, hu, [[1.0, 1.0, 1.0]]).pooled for model in (trained, theirs)]
    assert torch.allclose(one, other, atol=1e-5)
    lineage = json.loads((out / "lineage.json").read_text())
    assert (lineage["updates"], lineage["sets"][0]["digest"]) == (2, read_manifest(folder)["self"])
    assert lineage["checked"]
    assert lineage["hours"] is not None
    card = (out / "README.md").read_text()
    assert 'license: "CC-BY-4.0"' in card
    assert "## Evaluation" in card
    assert "random initialisation" in card
    assert "energy of the GPU: not measured" in card
    assert json.loads((out / "evaluation.json").read_text())["reports"] == [json.loads(report.read_text())]
    texts = [path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".md")]
    hidden = [str(folder), str(run), str(Path.home()), *(volume.patient for volume in open_shards(folder).volumes)]
    assert not any(word in text for word in hidden for text in texts)
    assert call(run, *given) == 1  # never over another


def test_what_is_of_another_network_is_refused(run: Path, tmp_path: Path, capsys: Any):  # noqa: F811
    report = tmp_path / "probe.json"
    report.write_text(json.dumps({"network": {"digest": "0" * 64}, "protocol": {"version": 1}}))
    given = ["--output", tmp_path / "out", "--licence", "MIT", "--licence-checked", "--probe", report]
    assert call(run, *given) == 1
    assert "is of another network" in capsys.readouterr().err
    report.write_text("[]")
    assert call(run, *given) == 1
    assert "is no probe.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["probe.json"]


def test_a_failed_release_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    import releasing.card

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(releasing.card, "sections", full)
    assert call(run, "--output", tmp_path / "out", "--licence", "MIT", "--licence-checked") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_forbidden_set_is_refused_whatever_is_given(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any  # noqa: F811
):  # fmt: skip
    from releasing import lineage

    manifest = read_manifest(folder)
    for terms, words in (("CC-BY-ND-4.0", "no derivatives"), ("CC-BY-4.0", "weights_may_be_released is no")):
        about = {"name": "lung", "licence": terms, "weights_may_be_released": "yes" if "ND" in terms else "no"}
        monkeypatch.setattr(lineage, "manifest_of", lambda *_, about=about: {**manifest, "about": about})
        assert call(run, "--output", tmp_path / "out", "--licence", "MIT", "--licence-checked") == 3
        assert words in capsys.readouterr().err
    about = {"name": "lung", "licence": "CC-BY-4.0", "weights_may_be_released": "yes"}
    monkeypatch.setattr(lineage, "manifest_of", lambda *_: {**manifest, "about": about})
    assert call(run, "--output", tmp_path / "out") == 0  # the data's own licence, and nothing to check
    assert "### Data: lung" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr(lineage, "manifest_of", lambda *_: None)
    assert call(run, "--output", tmp_path / "other") == 3
    assert "nowhere to be found" in capsys.readouterr().err


def test_plain_automodel_loads_a_release(run: Path, tmp_path: Path):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    assert call(run, "--output", tmp_path / "out", "--licence", "MIT", "--licence-checked") == 0
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    ours = dinox_model.load(tmp_path / "out" / "dinox").eval()
    x = torch.randn(1, ours.config.in_channels, 32, 32)
    with torch.no_grad():
        assert torch.allclose(theirs(pixel_values=x).last_hidden_state[:, 0], ours(x).cls, atol=1e-4)
