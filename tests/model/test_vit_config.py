"""Shapes: parameter counts of the presets, and what a `ViTConfig` refuses."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dinox_model
from dinox_model import PRESETS, ViTConfig

TINY = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64)


def count(config: ViTConfig) -> int:
    """Parameters by the formula, from the shape alone."""
    d, hidden = config.width, config.mlp_hidden
    bias = {"none": 0, "full": 3 * d, "k_masked": 2 * d}[config.qkv_bias]
    attention = 3 * d * d + bias + d * d + d
    mlp = 3 * d * hidden + 2 * hidden + d if config.mlp == "swiglu" else 2 * d * hidden + hidden + d
    block = attention + mlp + 2 * 2 * d + 2 * d  # two norms, two LayerScales
    embedding = config.in_channels * config.patch_size**2 * d + d
    tokens = (1 + config.num_registers + 1) * d  # CLS, registers, mask
    return embedding + tokens + config.num_layers * block + 2 * d


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


configs = st.builds(
    lambda head, heads, **others: ViTConfig(width=4 * head * heads, num_heads=heads, **others),
    head=st.integers(1, 4),
    heads=st.integers(1, 4),
    num_layers=st.integers(1, 3),
    mlp_hidden=st.integers(1, 40),
    mlp=st.sampled_from(["gelu", "swiglu"]),
    qkv_bias=st.sampled_from(["none", "full", "k_masked"]),
    in_channels=st.integers(1, 5),
    patch_size=st.integers(1, 20),
    num_registers=st.integers(0, 6),
)


@given(configs)
def test_any_config_has_the_parameters_of_the_formula_and_survives_a_dict(config: ViTConfig) -> None:
    assert built_count(config) == count(config)
    assert ViTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 36}, "multiple of 4 x num_heads"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"num_registers": -1}, "num_registers must not be negative"),
        ({"mlp": "relu"}, "mlp must be one of gelu, swiglu, not 'relu'"),
        ({"qkv_bias": True}, "qkv_bias must be of type str, not True"),
        ({"num_layers": 2.0}, "num_layers must be of type int, not 2.0"),
        ({"num_layers": True}, "num_layers must be of type int, not True"),
        ({"layer_scale": float("nan")}, "layer_scale must be finite"),
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


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.width = 64  # pyright: ignore[reportAttributeAccessIssue]


def test_an_unknown_preset_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown preset 'vit_small'; did you mean 'vit_"):
        dinox_model.build("vit_small")
