"""Folders of weights: bit-equal there and back, whole or absent, and refused when anything is not as it was saved."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dinox_model
from dinox_model import Preprocess, VisionTransformer, ViTConfig, WeightsError, weights

TINY = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64, layer_scale=0.5, in_channels=5)
FILES = {"config.json", "model.safetensors", "preprocess.json"}


def network(seed: int = 0) -> VisionTransformer:
    model = dinox_model.build(TINY, seed=seed)
    model.preprocess = Preprocess(level_hu=-500.5, width_hu=1500.0, mean=1 / 3, std=0.1)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dinox_model.save(network(), tmp_path / "net")
    return tmp_path / "net"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_equal(found: VisionTransformer, expected: VisionTransformer) -> None:
    assert found.config == expected.config
    assert found.preprocess == expected.preprocess
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("qkv_bias", ["none", "full", "k_masked"])
def test_there_and_back_is_bit_equal(tmp_path: Path, mlp: str, qkv_bias: str) -> None:
    model = dinox_model.build(dataclasses.replace(TINY, mlp=mlp, qkv_bias=qkv_bias), seed=7)
    dinox_model.save(model, tmp_path / "a" / "net")
    loaded = dinox_model.load(tmp_path / "a" / "net")
    assert_equal(loaded, model)
    assert not loaded.training
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    x = torch.randn(1, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x).patches, model(x).patches)
    assert names(tmp_path / "a" / "net") == FILES
    assert names(tmp_path / "a") == {"net"}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_stored_periods": True},
        {"positions": "learned", "learned_grid": (3, 5)},
        {"positions": "fourier", "cls_token": False},
        {"positions": "rope_mm", "scale_conditioning": True},
        {"norm": "rms", "qk_norm": True, "layer_scale": None, "num_registers": 0, "mlp": "geglu"},
        {"untied_cls_norm": True},
    ],
)
def test_every_number_of_every_option_comes_back(tmp_path: Path, changes: dict) -> None:
    model = dinox_model.build(ViTConfig.from_dict(TINY.to_dict() | changes), seed=7)
    kept = model.state_dict()
    assert {name for name, _ in model.named_buffers()} <= set(kept), "a buffer that is not saved is lost by load"
    for tensor in kept.values():
        tensor.copy_(torch.randn(tensor.shape))
    dinox_model.save(model, tmp_path / "net")
    assert_equal(dinox_model.load(tmp_path / "net"), model)


def test_the_same_network_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    dinox_model.save(network(), tmp_path / "again")
    for name in FILES:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_saving_into_a_folder_replaces_the_network_and_leaves_the_rest(folder: Path) -> None:
    (folder / "train").mkdir()
    (folder / "MANIFEST.json").write_text("{}")
    dinox_model.save(network(seed=1), folder)
    assert_equal(dinox_model.load(folder), network(seed=1))
    assert names(folder) == FILES | {"train", "MANIFEST.json"}


@pytest.mark.parametrize("fails_at", range(3))
def test_a_save_that_fails_leaves_nothing_or_what_load_refuses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    calls = iter(range(3))
    whole = weights.replace_file

    def fail(path, write):
        if next(calls) == fails_at:
            raise OSError("no space left on device")
        whole(path, write)

    monkeypatch.setattr(weights, "replace_file", fail)
    with pytest.raises(OSError, match="no space"):
        dinox_model.save(network(), tmp_path / "new")
    assert names(tmp_path) == {"net"}

    calls = iter(range(3))
    with pytest.raises(OSError, match="no space"):
        dinox_model.save(network(seed=1), folder)
    if fails_at == 0:
        assert_equal(dinox_model.load(folder), network())
    else:
        with pytest.raises(WeightsError, match=r"model\.safetensors: not the file that config\.json was written with"):
            dinox_model.load(folder)


def test_what_a_crash_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".net.tmp").mkdir()
    (tmp_path / ".net.tmp" / "half").write_text("x")
    dinox_model.save(network(), tmp_path / "net")
    assert names(tmp_path) == {"net"}
    assert names(tmp_path / "net") == FILES


def test_only_float32_is_saved(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"bfloat16.*model\.float\(\)"):
        dinox_model.save(network().bfloat16(), tmp_path / "net")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=rf"{name}: no such file"):
        dinox_model.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2; this dinox_model reads 'dinox-model', version 1"),
        ({"format": "other"}, "format 'other'"),
        ({"config": {**TINY.to_dict(), "num_layrs": 3}}, "unknown key 'num_layrs'.*did you mean 'num_layers'"),
        ({"config": {**TINY.to_dict(), "width": "32"}}, "width must be of type int"),
        ({"config": None}, "'config' must be an object"),
        ({"sha256": {}}, "not the file that config.json was written with"),
    ],
)
def test_another_config_is_refused(folder: Path, changes: dict, message: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(WeightsError, match=message):
        dinox_model.load(folder)


def test_what_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff{")
    with pytest.raises(WeightsError, match=r"config\.json: no JSON"):
        dinox_model.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="must be a JSON object"):
        dinox_model.load(folder)


def test_missing_unknown_and_misshapen_parameters_are_listed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    tensors["gate"] = torch.zeros(1)
    tensors["cls_token"] = torch.zeros(1, 1, 31)
    tensors["mask_token"] = tensors["mask_token"].half()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as refused:
        dinox_model.load(folder)
    for fault in (
        "missing norm.weight",
        "unknown gate",
        "cls_token is torch.float32 (1, 1, 31), not torch.float32 (1, 1, 32)",
        "mask_token is torch.float16 (1, 1, 32), not torch.float32 (1, 1, 32)",
    ):
        assert fault in str(refused.value)


def test_weights_of_another_shape_than_the_config_says_are_refused(folder: Path) -> None:
    edit(folder / "config.json", config=dataclasses.replace(TINY, num_layers=3).to_dict())
    with pytest.raises(WeightsError, match=r"missing blocks\.2\.norm1\.weight"):
        dinox_model.load(folder)


@pytest.mark.parametrize("place", [0, 100, -5])
def test_a_flipped_bit_in_the_weights_is_found(folder: Path, place: int) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[place] ^= 0x40
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        dinox_model.load(folder)


def test_cut_weights_are_found(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(WeightsError, match=r"model\.safetensors: damaged, or no safetensors file"):
        dinox_model.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": 0.4}, "not the file that config.json was written with"),
        ({"std": 0.0}, "std must be positive"),
        ({"gamma": 1.0}, "nothing else"),
        ({"version": 9}, "nothing else"),
        ({"depth": 3}, "depth is 3, and the network takes windows of 5 slices"),
        ({"step": 0}, "step must be a whole number"),
    ],
)
def test_another_preprocessing_is_refused(folder: Path, changes: dict, message: str) -> None:
    edit(folder / "preprocess.json", **changes)
    with pytest.raises(WeightsError, match=message):
        dinox_model.load(folder)


def test_facts_of_the_window_travel_and_may_be_missing(tmp_path: Path) -> None:
    model = dinox_model.build(TINY)
    model.preprocess = Preprocess(depth=5, step=2)
    dinox_model.save(model, tmp_path / "known")
    assert dinox_model.load(tmp_path / "known").preprocess == model.preprocess
    wider, _ = dinox_model.load_pretrained(tmp_path / "known", in_channels=7)
    assert wider.preprocess == Preprocess(step=2), "seven slices are no fact of the training"
    dinox_model.save_pretrained(model, tmp_path / "hf", format="hf")
    file = tmp_path / "hf" / "preprocess.json"
    assert dinox_model.load_pretrained(tmp_path / "hf")[0].preprocess == model.preprocess
    values = json.loads(file.read_text())
    file.write_text(
        json.dumps({name: value for name, value in values.items() if name not in ("depth", "step", "step_mm")})
    )
    assert dinox_model.load_pretrained(tmp_path / "hf")[0].preprocess == Preprocess(), "as older folders are"
