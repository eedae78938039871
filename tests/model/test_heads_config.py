"""Heads by config: round trips, errors that name the nearest, first weights of every kind."""

import dataclasses
import json

import pytest
import torch

from dinox_model import ViTConfig, ViTFeatures
from dinox_model.heads import (
    HEAD_CONFIGS,
    AttentivePoolHeadConfig,
    CrossAttentionDecoderConfig,
    HeadConfig,
    LinearHeadConfig,
    PrototypeHead,
    PrototypeHeadConfig,
    TransposedConvolutionDecoderConfig,
    UpsamplingDecoderConfig,
    head_config,
)

NETWORK = ViTConfig(width=32, num_layers=1, num_heads=2, mlp_hidden=8, patch_size=4)
GRID = (3, 2)
CONFIGS: list[HeadConfig] = [
    PrototypeHeadConfig(hidden=16, bottleneck=8, prototypes=24),
    LinearHeadConfig(out_features=3),
    LinearHeadConfig(out_features=3, features="both"),
    AttentivePoolHeadConfig(out_features=3, num_queries=2, num_heads=4),
    TransposedConvolutionDecoderConfig(classes=3, hidden=24),
    UpsamplingDecoderConfig(classes=3, hidden=24),
    UpsamplingDecoderConfig(classes=3, num_stages=0),
    CrossAttentionDecoderConfig(out_features=3, num_queries=5),
    CrossAttentionDecoderConfig(out_features=3, num_queries=5, width=24, num_heads=3, layer_scale=0.1, num_layers=1),
]
NAMES = [f"{config.kind}{index}" for index, config in enumerate(CONFIGS)]


def features(num_images: int = 2, *, cls: bool = True) -> ViTFeatures:
    generator = torch.Generator().manual_seed(0)
    registers = torch.randn(num_images, 4, NETWORK.width, generator=generator)
    patches = torch.randn(num_images, GRID[0] * GRID[1], NETWORK.width, generator=generator)
    return ViTFeatures(registers[:, 0] if cls else None, registers, patches, GRID)


def input_of(config: HeadConfig) -> torch.Tensor | ViTFeatures:
    return features().patches if isinstance(config, PrototypeHeadConfig) else features()


def test_every_kind_is_tried() -> None:
    assert {type(config) for config in CONFIGS} == set(HEAD_CONFIGS.values())
    assert {config.kind for config in CONFIGS} == set(HEAD_CONFIGS)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_configs_round_trip_through_json(config: HeadConfig) -> None:
    assert head_config(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_first_weights_are_a_function_of_the_seed_alone(config: HeadConfig) -> None:
    before = torch.get_rng_state()
    one, same, other = (config.build(NETWORK, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_initialise_fills_everything(config: HeadConfig) -> None:
    head = config.build(NETWORK)
    expected = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    with torch.no_grad():
        for tensor in head.state_dict().values():
            tensor.fill_(torch.nan)
    head.initialise(torch.Generator().manual_seed(0))
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_every_parameter_is_used(config: HeadConfig) -> None:
    head = config.build(NETWORK)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    head(input_of(config)).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_on_the_meta_device_they_have_no_memory(config: HeadConfig) -> None:
    with torch.device("meta"):
        head = config.build(NETWORK)
    assert all(parameter.is_meta for parameter in head.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_images_do_not_see_each_other(config: HeadConfig) -> None:
    if isinstance(config, PrototypeHeadConfig):
        return
    head, both = config.build(NETWORK), features()
    assert both.cls is not None
    alone = ViTFeatures(both.cls[1:], both.registers[1:], both.patches[1:], GRID)
    torch.testing.assert_close(head(both)[1:], head(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_a_network_without_cls_has_heads_too(config: HeadConfig) -> None:
    network = dataclasses.replace(NETWORK, cls_token=False)
    if config == LinearHeadConfig(out_features=3, features="both"):
        with pytest.raises(ValueError, match="needs a network with a CLS token; use patch_mean"):
            config.build(network)
    elif not isinstance(config, PrototypeHeadConfig):
        assert config.build(network)(features(cls=False)).isfinite().all()


def test_the_prototype_config_builds_the_prototype_head() -> None:
    built = PrototypeHeadConfig(hidden=16, bottleneck=8, prototypes=24).build(NETWORK, seed=5)
    expected = PrototypeHead(NETWORK.width, 16, 8, 24, seed=5).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in built.state_dict().items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "linaer", "out_features": 2}, "unknown kind of head 'linaer'; did you mean 'linear'"),
        ({"kind": "linear", "out_featurs": 2}, "did you mean 'out_features'"),
        ({"kind": "linear"}, "needs out_features too"),
        ({"kind": "linear", "out_features": 0}, "out_features must be at least 1"),
        ({"kind": "linear", "out_features": 2.0}, "out_features must be of type int"),
        ({"kind": "linear", "out_features": 2, "features": "pooling"}, "did you mean 'pooled'"),
        ({"kind": "upsampling", "classes": 2, "num_stages": -1}, "num_stages must be at least 0"),
        ({"out_features": 2}, "a head needs kind, one of prototype, linear"),
        ({"kind": 3}, "a head needs kind"),
        ([], "a head needs kind"),
    ],
)
def test_errors_say_what_and_name_the_nearest(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_config(values)


def test_a_masked_patch_of_a_fresh_network_does_not_drown_the_gradient() -> None:
    """Its bottleneck is 1e-4 long, or 0: divided by that, one such patch would outweigh a million others."""
    head = PrototypeHead(16, 32, 8, 12)
    for length in (0.0, 1e-6, 1.0):
        features = (length * torch.nn.functional.normalize(torch.ones(1, 16))).requires_grad_()
        head(features).square().sum().backward()
        assert features.grad is not None
        assert features.grad.norm() < 1.0
