"""Heads that make one vector an image, and cross-attention: against loops over images, heads and queries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinox_model import ViTConfig, ViTFeatures
from dinox_model.heads import (
    AttentivePoolHeadConfig,
    CrossAttention,
    CrossAttentionBlock,
    CrossAttentionDecoderConfig,
    DecoderBlock,
    LinearHeadConfig,
)

WIDTH = 16
NETWORK = ViTConfig(width=WIDTH, num_layers=1, num_heads=2, mlp_hidden=8, norm_eps=1e-3)


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4, generator=generator)


def features(num_images: int, num_patches: int, *, cls: bool = True) -> ViTFeatures:
    x = torch.randn(num_images, 1 + num_patches, WIDTH, generator=torch.Generator().manual_seed(1))
    return ViTFeatures(x[:, 0] if cls else None, x[:, :0], x[:, 1:], (1, num_patches))


def attention_by_loops(attention: CrossAttention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """One image, one head, one query at a time."""
    width = x.shape[-1]
    size = width // attention.num_heads
    key_weight, value_weight = attention.key_value.weight.split(width)
    key_bias, value_bias = attention.key_value.bias.split(width)
    out = torch.empty_like(x)
    for image in range(len(x)):
        query = x[image] @ attention.query.weight.T + attention.query.bias
        key, value = context[image] @ key_weight.T + key_bias, context[image] @ value_weight.T + value_bias
        for head in range(attention.num_heads):
            part = slice(head * size, (head + 1) * size)
            for place in range(x.shape[1]):
                weights = torch.exp(key[:, part] @ query[place, part] / math.sqrt(size))
                out[image, place, part] = weights / weights.sum() @ value[:, part]
    return out @ attention.projection.weight.T + attention.projection.bias


def norm_by_hand(norm: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def mlp_by_hand(mlp: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    up, _, down = mlp.children()
    hidden = x @ up.weight.T + up.bias
    return 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)) @ down.weight.T + down.bias


def block_by_hand(block: CrossAttentionBlock, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    if isinstance(block, DecoderBlock):
        part = block.self_attention
        normed = norm_by_hand(part.norm, x)
        x = x + (1.0 if part.gamma is None else part.gamma) * attention_by_loops(part.branch, normed, normed)
    part = block.cross_attention
    added = attention_by_loops(part.branch, norm_by_hand(part.norm, x), context)
    x = x + (1.0 if part.gamma is None else part.gamma) * added
    added = mlp_by_hand(block.mlp.branch, norm_by_hand(block.mlp.norm, x))
    return x + (1.0 if block.mlp.gamma is None else block.mlp.gamma) * added


@pytest.mark.parametrize("kind", ["pooled", "patch_mean", "both"])
def test_the_linear_head_is_a_linear_of_what_it_names(kind: str) -> None:
    head = LinearHeadConfig(out_features=3, features=kind).build(NETWORK)  # type: ignore[arg-type]
    randomise(head)
    seen = features(4, 5)
    assert seen.cls is not None
    parts = {"pooled": [seen.cls], "patch_mean": [seen.patches.mean(1)], "both": [seen.cls, seen.patches.mean(1)]}
    expected = torch.cat(parts[kind], dim=1) @ head.linear.weight.T + head.linear.bias  # type: ignore[attr-defined]
    torch.testing.assert_close(head(seen), expected, atol=1e-5, rtol=1e-5)


def test_without_cls_the_linear_head_pools_the_patches() -> None:
    head = LinearHeadConfig(out_features=3).build(NETWORK)
    means = LinearHeadConfig(out_features=3, features="patch_mean").build(NETWORK)
    means.load_state_dict(head.state_dict())
    seen = features(4, 5, cls=False)
    assert torch.equal(head(seen), means(seen))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.sampled_from([8, 16]))
def test_cross_attention_is_the_reference(
    images: int, queries: int, tokens: int, heads: int, context_width: int
) -> None:
    attention = CrossAttention(WIDTH, context_width, heads)
    randomise(attention)
    generator = torch.Generator().manual_seed(2)
    x, context = (
        torch.randn(images, n, d, generator=generator) for n, d in ((queries, WIDTH), (tokens, context_width))
    )
    with torch.no_grad():
        torch.testing.assert_close(
            attention(x, context), attention_by_loops(attention, x, context), atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("kind", [CrossAttentionBlock, DecoderBlock])
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_blocks_are_the_reference(kind: type[CrossAttentionBlock], layer_scale: float | None) -> None:
    block = kind(WIDTH, 8, 2, 12, eps=1e-3, layer_scale=layer_scale)
    randomise(block)
    assert (block.mlp.gamma is None) == (layer_scale is None)
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 3, WIDTH, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(block(x, context), block_by_hand(block, x, context), atol=2e-5, rtol=1e-4)


def test_the_attentive_pool_is_the_reference_and_begins_near_the_mean() -> None:
    head = AttentivePoolHeadConfig(out_features=3, num_queries=2, num_heads=4).build(NETWORK)
    seen = features(2, 6)
    with torch.no_grad():
        answers = head.attention(head.queries.expand(2, -1, -1), seen.patches)
        mean = head.attention.key_value(seen.patches.mean(1))[:, None, WIDTH:] @ head.attention.projection.weight.T
        assert (answers - mean).abs().max() < 1e-4
        randomise(head)
        answers = attention_by_loops(head.attention, head.queries.expand(2, -1, -1), seen.patches)
        expected = torch.cat((answers[:, 0], answers[:, 1]), dim=1) @ head.linear.weight.T + head.linear.bias
        torch.testing.assert_close(head(seen), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_the_decoder_is_the_reference(layer_scale: float | None) -> None:
    config = CrossAttentionDecoderConfig(
        out_features=3, num_queries=4, num_layers=2, width=24, num_heads=3, mlp_hidden=20, layer_scale=layer_scale
    )
    head = config.build(NETWORK)
    gammas = [parameter for name, parameter in head.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == (0 if layer_scale is None else 6)
    assert all(torch.equal(gamma, torch.full((24,), layer_scale)) for gamma in gammas)
    randomise(head)
    seen = features(2, 5)
    with torch.no_grad():
        x = head.queries.expand(2, -1, -1)
        for block in head.blocks:
            x = block_by_hand(block, x, seen.patches)
        expected = norm_by_hand(head.norm, x) @ head.linear.weight.T + head.linear.bias
        found = head(seen)
    assert found.shape == (2, 4, 3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_order_of_patches_does_not_matter() -> None:
    head = CrossAttentionDecoderConfig(out_features=3, num_queries=2).build(NETWORK)
    randomise(head)
    seen = features(1, 6)
    turned = seen._replace(patches=seen.patches.flip(1))
    torch.testing.assert_close(head(seen), head(turned), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [AttentivePoolHeadConfig, CrossAttentionDecoderConfig])
def test_heads_that_do_not_divide_the_width_are_refused(config: type) -> None:
    values = {"out_features": 3, "num_queries": 2, "num_heads": 3}
    with pytest.raises(ValueError, match="3 attention heads cannot share 16 features out evenly"):
        config(**values).build(NETWORK)
