"""Warm start: others' weights and ours become a run's backbone, or are refused with the keys that would fit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dinox_model
from dinox_model import Preprocess, VisionTransformer, ViTConfig, save_pretrained
from dinox_train.config import load_config
from dinox_train.warm_start import load_backbone

CONFIG = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64, layer_scale=1.0)
DINOV2 = dataclasses.replace(
    CONFIG, patch_size=14, positions="learned", learned_grid=(3, 3), norm_eps=1e-6, qkv_bias="full"
)
RUN = Preprocess(level_hu=-100.0, width_hu=1000.0, mean=0.4, std=0.3, depth=3, step_mm=1.5)
"""What the run would have without a warm start."""


def perturbed(config: ViTConfig) -> VisionTransformer:
    model = dinox_model.build(config, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def images(side: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def same_features(one: VisionTransformer, other: VisionTransformer, x: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(one(x).patches, other(x).patches, atol=1e-6)


META = dataclasses.replace(CONFIG, rope_stored_periods=True)


@pytest.mark.parametrize(("config", "format", "side"), [(CONFIG, "hf", 32), (META, "meta", 32), (DINOV2, "hf", 42)])
def test_released_layouts_become_the_backbone(config: ViTConfig, format: str, side: int, tmp_path: Path) -> None:
    model = perturbed(config)
    if config.rope_stored_periods:
        assert model.rope is not None
        model.rope.periods.copy_(model.rope.periods.bfloat16())  # as Meta's files have them
    save_pretrained(model, tmp_path / "weights", format=format)
    (tmp_path / "weights" / "preprocess.json").unlink()  # as others' folders are
    wanted = dataclasses.replace(config, drop_path=0.1, layer_scale=1e-5)
    path = tmp_path / "weights" / ("meta_dinov3.safetensors" if format == "meta" else "")
    network, lines = load_backbone(path, wanted, RUN, seed=1)
    assert network.config == wanted
    assert same_features(model, network, images(side))
    assert network.preprocess == dataclasses.replace(RUN, mean=0.449, std=0.226)
    assert any("0.449" in line for line in lines)


def test_a_checkpoint_of_ours_brings_its_mean_and_deviation(tmp_path: Path) -> None:
    model = perturbed(CONFIG)
    model.preprocess = Preprocess(level_hu=40.0, width_hu=400.0, mean=0.61, std=0.17, step=7)
    dinox_model.save(model, tmp_path / "step-00000040")
    network, _ = load_backbone(tmp_path / "step-00000040", CONFIG, RUN, seed=1)
    assert same_features(model, network, images(32))
    assert network.preprocess == dataclasses.replace(RUN, mean=0.61, std=0.17), "windows are the run's"


@pytest.mark.parametrize("slices", [1, 5])
def test_another_number_of_slices_is_adapted(slices: int, tmp_path: Path) -> None:
    model = perturbed(CONFIG)
    dinox_model.save(model, tmp_path / "weights")
    wanted = dataclasses.replace(CONFIG, in_channels=slices)
    network, lines = load_backbone(tmp_path / "weights", wanted, RUN, seed=1)
    gray = images(32, channels=1)
    with torch.no_grad():
        ours, theirs = network(gray.expand(-1, slices, -1, -1)).cls, model(gray.expand(-1, 3, -1, -1)).cls
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert any(f"to {slices} slices" in line for line in lines)


def test_physical_scale_is_added_and_changes_nothing_at_first(tmp_path: Path) -> None:
    model = perturbed(CONFIG)
    dinox_model.save(model, tmp_path / "weights")
    wanted = dataclasses.replace(CONFIG, scale_conditioning=True)
    network, lines = load_backbone(tmp_path / "weights", wanted, RUN, seed=1)
    again, _ = load_backbone(tmp_path / "weights", wanted, RUN, seed=2)
    with torch.no_grad():
        told = network(images(32), mm_per_pixel=torch.tensor([[0.7, 0.7], [1.4, 1.4]])).cls
        torch.testing.assert_close(told, model(images(32)).cls)
    assert network.scale is not None
    assert again.scale is not None
    assert not torch.equal(network.scale.up.weight, again.scale.up.weight)
    assert any("first values" in line for line in lines)


def test_another_network_is_refused_with_the_keys_that_fit(tmp_path: Path) -> None:
    save_pretrained(perturbed(DINOV2), tmp_path / "weights", format="hf")
    keys = (
        r"weights holds a network with .*positions 'learned' \(the run: 'rope'\).*give: .*model\.norm_eps=1e-06 .*"
        r"model\.positions=learned .*model\.learned_grid=\[3,3\]"
    )
    with pytest.raises(ValueError, match=keys):
        load_backbone(tmp_path / "weights", CONFIG, RUN, seed=1)
    dinox_model.save(perturbed(CONFIG), tmp_path / "ours")
    for change, key in (
        ({"width": 64}, "model.width=32"),
        ({"layer_scale": None}, "model.layer_scale=1"),
        ({"qk_norm": True}, "model.qk_norm=false"),
        ({"untied_cls_norm": True}, "model.untied_cls_norm=false"),
        ({"rope_stored_periods": True}, "model.rope_stored_periods=false"),
    ):
        with pytest.raises(ValueError, match=f"give: {key}$"):
            load_backbone(tmp_path / "ours", dataclasses.replace(CONFIG, **change), RUN, seed=1)


def test_a_scale_that_the_run_has_not_is_no_part_to_drop(tmp_path: Path) -> None:
    dinox_model.save(perturbed(dataclasses.replace(CONFIG, scale_conditioning=True)), tmp_path / "weights")
    with pytest.raises(ValueError, match=r"give: model\.scale_conditioning=true"):
        load_backbone(tmp_path / "weights", CONFIG, RUN, seed=1)


def test_what_is_missing_is_refused(tmp_path: Path) -> None:
    save_pretrained(perturbed(CONFIG), tmp_path / "weights", format="hf")
    tensors = dinox_model.build(CONFIG).state_dict()
    save_file({"layer.0.nonsense": tensors["cls_token"]}, tmp_path / "weights" / "model.safetensors")
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["model_type"] == "dinov3_vit"
    with pytest.raises(ValueError, match="missing"):
        load_backbone(tmp_path / "weights", CONFIG, RUN, seed=1)
    with pytest.raises(ValueError, match="nowhere"):
        load_backbone(tmp_path / "nowhere", CONFIG, RUN, seed=1)


def test_the_shipped_overlay_is_the_template(repository: Path) -> None:
    config = load_config([repository / "configs" / "vit_s.yaml", repository / "configs" / "warm_start.yaml"])
    optimizer = config.optimizer
    assert optimizer.peak_learning_rate(256) == pytest.approx(5e-5 * 4 * 0.5)
    assert (optimizer.backbone_frozen_updates, optimizer.backbone_ramp_updates, optimizer.layer_decay) == (
        10000,
        1000,
        0.9,
    )
    assert (config.schedule.shape, config.model.drop_path) == ("constant", 0.1)
