"""Attention: against a plain reference with an explicit softmax, in all kinds of bias, norm and position."""

import dataclasses
import math

import pytest
import torch

from dinox_model import ViTConfig
from dinox_model.attention import Attention
from dinox_model.positions import RotaryPositions, Rotations, rotate

CONFIG = ViTConfig(width=48, num_layers=1, num_heads=3, mlp_hidden=8)
GRID = (3, 4)
NUM_TOKENS = CONFIG.num_prefix_tokens + GRID[0] * GRID[1]
NUM_IMAGES = 2
VARIANTS = [
    CONFIG,
    dataclasses.replace(CONFIG, qkv_bias="none"),
    dataclasses.replace(CONFIG, qkv_bias="full"),
    dataclasses.replace(CONFIG, qk_norm=True),
    dataclasses.replace(CONFIG, qk_norm=True, norm="rms", positions="rope_mm"),
    dataclasses.replace(CONFIG, positions="rope_mm"),
    dataclasses.replace(CONFIG, positions="fourier", qk_norm=True),
]


def random_attention(config: ViTConfig) -> Attention:
    attention = Attention(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return attention


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(NUM_IMAGES, NUM_TOKENS, CONFIG.width, generator=torch.Generator().manual_seed(seed))


def rotations_of(config: ViTConfig) -> Rotations | None:
    mm = torch.tensor([[0.5, 0.7], [1.5, 2.0]]) if config.positions == "rope_mm" else None
    return RotaryPositions(config)(GRID, mm_per_pixel=mm) if config.is_rotary else None


def normed(norm: torch.nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    if norm is None:
        return x
    centred = x - x.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else x
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return unit * norm.weight + (norm.bias if isinstance(norm, torch.nn.LayerNorm) else 0.0)


def reference(config: ViTConfig, attention: Attention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One image, one head, one query at a time: what comes out, and the softmax weights (b, a, t, t)."""
    by, size, d = rotations_of(config), config.head_width, config.width
    zero = torch.zeros(d)
    if attention.qkv.bias is not None:
        biases = list(attention.qkv.bias.split(d))
    elif attention.q_bias is not None and attention.v_bias is not None:
        biases = [attention.q_bias, zero, attention.v_bias]
    else:
        biases = [zero, zero, zero]
    out, maps = torch.empty_like(x), torch.empty(NUM_IMAGES, config.num_heads, NUM_TOKENS, NUM_TOKENS)
    for image in range(NUM_IMAGES):
        q, k, v = (x[image] @ w.T + b for w, b in zip(attention.qkv.weight.split(d), biases, strict=True))
        for head in range(config.num_heads):
            part = slice(head * size, (head + 1) * size)
            query, key = normed(attention.q_norm, q[:, part]), normed(attention.k_norm, k[:, part])
            if by is not None:
                own = by if by.cos.ndim == 2 else Rotations(by.cos[image, 0], by.sin[image, 0])
                query, key = rotate(query, own), rotate(key, own)
            for token in range(NUM_TOKENS):
                logits = key @ query[token] / math.sqrt(size)
                weights = torch.exp(logits - logits.max())
                maps[image, head, token] = weights / weights.sum()
                out[image, token, part] = maps[image, head, token] @ v[:, part]
    return attention.projection(out), maps


@pytest.mark.parametrize("config", VARIANTS)
def test_attention_and_its_maps_are_the_reference(config: ViTConfig) -> None:
    attention, x, by = random_attention(config), inputs(1), rotations_of(config)
    with torch.no_grad():
        out, maps = reference(config, attention, x)
        torch.testing.assert_close(attention(x, by), out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(attention.maps(x, by), maps, atol=1e-5, rtol=1e-5)


def test_the_reference_tells_the_variants_apart() -> None:
    outs = [reference(config, random_attention(VARIANTS[0]), inputs(1))[0] for config in (VARIANTS[0], VARIANTS[5])]
    assert (outs[0] - outs[1]).abs().max() > 1e-2


def test_k_masked_is_full_with_a_zero_key_bias_and_a_key_bias_changes_nothing() -> None:
    masked, full = random_attention(CONFIG), random_attention(dataclasses.replace(CONFIG, qkv_bias="full"))
    x, by = inputs(2), rotations_of(CONFIG)
    full.qkv.load_state_dict({"weight": masked.qkv.weight, "bias": torch.zeros(3 * CONFIG.width)})
    full.projection.load_state_dict(masked.projection.state_dict())
    assert full.qkv.bias is not None
    assert masked.q_bias is not None
    assert masked.v_bias is not None
    with torch.no_grad():
        full.qkv.bias[: CONFIG.width].copy_(masked.q_bias)
        full.qkv.bias[2 * CONFIG.width :].copy_(masked.v_bias)
        torch.testing.assert_close(masked(x, by), full(x, by), atol=1e-6, rtol=1e-6)
        # Without rotation the softmax does not see it at all; the bias of keys is what k_masked leaves out.
        without = full(x, None)
        full.qkv.bias[CONFIG.width : 2 * CONFIG.width] += 0.5
        torch.testing.assert_close(full(x, None), without, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", VARIANTS)
def test_gradients_reach_every_weight(config: ViTConfig) -> None:
    attention = random_attention(config)
    attention(inputs(3), rotations_of(config)).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        if name != "k_norm.bias" or config.is_rotary:  # without rotation a softmax does not see a key's bias
            assert parameter.grad.abs().max() > 1e-4, name


@pytest.mark.parametrize("config", VARIANTS)
def test_gradients_are_those_of_finite_differences(config: ViTConfig) -> None:
    attention = random_attention(config).double()
    by = rotations_of(config)
    wide = None if by is None else Rotations(by.cos.double(), by.sin.double())
    x = 0.5 * inputs(4)[:, :3].double()
    narrow = None if wide is None else Rotations(wide.cos[..., -3:, :], wide.sin[..., -3:, :])

    def run(x: torch.Tensor) -> torch.Tensor:
        return attention(x, narrow)[..., :4]

    assert torch.autograd.gradcheck(run, x.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bf16_tokens_stay_bf16_and_the_rotation_is_fp32(qk_norm: bool) -> None:
    attention = random_attention(dataclasses.replace(CONFIG, qk_norm=qk_norm))
    x, by = inputs(5), rotations_of(CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        query, key, value = attention.queries_keys_values(x, by)
        out = attention(x, by)
    assert query.dtype == key.dtype == value.dtype == out.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(out.float(), attention(x, by), atol=0.1, rtol=0.1)
