"""Hugging Face's layouts without Hugging Face's code: names, shapes, config.json, and what is refused.

tests/model/test_huggingface_parity.py compares with their code where it is installed.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import same_numbers
from safetensors.torch import load_file, save_file

import dinox_model
from dinox_model import Preprocess, ViTConfig, WeightsError, load_pretrained, save_pretrained
from dinox_model.convert.export import their_tensors
from dinox_model.convert.pair import ZEROS, Pair
from dinox_model.convert.source import FORMATS
from tests.model.foreign_weights import HIDDEN, LAYERS, REGISTERS, SMALL, WIDTH, perturbed

LEARNED = dataclasses.replace(
    SMALL, positions="learned", learned_grid=(3, 3), qkv_bias="full", mlp_hidden=4 * WIDTH, norm_eps=1e-6, patch_size=14
)


def dinov3_shapes(bias: str, gated: bool) -> dict[str, tuple]:
    """What transformers writes for a DINOv3ViTModel of `SMALL`'s size."""
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, 1, WIDTH),
        "embeddings.register_tokens": (1, REGISTERS, WIDTH),
        "embeddings.patch_embeddings.weight": (WIDTH, 3, 16, 16),
        "embeddings.patch_embeddings.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    biased = {"none": "", "full": "qkv", "k_masked": "qv"}[bias]
    for layer in (f"layer.{number}." for number in range(LAYERS)):
        shapes |= {f"{layer}attention.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        shapes |= {f"{layer}attention.{part}_proj.bias": (WIDTH,) for part in biased + "o"}
        shapes |= {f"{layer}{norm}.{part}": (WIDTH,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        shapes |= {f"{layer}layer_scale{i}.lambda1": (WIDTH,) for i in (1, 2)}
        for part in ("up", "gate") if gated else ("up",):
            shapes |= {f"{layer}mlp.{part}_proj.weight": (HIDDEN, WIDTH), f"{layer}mlp.{part}_proj.bias": (HIDDEN,)}
        shapes |= {f"{layer}mlp.down_proj.weight": (WIDTH, HIDDEN), f"{layer}mlp.down_proj.bias": (WIDTH,)}
    return shapes


def dinov2_shapes(swiglu: bool, hidden: int) -> dict[str, tuple]:
    """What transformers writes for a Dinov2WithRegistersModel of `LEARNED`'s size."""
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, WIDTH),
        "embeddings.register_tokens": (1, REGISTERS, WIDTH),
        "embeddings.position_embeddings": (1, 10, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    for layer in (f"encoder.layer.{number}." for number in range(LAYERS)):
        for part in ("query", "key", "value"):
            shapes[f"{layer}attention.attention.{part}.weight"] = (WIDTH, WIDTH)
            shapes[f"{layer}attention.attention.{part}.bias"] = (WIDTH,)
        shapes |= {
            f"{layer}attention.output.dense.weight": (WIDTH, WIDTH),
            f"{layer}attention.output.dense.bias": (WIDTH,),
        }
        shapes |= {f"{layer}{norm}.{part}": (WIDTH,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        shapes |= {f"{layer}layer_scale{i}.lambda1": (WIDTH,) for i in (1, 2)}
        up, down, rows = ("weights_in", "weights_out", 2 * hidden) if swiglu else ("fc1", "fc2", hidden)
        shapes |= {f"{layer}mlp.{up}.weight": (rows, WIDTH), f"{layer}mlp.{up}.bias": (rows,)}
        shapes |= {f"{layer}mlp.{down}.weight": (WIDTH, hidden), f"{layer}mlp.{down}.bias": (WIDTH,)}
    return shapes


@pytest.mark.parametrize("bias", ["none", "full", "k_masked"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "relu2", "geglu"])
def test_dinov3_there_and_back_is_bit_equal(tmp_path: Path, bias: str, mlp: str) -> None:
    config = ViTConfig.from_dict(
        SMALL.to_dict() | {"qkv_bias": bias, "mlp": mlp, "layer_scale": 0.5, "norm_eps": 1e-6, "rope_period": 50.0,
                           "drop_path": 0.1, "rope_jitter": 1.5, "rope_shift": 0.25, "in_channels": 3}
    )  # fmt: skip
    model = perturbed(config, seed=1)
    model.preprocess = Preprocess(level_hu=-500.5, width_hu=1500.0, mean=1 / 3, std=0.1)
    save_pretrained(model, tmp_path / "out", format="hf")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
        "preprocess.json",
        "README.md",
    }
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in found.items()} == dinov3_shapes(bias, mlp in ("swiglu", "geglu"))
    back, report = load_pretrained(tmp_path / "out")
    assert back.config == config
    assert back.preprocess == model.preprocess
    assert same_numbers(back, model)
    assert not report.ignored
    assert not report.notes


@pytest.mark.parametrize(("mlp", "hidden"), [("gelu", 128), ("relu2", 128), ("swiglu", 88)])
@pytest.mark.parametrize("bias", ["none", "full"])
def test_dinov2_there_and_back_is_bit_equal(tmp_path: Path, mlp: str, hidden: int, bias: str) -> None:
    config = ViTConfig.from_dict(LEARNED.to_dict() | {"mlp": mlp, "mlp_hidden": hidden, "qkv_bias": bias})
    model = perturbed(config, seed=1)
    save_pretrained(model, tmp_path / "out", format="hf")
    found = load_file(tmp_path / "out" / "model.safetensors")
    if bias == "full":
        assert {name: tuple(t.shape) for name, t in found.items()} == dinov2_shapes(mlp == "swiglu", hidden)
    back, report = load_pretrained(tmp_path / "out")
    assert back.config == config
    assert same_numbers(back, model)
    assert report.renamed["positions.embedding"] == ("embeddings.position_embeddings",)


def test_both_spellings_of_dinov3_are_read(tmp_path: Path) -> None:
    model = perturbed(SMALL)
    save_pretrained(model, tmp_path / "out", format="hf")
    file = tmp_path / "out" / "model.safetensors"
    tensors = {f"model.{n}" if n.startswith("layer.") else n: t for n, t in load_file(file).items()}
    save_file(tensors, file)
    back, report = load_pretrained(tmp_path / "out")
    assert same_numbers(back, model)
    assert report.renamed["blocks.0.gamma1"] == ("model.layer.0.layer_scale1.lambda1",)


def test_a_network_in_several_files_is_read(tmp_path: Path) -> None:
    model = perturbed(SMALL)
    save_pretrained(model, tmp_path / "out", format="hf")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for place in set(places.values()):
        save_file({n: tensors[n] for n in names if places[n] == place}, file.with_name(place))
    file.unlink()
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert same_numbers(load_pretrained(tmp_path / "out")[0], model)
    index.write_text(json.dumps({"weight_map": places | {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(WeightsError, match="must name files of its folder"):
        load_pretrained(tmp_path / "out")


@pytest.mark.parametrize("config", [SMALL, LEARNED])
def test_no_registers(tmp_path: Path, config: ViTConfig) -> None:
    model = perturbed(dataclasses.replace(config, num_registers=0))
    save_pretrained(model, tmp_path / "out", format="hf")
    assert load_file(tmp_path / "out" / "model.safetensors")["embeddings.register_tokens"].shape == (1, 0, WIDTH)
    assert same_numbers(load_pretrained(tmp_path / "out")[0], model)


def test_no_layer_scale_is_one_of_ones(tmp_path: Path) -> None:
    model = perturbed(dataclasses.replace(SMALL, layer_scale=None))
    save_pretrained(model, tmp_path / "out", format="hf")
    back, _ = load_pretrained(tmp_path / "out")
    assert back.config.layer_scale == 1.0
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(back(x).patches, model(x).patches)


@pytest.mark.parametrize(
    ("base", "changes", "option"),
    [
        (SMALL, {"norm": "rms"}, "norm: its norms are LayerNorms"),
        (SMALL, {"qk_norm": True}, "qk_norm"),
        (SMALL, {"cls_token": False}, "cls_token"),
        (SMALL, {"scale_conditioning": True}, "scale_conditioning"),
        (SMALL, {"positions": "rope_mm"}, "positions: it has axial rotary positions only, not rope_mm"),
        (SMALL, {"positions": "fourier"}, "positions"),
        (SMALL, {"untied_cls_norm": True}, r"cls_norm: it has one final norm.*allow cls_norm"),
        (LEARNED, {"qkv_bias": "k_masked"}, "qkv_bias"),
        (LEARNED, {"mlp": "geglu"}, "mlp: its gated MLP is SwiGLU"),
        (LEARNED, {"mlp_hidden": 100}, "mlp_hidden"),
        (LEARNED, {"learned_grid": (3, 4)}, "learned_grid"),
        (LEARNED, {"layer_scale": None}, "layer_scale"),
        (LEARNED, {"untied_cls_norm": True}, "cls_norm"),
    ],
)
def test_what_they_cannot_hold_is_refused_by_option(
    tmp_path: Path, base: ViTConfig, changes: dict, option: str
) -> None:
    model = dinox_model.build(ViTConfig.from_dict(base.to_dict() | changes))
    with pytest.raises(WeightsError, match=option):
        save_pretrained(model, tmp_path / "out", format="hf")
    assert not list(tmp_path.iterdir())


def test_the_norm_of_local_crops_is_dropped_when_asked(tmp_path: Path) -> None:
    model = perturbed(dataclasses.replace(SMALL, untied_cls_norm=True))
    save_pretrained(model, tmp_path / "out", format="hf", allow=("cls_norm",))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_pretrained(tmp_path / "out")[0](x).patches, model(x).patches)
    with pytest.raises(WeightsError, match=r"'norm' cannot be left out; what can be: cls_norm, rope\.periods"):
        save_pretrained(model, tmp_path / "other", format="hf", allow=("norm",))


def test_stored_periods_are_held_only_where_they_are_the_formulas(tmp_path: Path) -> None:
    model = perturbed(dataclasses.replace(SMALL, rope_stored_periods=True))
    save_pretrained(model, tmp_path / "same", format="hf")
    assert model.rope is not None
    assert model.rope.periods is not None
    model.rope.periods.copy_(model.rope.periods.bfloat16())
    with pytest.raises(WeightsError, match=r"rope\.periods.*allow rope\.periods"):
        save_pretrained(model, tmp_path / "other", format="hf")
    save_pretrained(model, tmp_path / "other", format="hf", allow=("rope.periods",))
    assert not load_pretrained(tmp_path / "other")[0].config.rope_stored_periods


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"hidden_size": "32"}, "hidden_size is '32', which is of the wrong type"),
        ({"hidden_size": True}, "hidden_size is True, which is of the wrong type"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is none of gelu.*did you mean 'gelu'"),
        ({"hidden_act": "silu"}, "use_gated_mlp with hidden_act is a combination"),
        ({"query_bias": False}, "query_bias, key_bias, value_bias is a combination"),
        ({"mlp_bias": False}, "mlp_bias is False; linears"),
        ({"patch_size": [16, 8]}, "patch_size must be one whole number"),
        ({"num_attention_heads": 3}, "width must be a multiple of 4 x num_heads"),
        ({"hidden_size": 64}, r"embeddings\.cls_token is \(1, 1, 32\), not \(1, 1, 64\)"),
        ({"num_hidden_layers": 3}, r"missing layer\.2\.norm1\.weight \(our blocks\.2\.norm1\.weight\)"),
        ({"num_hidden_layers": 1}, r"unknown layer\.1\."),
        ({"model_type": "dinov2"}, "model_type 'dinov2' is none that is read here"),
        ({"model_type": "dinov2_with_registers"}, "use_swiglu_ffn is missing"),
        ({"model_type": None}, "Hugging Face's networks need their config.json"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(tmp_path: Path, changes: dict, message: str) -> None:
    save_pretrained(perturbed(SMALL), tmp_path / "out", format="hf")
    file = tmp_path / "out" / "config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    with pytest.raises(WeightsError, match=message):
        load_pretrained(tmp_path / "out")


def test_what_the_files_say_cannot_be_given_otherwise(tmp_path: Path) -> None:
    save_pretrained(perturbed(SMALL), tmp_path / "out", format="hf")
    with pytest.raises(WeightsError, match="norm_eps is 1e-05 by its config"):
        load_pretrained(tmp_path / "out", norm_eps=1e-6)
    with pytest.raises(WeightsError, match="model_type 'dinov2_with_registers' was expected"):
        load_pretrained(tmp_path / "out", format="hf_dinov2")
    with pytest.raises(WeightsError, match=r"unknown format 'hf_dino3'.*did you mean 'hf_dinov3'"):
        load_pretrained(tmp_path / "out", format="hf_dino3")
    with pytest.raises(WeightsError, match="no such file or folder"):
        load_pretrained(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="exists already"):
        save_pretrained(perturbed(SMALL), tmp_path / "out", format="hf")
    with pytest.raises(WeightsError, match="unknown format 'onnx'"):
        save_pretrained(perturbed(SMALL), tmp_path / "new", format="onnx")


def test_damage_is_found(tmp_path: Path) -> None:
    save_pretrained(perturbed(SMALL), tmp_path / "out", format="hf")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(WeightsError, match=r"model\.safetensors: damaged"):
        load_pretrained(tmp_path / "out")


def test_without_preprocess_json_imagenets_numbers_are_taken_and_said(tmp_path: Path) -> None:
    save_pretrained(perturbed(SMALL), tmp_path / "out", format="hf")
    (tmp_path / "out" / "preprocess.json").unlink()
    model, report = load_pretrained(tmp_path / "out")
    assert model.preprocess == Preprocess(mean=0.449, std=0.226)
    assert any("ImageNet" in note for note in report.notes)


def test_our_own_folder_is_read_too(tmp_path: Path) -> None:
    model = perturbed(SMALL)
    save_pretrained(model, tmp_path / "net", format="dinox")
    back, report = load_pretrained(tmp_path / "net")
    assert same_numbers(back, model)
    assert same_numbers(dinox_model.load(tmp_path / "net"), model)
    assert set(report.matched) == set(model.state_dict())
    wider, report = load_pretrained(tmp_path / "net", in_channels=5)
    assert wider.config == dataclasses.replace(SMALL, in_channels=5)
    assert report.adapted == {"patch_embed.weight": "3 channels to 5 slices"}
    with pytest.raises(WeightsError, match="lacks nothing"):
        load_pretrained(tmp_path / "net", allow=("x",))
    with pytest.raises(WeightsError, match="a network of dinox_model; format 'hf_dinov3' was expected"):
        load_pretrained(tmp_path / "net", format="hf_dinov3")
    save_pretrained(model, tmp_path / "hf", format="hf")
    with pytest.raises(WeightsError, match="no folder whose config"):
        load_pretrained(tmp_path / "hf", format="dinox")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("preset", ["vit_s", "vit_g", "vit_7b"])
def test_presets_are_held_by_dinov3s_formats(name: str, preset: str) -> None:
    with torch.device("meta"):
        model = dinox_model.build(preset)
    faults = FORMATS[name].cannot_hold(model.config)
    assert bool(faults) == (name in ("hf_dinov2", "meddinov3"))
    if faults:
        return
    numbers = {n for pair in FORMATS[name].pairs(model.config) for n in pair.names}
    assert numbers == set(model.state_dict())


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 3), st.booleans(), st.integers(0, 2))
def test_a_pair_keeps_every_number(sizes: list[int], cut: int, zeros: bool, place: int) -> None:
    """Whatever is joined and cut: read(write(x)) is x."""
    ours = [f"ours{i}" for i in range(len(sizes))]
    shapes = {name: (cut * size, 2) for name, size in zip(ours, sizes, strict=True)}
    rows = cut * sum(sizes)
    joined = list(ours)
    if zeros:
        joined.insert(min(place, len(joined)), ZEROS)
        rows += cut * 2
    pair = Pair(tuple(joined), tuple(f"theirs{i}" for i in range(cut)), (rows // cut, 2, 1))
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    written = pair.write(tensors)
    assert all(tensor.shape == pair.shape for tensor in written.values())
    back = pair.read(written, shapes)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_only_float32_is_exported(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"bfloat16.*model\.float\(\)"):
        their_tensors(perturbed(SMALL).bfloat16(), FORMATS["hf_dinov3"])
