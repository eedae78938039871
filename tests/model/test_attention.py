"""Attention: against a plain reference with an explicit softmax, and the three kinds of bias."""

import dataclasses
import math

import pytest
import torch

from dinox_model import ViTConfig
from dinox_model.attention import Attention
from dinox_model.positions import rotate, rotations

CONFIG = ViTConfig(width=48, num_layers=1, num_heads=3, mlp_hidden=8)
GRID = (3, 4)
NUM_TOKENS = CONFIG.num_prefix_tokens + GRID[0] * GRID[1]


def random_attention(qkv_bias: str) -> Attention:
    attention = Attention(dataclasses.replace(CONFIG, qkv_bias=qkv_bias))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return attention


def reference(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """One image, one head, one query at a time."""
    size = CONFIG.head_width
    by = rotations(GRID, size, CONFIG.num_prefix_tokens)
    d = CONFIG.width
    zero = torch.zeros(d)
    if attention.qkv.bias is not None:
        biases = list(attention.qkv.bias.split(d))
    elif attention.q_bias is not None and attention.v_bias is not None:
        biases = [attention.q_bias, zero, attention.v_bias]
    else:
        biases = [zero, zero, zero]
    out = torch.empty_like(x)
    for image in range(len(x)):
        q, k, v = (x[image] @ w.T + b for w, b in zip(attention.qkv.weight.split(d), biases, strict=True))
        for head in range(CONFIG.num_heads):
            part = slice(head * size, (head + 1) * size)
            query, key = rotate(q[:, part], by), rotate(k[:, part], by)
            for token in range(NUM_TOKENS):
                logits = key @ query[token] / math.sqrt(size)
                weights = torch.exp(logits - logits.max())
                out[image, token, part] = weights / weights.sum() @ v[:, part]
    return attention.projection(out)


@pytest.mark.parametrize("qkv_bias", ["none", "full", "k_masked"])
def test_attention_is_the_reference(qkv_bias: str) -> None:
    attention = random_attention(qkv_bias)
    x = torch.randn(2, NUM_TOKENS, CONFIG.width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = attention(x, rotations(GRID, CONFIG.head_width, CONFIG.num_prefix_tokens))
        torch.testing.assert_close(found, reference(attention, x), atol=1e-5, rtol=1e-5)


def test_k_masked_is_full_with_a_zero_key_bias_and_keys_without_one_differ() -> None:
    masked, full = random_attention("k_masked"), random_attention("full")
    x = torch.randn(2, NUM_TOKENS, CONFIG.width, generator=torch.Generator().manual_seed(2))
    by = rotations(GRID, CONFIG.head_width, CONFIG.num_prefix_tokens)
    assert masked.q_bias is not None
    assert masked.v_bias is not None
    with torch.no_grad():
        full.qkv.weight.copy_(masked.qkv.weight)
        full.projection.load_state_dict(masked.projection.state_dict())
        full.qkv.bias.copy_(torch.cat((masked.q_bias, torch.zeros(CONFIG.width), masked.v_bias)))
        assert torch.equal(full(x, by), masked(x, by))
        full.qkv.bias[CONFIG.width : 2 * CONFIG.width] = 1.0
        assert (full(x, by) - masked(x, by)).abs().max() > 1e-2, "with rotated keys a key bias has an effect"


def test_biases_get_gradients() -> None:
    attention = random_attention("k_masked")
    x = torch.randn(1, NUM_TOKENS, CONFIG.width, generator=torch.Generator().manual_seed(3))
    attention(x, rotations(GRID, CONFIG.head_width, CONFIG.num_prefix_tokens)).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
