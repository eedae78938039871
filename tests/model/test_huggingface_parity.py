"""Our network computes what Hugging Face's does with the same weights, through both sides' files (skips without it).

benchmarks/parity.py prints these comparisons as a table.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import LIMIT, NETWORKS, SMALL, SMALL_DINOV2, all_tokens, compare, loaded_by_peer, main, perturb

import dinox_model
from dinox_model import PRESETS, ViTConfig, load_pretrained, save_pretrained
from tests.model.foreign_weights import perturbed

transformers = pytest.importorskip("transformers")

PLAIN_PROCESS = """
import sys
sys.path.insert(0, sys.argv[2])
try:
    import dinox_model
except ModuleNotFoundError:
    pass
else:
    sys.exit("our code is here")
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[1] + "/x.pt")).last_hidden_state.detach(), sys.argv[1] + "/y.pt")
"""
BLOCK_OURS = 'raise ModuleNotFoundError("dinox_model", name="dinox_model")\n'


@pytest.mark.parametrize("name", NETWORKS)
def test_all_tokens_are_equal_and_weights_come_back(name: str) -> None:
    sizes = ((96, 160),) if name == "DINOv3, vit_s" else ((224, 224), (96, 160), (512, 512))
    rows = list(compare(name, NETWORKS[name], sizes))
    assert {row.masked for row in rows} == {True, False}
    assert len(rows) == 2 * len(sizes)
    for row in rows:
        print(row)
        assert row.difference < LIMIT
        assert row.bit_equal


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp": "relu2"},
        {"mlp": "geglu"},
        {"qkv_bias": "none"},
        {"qkv_bias": "full"},
        {"norm_eps": 1e-6},
        {"rope_period": 30.0},
        {"num_registers": 0},
        {"in_channels": 5},
        {"patch_size": 8},
        {"layer_scale": None},
    ],
)
def test_options_that_they_have_are_equal(tmp_path: Path, changes: dict) -> None:
    model = perturbed(ViTConfig.from_dict(SMALL.to_dict() | changes))
    save_pretrained(model, tmp_path / "out", format="hf")
    peer = loaded_by_peer(tmp_path / "out")
    x = torch.randn(2, model.config.in_channels, 96, 160)
    with torch.no_grad():
        assert (all_tokens(model(x)) - peer(x).last_hidden_state).abs().max() < LIMIT


def test_a_wrong_epsilon_or_activation_would_be_seen(tmp_path: Path) -> None:
    """The comparison is sharp enough for the mistakes that happen."""
    model = perturbed(SMALL)
    save_pretrained(model, tmp_path / "out", format="hf")
    peer = loaded_by_peer(tmp_path / "out")
    x = torch.randn(1, 3, 96, 96)
    for changes in ({"norm_eps": 1e-6}, {"rope_period": 99.0}, {"mlp": "relu2"}):
        other = dinox_model.build(ViTConfig.from_dict(SMALL.to_dict() | changes)).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert (all_tokens(other(x)) - peer(x).last_hidden_state).abs().max() > LIMIT, changes


@pytest.mark.parametrize("kind", ["dinov3", "dinov2"])
def test_what_they_write_is_read(tmp_path: Path, kind: str) -> None:
    """Networks that transformers made, not we: its own config.json, its own first weights, then perturbed."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    if kind == "dinov3":
        settings = transformers.DINOv3ViTConfig(**sizes, intermediate_size=96, num_register_tokens=4)
        peer = transformers.DINOv3ViTModel(settings)
    else:
        settings = transformers.Dinov2WithRegistersConfig(**sizes, image_size=70, patch_size=14)
        peer = transformers.Dinov2WithRegistersModel(settings)
    perturb(peer.eval())
    peer.save_pretrained(tmp_path)
    model, report = load_pretrained(tmp_path)
    assert not report.missing
    assert not report.ignored
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert (all_tokens(model(x)) - peer(x).last_hidden_state).abs().max() < LIMIT


def test_a_fresh_process_loads_the_folder_without_our_code(tmp_path: Path) -> None:
    model = perturbed(SMALL)
    save_pretrained(model, tmp_path / "out", format="hf")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "dinox_model.py").write_text(BLOCK_OURS)
    x = torch.randn(1, 3, 64, 64)
    torch.save(x, tmp_path / "out" / "x.pt")
    command = [sys.executable, "-c", PLAIN_PROCESS, str(tmp_path / "out"), str(tmp_path / "blocked")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    with torch.no_grad():
        assert (all_tokens(model(x)) - torch.load(tmp_path / "out" / "y.pt")).abs().max() < LIMIT


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_as_many_parameters(name: str) -> None:
    from dinox_model.convert.source import FORMATS

    settings = FORMATS["hf_dinov3"].settings_of(PRESETS[name])
    assert settings is not None
    with torch.device("meta"):
        ours = dinox_model.build(name)
        theirs = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig.from_dict(settings))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--network", "DINOv2 with registers, GELU"]) == 0
    printed = capsys.readouterr().out
    assert "| DINOv2 with registers, GELU | 504 × 504 | yes |" in printed
    assert "all below 1e-05, all bit-equal" in printed


def test_positions_of_dinov2_are_resized_as_theirs_are(tmp_path: Path) -> None:
    """Grids of the same number of patches as the stored one, but another shape, too."""
    model = perturbed(dataclasses.replace(SMALL_DINOV2, learned_grid=(4, 4)))
    save_pretrained(model, tmp_path / "out", format="hf")
    peer = loaded_by_peer(tmp_path / "out")
    for height, width in ((56, 56), (28, 112), (14, 14), (140, 70)):
        x = torch.randn(1, 3, height, width)
        with torch.no_grad():
            assert (all_tokens(model(x)) - peer(x).last_hidden_state).abs().max() < LIMIT, (height, width)
