"""Meta's and MedDINOv3's weights: every key of theirs goes to its place of ours, and what does not fit is refused."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import same_numbers
from safetensors.torch import load_file
from torch import Tensor

import dinox_model
from dinox_model import ViTConfig, WeightsError, load_pretrained, save_pretrained
from tests.model.foreign_weights import SMALL, WIDTH, meta_shapes, meta_tensors, perturbed, write

STORED = dataclasses.replace(SMALL, rope_stored_periods=True)


def by_hand(theirs: dict[str, Tensor], swiglu: bool) -> dict[str, Tensor]:
    """Our tensors of a k-masked network of Meta's, each named by hand."""
    ours = {
        "cls_token": theirs["cls_token"],
        "register_tokens": theirs["storage_tokens"],
        "mask_token": theirs["mask_token"][None],
        "patch_embed.weight": theirs["patch_embed.proj.weight"].reshape(WIDTH, -1),
        "patch_embed.bias": theirs["patch_embed.proj.bias"],
        "rope.periods": theirs["rope_embed.periods"],
        "norm.weight": theirs["norm.weight"],
        "norm.bias": theirs["norm.bias"],
    }
    mlp = {"gate": "w1", "up": "w2", "down": "w3"} if swiglu else {"up": "fc1", "down": "fc2"}
    for block in ("blocks.0", "blocks.1"):
        bias = theirs[f"{block}.attn.qkv.bias"]
        ours |= {
            f"{block}.attention.qkv.weight": theirs[f"{block}.attn.qkv.weight"],
            f"{block}.attention.q_bias": bias[:WIDTH],
            f"{block}.attention.v_bias": bias[2 * WIDTH :],
            f"{block}.gamma1": theirs[f"{block}.ls1.gamma"],
            f"{block}.gamma2": theirs[f"{block}.ls2.gamma"],
        }
        for part in ("weight", "bias"):
            ours[f"{block}.attention.projection.{part}"] = theirs[f"{block}.attn.proj.{part}"]
            ours |= {f"{block}.{norm}.{part}": theirs[f"{block}.{norm}.{part}"] for norm in ("norm1", "norm2")}
            ours |= {f"{block}.mlp.{name}.{part}": theirs[f"{block}.mlp.{of}.{part}"] for name, of in mlp.items()}
    return ours


@pytest.mark.parametrize("swiglu", [False, True])
def test_every_tensor_of_metas_goes_to_its_place(tmp_path: Path, swiglu: bool) -> None:
    theirs = meta_tensors(swiglu=swiglu)
    model, report = load_pretrained(write(theirs, tmp_path / "w.safetensors"))
    assert model.config == dataclasses.replace(STORED, mlp="swiglu" if swiglu else "gelu")
    expected = by_hand(theirs, swiglu)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert set(report.matched) | set(report.renamed) == set(expected)
    assert "cls_token" in report.matched
    assert report.renamed["register_tokens"] == ("storage_tokens",)
    assert set(report.ignored) == {f"blocks.{i}.attn.qkv.bias_mask" for i in (0, 1)}
    assert any("norm_eps is 1e-05" in note for note in report.notes)
    assert not model.training


def test_what_meta_masks_of_the_keys_bias_does_not_matter(tmp_path: Path) -> None:
    theirs = meta_tensors()
    first, _ = load_pretrained(write(theirs, tmp_path / "a.safetensors"))
    theirs["blocks.0.attn.qkv.bias"][WIDTH : 2 * WIDTH] = float("nan")
    second, _ = load_pretrained(write(theirs, tmp_path / "b.safetensors"))
    assert same_numbers(first, second)


@pytest.mark.parametrize("bias", ["none", "full", "k_masked"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("stored", [False, True])
def test_there_and_back_is_bit_equal(
    tmp_path: Path, bias: str, mlp: str, layer_scale: float | None, stored: bool
) -> None:
    config = ViTConfig.from_dict(
        SMALL.to_dict() | {"qkv_bias": bias, "mlp": mlp, "layer_scale": layer_scale, "rope_stored_periods": stored}
    )
    model = perturbed(config, seed=3)
    if stored:
        assert model.rope is not None
        assert model.rope.periods is not None
        model.rope.periods.copy_(model.rope.periods.bfloat16())
    save_pretrained(model, tmp_path / "out", format="meta")
    back, _ = load_pretrained(tmp_path / "out", format="meta_dinov3")
    assert same_numbers(back, model)
    assert back.preprocess == model.preprocess
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(back(x).patches, model(x).patches)


@pytest.mark.parametrize("registers", [0, 1, 4])
@pytest.mark.parametrize("local_norm", [False, True])
def test_registers_and_the_norm_of_local_crops_come_back(tmp_path: Path, registers: int, local_norm: bool) -> None:
    config = dataclasses.replace(SMALL, num_registers=registers, untied_cls_norm=local_norm)
    model = perturbed(config)
    save_pretrained(model, tmp_path / "out", format="meta")
    back, _ = load_pretrained(tmp_path / "out")
    assert back.config == dataclasses.replace(config, layer_scale=1e-5)
    assert same_numbers(back, model)


def test_what_is_written_has_metas_names_and_shapes(tmp_path: Path) -> None:
    for number, (swiglu, bias) in enumerate([(False, "k_masked"), (True, "none"), (False, "full")]):
        config = dataclasses.replace(SMALL, mlp="swiglu" if swiglu else "gelu", qkv_bias=bias)
        save_pretrained(perturbed(config), tmp_path / str(number), format="meta")
        found = load_file(tmp_path / str(number) / "meta_dinov3.safetensors")
        assert {name: tuple(t.shape) for name, t in found.items()} == meta_shapes(swiglu=swiglu, bias=bias)
        assert {path.name for path in (tmp_path / str(number)).iterdir()} == {
            "meta_dinov3.safetensors",
            "preprocess.json",
            "README.md",
        }


def test_a_training_checkpoint_gives_its_backbone(tmp_path: Path) -> None:
    theirs = {f"backbone.{name}": tensor for name, tensor in meta_tensors(bias="none").items()}
    theirs |= {"dino_head.mlp.0.weight": torch.zeros(2), "ibot_head.last_layer.weight": torch.zeros(2)}
    model, report = load_pretrained(write(theirs, tmp_path / "w.safetensors"), format="meddinov3")
    assert model.config == dataclasses.replace(STORED, qkv_bias="none", norm_eps=1e-6)
    assert report.ignored == {
        "dino_head.mlp.0.weight": "a head of training",
        "ibot_head.last_layer.weight": "a head of training",
    }
    assert report.renamed["cls_token"] == ("backbone.cls_token",)
    save_pretrained(model, tmp_path / "out", format="meddinov3")
    back, _ = load_pretrained(tmp_path / "out", format="meddinov3")
    assert same_numbers(back, model)


def test_weights_without_bias_are_not_guessed_at(tmp_path: Path) -> None:
    file = write(meta_tensors(bias="none"), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="Give format='meddinov3'"):
        load_pretrained(file)
    assert load_pretrained(file, format="meta_dinov3", norm_eps=1e-6)[0].config.norm_eps == 1e-6
    assert load_pretrained(file, format="meta_dinov3")[0].config.norm_eps == 1e-5
    biased = write(meta_tensors(), tmp_path / "biased.safetensors")
    with pytest.raises(WeightsError, match="qkv_bias: its queries"):
        load_pretrained(biased, format="meddinov3")


def test_stored_periods_change_the_tokens_and_the_formulas_are_known(tmp_path: Path) -> None:
    theirs = {name: 5 * t if "qkv" in name and "mask" not in name else t for name, t in meta_tensors().items()}
    rounded, _ = load_pretrained(write(theirs, tmp_path / "a.safetensors"))
    theirs["rope_embed.periods"] = 100 ** (torch.arange(4, dtype=torch.float32) / 4)
    exact, report = load_pretrained(write(theirs, tmp_path / "b.safetensors"))
    assert rounded.config.rope_stored_periods
    assert not exact.config.rope_stored_periods
    assert report.ignored["rope_embed.periods"] == "a function of the network's shape"
    x = torch.randn(1, 3, 96, 96)
    assert 1e-7 < (rounded(x).patches - exact(x).patches).abs().max() < 1e-1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, "norm.weight: missing; a network of Meta's dinov3"),
        ({"blocks.1.ls2.gamma": None}, r"missing blocks\.1\.ls2\.gamma \(our blocks\.1\.gamma2\)"),
        ({"cls_norm.weight": (WIDTH,)}, r"unknown cls_norm\.weight"),
        ({"mask_token": (1, 1, WIDTH)}, r"mask_token is \(1, 1, 32\), not \(1, 32\)"),
        ({"blocks.0.mlp.fc1.weight": (63, WIDTH)}, r"blocks\.1\.mlp\.fc1\.weight is \(64, 32\), not \(63, 32\)"),
        ({"blocks.1.attn.qkv.bias_mask": (3 * WIDTH,)}, "bias_mask must be 1 for queries and values and 0 for keys"),
        ({"patch_embed.proj.weight": (WIDTH, 48)}, "4 dimensions were expected"),
        ({"rope_embed.periods": (0,)}, "num_heads must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    theirs = meta_tensors()
    for name, shape in change.items():
        theirs.pop(name, None)
        if shape is not None:
            theirs[name] = torch.zeros(shape)
    with pytest.raises(WeightsError, match=message):
        load_pretrained(write(theirs, tmp_path / "w.safetensors"))


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    theirs = meta_tensors()
    del theirs["mask_token"], theirs["blocks.0.ls1.gamma"], theirs["blocks.1.mlp.fc2.bias"]
    theirs["rope.extra"] = torch.zeros(2)
    with pytest.raises(WeightsError) as refused:
        load_pretrained(write(theirs, tmp_path / "w.safetensors"))
    for name in ("missing mask_token", "missing blocks.1.mlp.fc2.bias", "unknown rope.extra", "blocks.1.ls1.gamma"):
        assert name in str(refused.value), name


def test_what_is_allowed_is_left_out_and_said(tmp_path: Path) -> None:
    theirs = meta_tensors() | {"cls_norm.weight": torch.ones(WIDTH), "cls_norm.bias": torch.ones(WIDTH)}
    del theirs["mask_token"]
    file = write(theirs, tmp_path / "w.safetensors")
    model, report = load_pretrained(file, allow=("mask_token", "cls_norm.*"))
    assert torch.equal(model.mask_token, dinox_model.build(model.config).mask_token)
    assert "mask_token" in report.missing
    assert report.ignored["cls_norm.bias"] == "unknown, and allowed to be"
    with pytest.raises(WeightsError, match="missing mask_token"):
        load_pretrained(file, allow=("cls_norm.*",))
    with pytest.raises(WeightsError, match=r"unknown cls_norm\.weight"):
        load_pretrained(file, allow=("mask_token",))
    assert any(line.startswith("missing: mask_token") for line in report.lines())
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"mlp": "geglu"}, "mlp: its MLPs are gelu and swiglu"),
        ({"norm": "rms"}, "norm: its norms are LayerNorms"),
        ({"qk_norm": True}, "qk_norm"),
        ({"cls_token": False}, "cls_token"),
        ({"scale_conditioning": True}, "scale_conditioning"),
        ({"positions": "fourier"}, "positions"),
        ({"positions": "rope_mm"}, "positions"),
        ({"norm_eps": 1e-4}, "norm_eps"),
    ],
)
def test_what_meta_cannot_hold_is_refused_by_option(tmp_path: Path, changes: dict, option: str) -> None:
    model = dinox_model.build(ViTConfig.from_dict(SMALL.to_dict() | changes))
    with pytest.raises(WeightsError, match=option):
        save_pretrained(model, tmp_path / "out", format="meta")
    assert not list(tmp_path.iterdir())


def test_half_precision_is_widened_and_said(tmp_path: Path) -> None:
    theirs = {name: tensor.bfloat16() for name, tensor in meta_tensors().items()}
    model, report = load_pretrained(write(theirs, tmp_path / "w.safetensors"))
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    assert torch.equal(model.state_dict()["cls_token"], theirs["cls_token"].float())
    assert any("torch.bfloat16, and are float32 now" in note for note in report.notes)


def test_a_pickle_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    theirs = meta_tensors()
    torch.save({"teacher": theirs}, tmp_path / "w.pth")
    for path in (tmp_path, tmp_path / "w.pth"):
        with pytest.raises(WeightsError, match="a pickle, which may run code") as refused:
            load_pretrained(path)
    command = str(refused.value).partition("\n")[2].replace("python -c", f"{re.escape(sys.executable)} -c", 1)
    subprocess.run(command, shell=True, check=True)
    model, _ = load_pretrained(tmp_path)
    assert torch.equal(model.state_dict()["cls_token"], theirs["cls_token"])
