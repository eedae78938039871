"""`python -m dinox_model export`: folders in, folders out, and sentences that say what was done or why not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from parity import same_numbers

import dinox_model
from dinox_model import load_pretrained
from dinox_model.__main__ import main
from tests.model.foreign_weights import SMALL, meta_tensors, perturbed, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dinox_model.save(perturbed(SMALL), tmp_path / "net")
    return tmp_path / "net"


def export(*words: object) -> int:
    return main(["export", *map(str, words)])


@pytest.mark.parametrize("format", ["hf", "meta", "dinox", "hf_dinov3"])
def test_every_format_comes_back(folder: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(folder, "--format", format, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "tensors under the same name" in printed
    assert "written:" in printed
    assert same_numbers(load_pretrained(tmp_path / "out")[0], dinox_model.load(folder))
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\n")


def test_foreign_weights_become_ours_with_more_slices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(meta_tensors(), tmp_path / "w.safetensors")
    assert export(file, "--format", "dinox", "--in-channels", "5", "--output", tmp_path / "out") == 0
    assert dinox_model.load(tmp_path / "out").config.in_channels == 5
    assert "adapted: patch_embed.weight: 3 channels to 5 slices" in capsys.readouterr().out


def test_hints_and_allowances_reach_the_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = meta_tensors(bias="none")
    del theirs["mask_token"]
    file = write(theirs, tmp_path / "w.safetensors")
    words = [file, "--format", "hf", "--output", tmp_path / "out"]
    assert export(*words) == 1
    assert "Give format='meddinov3'" in capsys.readouterr().err
    words += ["--source-format", "meddinov3"]
    assert export(*words) == 1
    assert "missing mask_token" in capsys.readouterr().err
    words += ["--allow", "mask_token"]
    assert export(*words) == 1
    assert "allow rope.periods" in capsys.readouterr().err
    words += ["--allow", "rope.periods"]
    assert export(*words) == 0
    assert load_pretrained(tmp_path / "out")[0].config.norm_eps == 1e-6


def test_provenance_reaches_the_card(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"licence": "CC-BY-4.0", "updates": 7}))
    assert export(folder, "--format", "hf", "--output", tmp_path / "out", "--provenance", file) == 0
    assert "updates of the weights: 7" in (tmp_path / "out" / "README.md").read_text()
    for text, message in (("[]", "must hold a JSON object"), ("{", "no JSON"), ('{"patient": "x"}', "unknown key")):
        file.write_text(text)
        assert export(folder, "--format", "hf", "--output", tmp_path / "new", "--provenance", file) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_refusals_are_one_sentence_and_exit_1(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(folder, "--format", "hf", "--output", folder) == 1
    assert capsys.readouterr().err == f"export: {folder}: exists already; an export makes a new folder\n"
    assert export(tmp_path / "nothing", "--format", "hf", "--output", tmp_path / "out") == 2, "as validate and infer.py"
    assert "no such file or folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        export(folder, "--format", "onnx", "--output", tmp_path / "out")
    assert refused.value.code == 2


def test_help_has_examples_and_exit_codes(repository: Path) -> None:
    command = [sys.executable, "-m", "dinox_model", "export", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=repository)
    assert ran.returncode == 0, ran.stderr
    assert "examples:" in ran.stdout
    assert "exit code:" in ran.stdout
