"""First weights: every parameter has some, of the kind that it should have, and today's stay what they are."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

import dinox_model
from dinox_model import PRESETS, ViTConfig

TINY = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64, layer_scale=0.5)
OPTIONS = {
    "mlp": ("gelu", "swiglu", "relu2", "geglu"),
    "norm": ("layer", "rms"),
    "qk_norm": (False, True),
    "qkv_bias": ("none", "full", "k_masked"),
    "layer_scale": (0.5, None),
    "zero_init_residuals": (False, True),
    "cls_token": (True, False),
    "num_registers": (4, 0),
    "untied_cls_norm": (False, True),
    "scale_conditioning": (False, True),
}
POSITIONS = (
    {},
    {"positions": "rope_mm", "rope_stored_periods": True},
    {"rope_stored_periods": True, "rope_period": 30.0},
    {"positions": "learned", "learned_grid": (2, 3)},
    {"positions": "fourier"},
)


def every_pair_of_options() -> list[ViTConfig]:
    """Configs in which any two values of two options meet somewhere."""
    changes: list[dict] = []
    for one, other in itertools.combinations(OPTIONS, 2):
        changes += [{one: a, other: b} for a in OPTIONS[one] for b in OPTIONS[other]]
    changes += [{name: value, **position} for name in OPTIONS for value in OPTIONS[name] for position in POSITIONS]
    without = {"cls_token": False, "num_registers": 0, "untied_cls_norm": True}
    return [dataclasses.replace(TINY, **change) for change in changes if not without.items() <= change.items()]


def test_initialise_fills_every_parameter_and_buffer_in_all_options() -> None:
    configs = {config.to_yaml(): config for config in every_pair_of_options()}.values()
    assert len(configs) > 140
    for config in configs:
        model = dinox_model.build(config)
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert len(expected) == len(list(model.parameters())) + len(list(model.buffers()))
        with torch.no_grad():
            for tensor in itertools.chain(model.parameters(), model.buffers()):
                tensor.fill_(torch.nan)
        model.initialise(torch.Generator().manual_seed(0))
        for name, tensor in model.state_dict().items():
            assert tensor.isfinite().all(), (name, config)
            assert torch.equal(tensor, expected[name]), (name, config)


def test_first_weights_are_as_dinov3s() -> None:
    weights = dinox_model.build("vit_ti").state_dict()
    for name, tensor in weights.items():
        if name == "patch_embed.weight":
            assert tensor.abs().max() <= 768**-0.5
            assert abs(tensor.std().item() - (3 * 768) ** -0.5) < 1e-3
        elif name in ("cls_token", "register_tokens"):
            assert 0.015 < tensor.std() < 0.025, name
        elif "gamma" in name:
            assert (tensor == 1e-5).all(), name
        elif "norm" in name and name.endswith("weight"):
            assert (tensor == 1).all(), name
        elif name.endswith("weight"):
            assert abs(tensor.std().item() - 0.02) < 5e-4, name
        elif name != "patch_embed.bias":
            assert not tensor.any(), name


def expected_draws(config: ViTConfig, seed: int) -> dict[str, Tensor]:
    """What is drawn for a preset, in the order in which it always was, so that a run begins alike in later versions."""
    generator = torch.Generator().manual_seed(seed)
    d, hidden, inputs = config.width, config.mlp_hidden, config.in_channels * config.patch_size**2
    drawn = {}
    for name, shape in (("weight", (d, inputs)), ("bias", (d,))):
        drawn[f"patch_embed.{name}"] = nn.init.uniform_(
            torch.empty(shape), -(inputs**-0.5), inputs**-0.5, generator=generator
        )
    linears = {"attention.qkv": (3 * d, d), "attention.projection": (d, d)}
    linears |= {"mlp.gate": (hidden, d)} if config.mlp == "swiglu" else {}
    linears |= {"mlp.up": (hidden, d), "mlp.down": (d, hidden)}
    for block in range(config.num_layers):
        for name, shape in linears.items():
            weight = nn.init.trunc_normal_(torch.empty(shape), std=0.02, generator=generator)
            drawn[f"blocks.{block}.{name}.weight"] = weight
    drawn["cls_token"] = nn.init.normal_(torch.empty(1, 1, d), std=0.02, generator=generator)
    drawn["register_tokens"] = nn.init.normal_(torch.empty(1, config.num_registers, d), std=0.02, generator=generator)
    return drawn


@pytest.mark.parametrize("config", [PRESETS["vit_ti"], TINY, dataclasses.replace(TINY, mlp="swiglu")])
def test_the_draws_of_presets_stay_what_they_are(config: ViTConfig) -> None:
    weights = dinox_model.build(config, seed=3).state_dict()
    for name, tensor in expected_draws(config, seed=3).items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": True},
        {"norm": "rms"},
        {"layer_scale": None},
        {"zero_init_residuals": True},
        {"untied_cls_norm": True},
        {"positions": "learned", "learned_grid": (2, 2)},
        {"scale_conditioning": True},
        {"rope_stored_periods": True},
        {"num_registers": 2},
    ],
)
def test_an_option_leaves_the_draws_of_other_weights_alone(change: dict) -> None:
    plain = dinox_model.build(TINY).state_dict()
    zeroed = ("projection.weight", "down.weight") if "zero_init_residuals" in change else ()
    for name, tensor in dinox_model.build(dataclasses.replace(TINY, **change)).state_dict().items():
        if name in plain and plain[name].shape == tensor.shape and not name.endswith(zeroed or ("?",)):
            assert torch.equal(tensor, plain[name]), name
        elif name.endswith(zeroed or ("?",)):
            assert not tensor.any(), name


def test_stored_periods_begin_as_the_formulas() -> None:
    model = dinox_model.build(dataclasses.replace(TINY, rope_stored_periods=True))
    expected = torch.tensor([100.0 ** (j / 4) for j in range(4)])
    torch.testing.assert_close(model.state_dict()["rope.periods"], expected)
