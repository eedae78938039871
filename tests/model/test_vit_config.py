"""Shapes: parameter counts of presets and options, what a `ViTConfig` refuses, and its ways into and out of text."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dinox_model
from dinox_model import PRESETS, ViTConfig

TINY = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64)


def count(config: ViTConfig) -> int:
    """Parameters by the formula, from the shape alone."""
    d, hidden = config.width, config.mlp_hidden
    bias = {"none": 0, "full": 3 * d, "k_masked": 2 * d}[config.qkv_bias]
    norm = 2 if config.norm == "layer" else 1  # of each feature: weight and bias, or weight
    attention = 3 * d * d + bias + d * d + d + config.qk_norm * 2 * norm * (d // config.num_heads)
    gated = config.mlp in ("swiglu", "geglu")
    mlp = 3 * d * hidden + 2 * hidden + d if gated else 2 * d * hidden + hidden + d
    scales = 0 if config.layer_scale is None else 2 * d
    block = attention + mlp + 2 * norm * d + scales
    embedding = config.in_channels * config.patch_size**2 * d + d
    tokens = (config.cls_token + config.num_registers + 1) * d  # CLS, registers, mask
    final = (1 + config.untied_cls_norm) * norm * d
    learned = (config.cls_token + math.prod(config.learned_grid)) * d if config.learned_grid else 0
    scale = 16 * 64 + 64 + 64 * d + d if config.scale_conditioning else 0  # 4 waves, sine and cosine, y and x
    return embedding + tokens + config.num_layers * block + final + learned + scale


def built_count(config: ViTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in dinox_model.build(config).parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_ti", 5_489_856),
        ("vit_s", 21_596_544),
        ("vit_b", 85_660_416),
        ("vit_l", 303_129_600),
        ("vit_h", 840_592_640),
        ("vit_g", 1_134_597_632),
        ("vit_7b", 6_716_362_752),
    ],
)
def test_presets_have_exactly_these_parameters(name: str, parameters: int) -> None:
    assert count(PRESETS[name]) == parameters
    assert built_count(PRESETS[name]) == parameters


def test_every_preset_is_one_of_dinov3s() -> None:
    assert set(PRESETS) == {"vit_ti", "vit_s", "vit_b", "vit_l", "vit_h", "vit_g", "vit_7b"}
    for config in PRESETS.values():
        assert (config.patch_size, config.num_registers, config.qkv_bias) == (16, 4, "k_masked")
        assert config.layer_scale == 1e-5
        assert config.head_width in (64, 128)
        plain = dataclasses.replace(TINY, mlp=config.mlp)
        shape = {name: getattr(TINY, name) for name in ("width", "num_layers", "num_heads", "mlp_hidden")}
        assert dataclasses.replace(config, **shape) == plain, "every option is off"


def config_of(head: int, heads: int, positions: str, grid: tuple[int, int], **others) -> ViTConfig:
    if positions not in ("rope", "rope_mm"):
        others = {name: value for name, value in others.items() if not name.startswith("rope_")}
    if not others["cls_token"] and not others["num_registers"]:
        others["untied_cls_norm"] = False
    learned_grid = grid if positions == "learned" else None
    return ViTConfig(width=4 * head * heads, num_heads=heads, positions=positions, learned_grid=learned_grid, **others)


configs = st.builds(
    config_of,
    head=st.integers(1, 4),
    heads=st.integers(1, 4),
    num_layers=st.integers(1, 3),
    mlp_hidden=st.integers(1, 40),
    mlp=st.sampled_from(["gelu", "swiglu", "relu2", "geglu"]),
    norm=st.sampled_from(["layer", "rms"]),
    norm_eps=st.floats(1e-12, 1.0),
    qk_norm=st.booleans(),
    qkv_bias=st.sampled_from(["none", "full", "k_masked"]),
    layer_scale=st.none() | st.floats(-1e6, 1e6),
    zero_init_residuals=st.booleans(),
    drop_path=st.floats(0.0, 1.0, exclude_max=True),
    in_channels=st.integers(1, 5),
    patch_size=st.integers(1, 20),
    cls_token=st.booleans(),
    num_registers=st.integers(0, 6),
    untied_cls_norm=st.booleans(),
    positions=st.sampled_from(["rope", "rope_mm", "learned", "fourier"]),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rope_shift=st.none() | st.floats(0.0, 1.0, exclude_min=True),
    rope_jitter=st.none() | st.floats(1.0, 3.0, exclude_min=True),
    rope_rescale=st.none() | st.floats(1.0, 3.0, exclude_min=True),
    rope_stored_periods=st.booleans(),
    scale_conditioning=st.booleans(),
)


@settings(max_examples=60)
@given(configs)
def test_any_config_has_the_parameters_of_the_formula(config: ViTConfig) -> None:
    assert built_count(config) == count(config)


@settings(max_examples=40)
@given(configs)
def test_any_config_survives_json_and_yaml(config: ViTConfig) -> None:
    assert ViTConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
    assert ViTConfig.from_yaml(config.to_yaml()) == config


def test_what_was_saved_before_there_were_options_is_read_as_what_it_was() -> None:
    saved = {"width": 384, "num_layers": 12, "num_heads": 6, "mlp_hidden": 1536, "mlp": "gelu", "qkv_bias": "k_masked"}
    saved |= {"in_channels": 3, "patch_size": 16, "num_registers": 4, "layer_scale": 1e-05}
    assert ViTConfig.from_dict(saved) == PRESETS["vit_s"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 36}, "multiple of 4 x num_heads"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"num_registers": -1}, "num_registers must be at least 0, not -1"),
        ({"mlp": "swigul"}, "mlp must be one of gelu, swiglu, relu2, geglu, not 'swigul'; did you mean 'swiglu'"),
        ({"qkv_bias": True}, "qkv_bias must be one of none, full, k_masked, not True"),
        ({"num_layers": 2.0}, "num_layers must be of type int, not 2.0"),
        ({"num_layers": True}, "num_layers must be of type int, not True"),
        ({"layer_scale": float("nan")}, "layer_scale must be finite"),
        ({"layer_scale": "1e-5"}, "layer_scale must be of type float, not '1e-5'"),
        ({"norm_eps": 0.0}, "norm_eps must be more than 0, not 0.0"),
        ({"drop_path": 1.0}, "drop_path must be less than 1, not 1.0"),
        ({"drop_path": -0.1}, "drop_path must be at least 0"),
        ({"cls_token": 1}, "cls_token must be of type bool, not 1"),
        ({"rope_jitter": 1.0}, "rope_jitter must be more than 1"),
        ({"rope_period": 0.5}, "rope_period must be at least 1"),
        ({"positions": "fourier", "rope_shift": 0.1}, "rope_shift is for positions rope or rope_mm, not fourier"),
        ({"positions": "fourier", "rope_stored_periods": True}, "rope_stored_periods is for positions rope"),
        ({"positions": "fourier", "rope_period": 50.0}, "rope_period is for positions rope"),
        ({"positions": "fourier", "width": 34}, "multiple of 4 for fourier"),
        ({"positions": "fourier", "width": 33}, "33 must be a multiple of num_heads 2"),
        ({"positions": "learned"}, "learned_grid belongs to positions learned, and only to them; it is None"),
        ({"learned_grid": (2, 2)}, r"learned_grid belongs to positions learned.* it is \(2, 2\) with positions rope"),
        ({"positions": "learned", "learned_grid": (2, 0)}, "learned_grid must be 2 values, each int .minimum 1."),
        ({"positions": "learned", "learned_grid": (2, 2, 2)}, "learned_grid must be 2 values"),
        ({"untied_cls_norm": True, "cls_token": False, "num_registers": 0}, "untied_cls_norm needs a CLS token"),
    ],
)
def test_nonsense_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown key 'num_layer' of a ViTConfig; did you mean 'num_layers'"):
        ViTConfig.from_dict({**TINY.to_dict(), "num_layer": 3})


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match="needs width, mlp_hidden"):
        ViTConfig.from_dict({"num_layers": 2, "num_heads": 2})


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a ViTConfig is made of keys and values, not of \[1\]"):
        ViTConfig.from_dict([1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width: [", "not valid YAML"),
        ("- width", "must hold keys and values"),
        ("", "must hold keys and values"),
        ("width: 32\nwidth: 64", "key 'width' stands twice"),
        ("width: !!python/object:os.system x", "not valid YAML"),
        ("widht: 32", "unknown key 'widht' of a ViTConfig; did you mean 'width'"),
    ],
)
def test_other_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig.from_yaml(text)


def test_numbers_in_yaml_are_numbers() -> None:
    text = "width: 32\nnum_layers: 2\nnum_heads: 2\nmlp_hidden: 64\nnorm_eps: 1e-6\nlayer_scale: null"
    assert ViTConfig.from_yaml(text) == dataclasses.replace(TINY, norm_eps=1e-6, layer_scale=None)


def test_the_schema_says_what_from_dict_takes() -> None:
    schema, values = ViTConfig.schema(), TINY.to_dict()
    assert list(schema["properties"]) == list(values)
    assert schema["required"] == ["width", "num_layers", "num_heads", "mlp_hidden"]
    assert schema["additionalProperties"] is False
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema
    for name, rule in schema["properties"].items():
        assert rule["description"], name
        assert rule.get("default", values[name]) == values[name], name
        for choice in rule.get("enum", ()):
            grid = [2, 2] if choice == "learned" else None
            ViTConfig.from_dict({**values, name: choice, "learned_grid": grid})
    assert schema["properties"]["norm"]["enum"] == ["layer", "rms"]
    grid = schema["properties"]["learned_grid"]["anyOf"]
    side = {"type": "integer", "minimum": 1, "maximum": 2**16}
    assert grid[0] == {"type": "array", "prefixItems": [side] * 2, "items": False, "minItems": 2, "maxItems": 2}
    assert grid[1] == {"type": "null"}


def test_the_schemas_limits_are_those_of_the_config() -> None:
    limits = 0
    for name, rule in ViTConfig.schema()["properties"].items():
        rules = rule.get("anyOf", [rule])
        for word, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0), ("exclusiveMaximum", 0)):
            for limited in (one for one in rules if word in one):
                number = {"integer": int, "number": float}[limited["type"]](limited[word] + step)
                with pytest.raises(ValueError, match=f"ViTConfig.{name} must be"):
                    dataclasses.replace(TINY, **{name: number})
                limits += 1
    assert limits == 21


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.width = 64  # pyright: ignore[reportAttributeAccessIssue]


def test_an_unknown_preset_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown preset 'vit_small'; did you mean 'vit_"):
        dinox_model.build("vit_small")
