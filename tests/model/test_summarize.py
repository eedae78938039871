"""`python -m dinox_model summarize` and `validate`: true figures, true verdicts, documented exit codes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dinox_model
from dinox_model import PRESETS, ViTConfig
from dinox_model.__main__ import main
from dinox_model.commands.summarize import parameters_by_part
from dinox_model.flops import forward_flops
from dinox_model.memory_plan import plan_pass

SMALL = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64, layer_scale=0.5)
EVERYTHING = replace(
    SMALL, mlp="swiglu", norm="rms", qk_norm=True, qkv_bias="full", layer_scale=None, positions="rope_mm",
    scale_conditioning=True, cls_token=False, untied_cls_norm=True, rope_stored_periods=True,
)  # fmt: skip


def said(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    return code, out, error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dinox_model.save(dinox_model.build(SMALL), tmp_path / "network")
    return tmp_path / "network"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "vit.yaml"
    path.write_text(SMALL.to_yaml())
    return path


PARAMETERS = {
    "vit_ti": 5_489_856,
    "vit_s": 21_596_544,
    "vit_b": 85_660_416,
    "vit_l": 303_129_600,
    "vit_h": 840_592_640,
    "vit_g": 1_134_597_632,
    "vit_7b": 6_716_362_752,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name: str) -> None:
    parts = parameters_by_part(PRESETS[name])
    assert parts.pop("total") == PARAMETERS[name] == sum(parts.values())


# Of a network of width 32 with 2 blocks, by hand: what an option adds to, or takes from, SMALL.
ADDED = [
    ({}, 0),
    ({"mlp": "swiglu"}, 2 * (32 * 64 + 64)),
    ({"mlp": "geglu"}, 2 * (32 * 64 + 64)),
    ({"mlp": "relu2"}, 0),
    ({"norm": "rms"}, -5 * 32),
    ({"qk_norm": True}, 2 * 2 * 2 * 16),
    ({"qk_norm": True, "norm": "rms"}, 2 * 2 * 16 - 5 * 32),
    ({"qkv_bias": "none"}, -2 * 2 * 32),
    ({"qkv_bias": "full"}, 2 * 32),
    ({"layer_scale": None}, -2 * 2 * 32),
    ({"in_channels": 5}, 2 * 256 * 32),
    ({"num_registers": 0}, -4 * 32),
    ({"cls_token": False}, -32),
    ({"untied_cls_norm": True}, 2 * 32),
    ({"positions": "learned", "learned_grid": (3, 5)}, (1 + 15) * 32),
    ({"positions": "fourier"}, 0),
    ({"positions": "rope_mm", "rope_stored_periods": True}, 0),
    ({"scale_conditioning": True}, 16 * 64 + 64 + 64 * 32 + 32),
    ({"drop_path": 0.3, "rope_shift": 0.1, "zero_init_residuals": True}, 0),
]


@pytest.mark.parametrize(("options", "added"), ADDED, ids=lambda value: str(value))
def test_parameters_of_options(options: dict[str, Any], added: int) -> None:
    blocks = 2 * (4 * 32 + (4 * 32 * 32 + 2 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 2 * 32)
    assert parameters_by_part(SMALL)["total"] == blocks + (768 * 32 + 32) + 6 * 32 + 2 * 32
    assert parameters_by_part(replace(SMALL, **options))["total"] == blocks + (768 * 32 + 32) + 8 * 32 + added


def test_figures_are_those_of_the_plans(capsys: pytest.CaptureFixture[str], config_file: Path) -> None:
    code, out, _ = said(capsys, "summarize", config_file, "--sizes", "32,16x48", "--batch", 3, "--precision", "fp32",
                        "--checkpointing", "block", "--json")  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert ViTConfig.from_dict(found["config"]) == SMALL
    square, other = found["sizes"]
    assert (square["tokens"], other["tokens"], other["grid"]) == (9, 8, [1, 3])
    assert square["forward_flops"] == forward_flops(SMALL, 32)
    assert square["forward_bytes"] == plan_pass(SMALL, 3, 32).peak
    update = square["training"]
    assert sum(size for name, size in update["bytes"].items() if name != "peak") == update["bytes"]["peak"]
    assert update["flops"]["per_image"] * 3 == pytest.approx(update["flops"]["total"])
    assert update["flops"]["recomputation"] > 0
    assert other["training"] is None, "global views are square"


@pytest.mark.parametrize("what", ["config", "json", "folder"])
def test_what_can_be_summarized(capsys: pytest.CaptureFixture[str], what: str, folder: Path, config_file: Path) -> None:
    as_json = config_file.with_suffix(".json")
    as_json.write_text(json.dumps(SMALL.to_dict()))
    target = {"config": config_file, "json": as_json, "folder": folder}[what]
    code, out, _ = said(capsys, "summarize", target, "--sizes", "16x32", "--batch", 1)
    assert code == 0
    assert "2 blocks of width 32" in out
    assert f"{parameters_by_part(SMALL)['total']:,}" in out
    assert "16x32" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["vit_x"], 2, "no such file or folder, and no preset; did you mean 'vit_"),
        (["vit_ti", "--sizes", "100"], 2, "multiple of 16 pixels high and wide, not 100 x 100"),
        (["BROKEN"], 1, "did you mean 'width'"),
    ],
)
def test_what_cannot(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(SMALL.to_yaml().replace("width", "widht"))
    found, out, error = said(capsys, "summarize", *(str(broken) if a == "BROKEN" else a for a in arguments))
    assert (found, out) == (code, "")
    assert message in error


@pytest.mark.parametrize(
    "arguments", [["--sizes", "12,x"], ["--sizes", "0"], ["--batch", "0"], ["--precision", "int8"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["summarize", "vit_ti", *arguments])
    assert ended.value.code == 2


@pytest.mark.parametrize("config", [SMALL, EVERYTHING])
def test_a_whole_network_is_valid(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: ViTConfig) -> None:
    dinox_model.save(dinox_model.build(config), tmp_path / "network")
    code, out, _ = said(capsys, "validate", tmp_path / "network")
    assert code == 0
    assert out.startswith("OK: ")
    assert f"{parameters_by_part(config)['total']:,} parameters, hashes fit" in out


@pytest.mark.parametrize("format", ["hf", "meta"])
def test_an_export_is_valid_with_its_preprocessing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, format: str
) -> None:
    dinox_model.save_pretrained(dinox_model.build(SMALL), tmp_path / "export", format=format)
    assert (tmp_path / "export" / "preprocess.json").is_file()
    code, out, _ = said(capsys, "validate", tmp_path / "export")
    assert code == 0, out
    assert "hashes" not in out


def test_an_edited_file_is_found(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    path = folder / "preprocess.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document, indent=2))
    code, out, _ = said(capsys, "validate", folder)
    assert code == 1
    assert out.startswith("WRONG: ")
    assert "preprocess.json" in out
    assert "sha256" in out


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocess.json"])
def test_a_missing_file_is_found(capsys: pytest.CaptureFixture[str], folder: Path, name: str) -> None:
    (folder / name).unlink()
    code, out, _ = said(capsys, "validate", folder)
    assert code == 1
    assert out.startswith("WRONG: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, value: float
) -> None:
    model = dinox_model.build(SMALL)
    with torch.no_grad():
        model.blocks[1].mlp.up.bias[3] = value  # type: ignore[union-attr, index]
    dinox_model.save(model, tmp_path / "network")
    code, out, _ = said(capsys, "validate", tmp_path / "network")
    assert code == 1
    assert "not finite in 1 of" in out
    assert "blocks.1.mlp.up.bias (64,)" in out


def test_features_that_are_not_finite_are_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = dinox_model.build(SMALL)
    with torch.no_grad():
        model.patch_embed.weight.fill_(3e38)
    dinox_model.save(model, tmp_path / "network")
    code, out, _ = said(capsys, "validate", tmp_path / "network")
    assert code == 1
    assert "a forward gives" in out
    assert "patches" in out


def test_configs_are_validated(capsys: pytest.CaptureFixture[str], config_file: Path) -> None:
    assert said(capsys, "validate", config_file)[0] == 0
    config_file.write_text(SMALL.to_yaml().replace("num_heads: 2", "num_heads: 3"))
    code, out, _ = said(capsys, "validate", config_file)
    assert code == 1
    assert "width must be a multiple" in out
    assert said(capsys, "validate", config_file.with_name("nowhere"))[0] == 2


@pytest.mark.parametrize("name", ["width", "num_layers", "mlp_hidden", "in_channels", "patch_size", "num_registers"])
@pytest.mark.parametrize("count", [10**20, 2**62])
def test_counts_beyond_any_network_are_refused_in_a_sentence(
    capsys: pytest.CaptureFixture[str], config_file: Path, name: str, count: int
) -> None:
    document = SMALL.to_dict() | {name: count}
    config_file.write_text(
        ViTConfig.from_dict(SMALL.to_dict())
        .to_yaml()
        .replace(f"{name}: {SMALL.to_dict()[name]}\n", f"{name}: {document[name]}\n")
    )
    code, out, _ = said(capsys, "validate", config_file)
    assert code == 1
    assert f"ViTConfig.{name} must be at most" in out
    code, _, err = said(capsys, "summarize", config_file)
    assert code == 1
    assert f"ViTConfig.{name} must be at most" in err


def test_a_config_of_large_images_is_validated_without_making_one(config_file: Path) -> None:
    values = SMALL.to_dict() | {"in_channels": 2**16, "patch_size": 1024}
    config_file.write_text(ViTConfig.from_dict(values).to_yaml())
    assert main(["validate", str(config_file)]) == 0  # 2 x 2 patches are 10^12 numbers


def test_the_command_line(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dinox_model", "validate", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(repository)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "nowhere: no such file or folder" in done.stderr
