"""Attention maps: they are what the network mixes values with."""

import dataclasses

import pytest
import torch

from dinox_model import attention_maps
from dinox_model.block import Block
from tests.model.variants import TINY, VARIANTS, images, joined, mm_for, perturbed, variant


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_maps_times_values_are_what_the_network_computes(name: str, masked: bool) -> None:
    config = variant(name)
    model, x, mm = perturbed(config), images(2, 3, 48, 32), mm_for(config)
    masks = torch.rand(2, 6, generator=torch.Generator().manual_seed(1)) < 0.5 if masked else None
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # a block's attention: input and output
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        block.attention.register_forward_hook(
            lambda module, inputs, output, number=number: seen.update({number: (inputs[0], output)})
        )
    with torch.no_grad():
        model(x, masks, mm_per_pixel=mm)
        found = attention_maps(model, x, (0, 1, 2), masks, mm_per_pixel=mm)
        for number, maps in enumerate(found):
            attention = model.blocks[number].attention
            tokens, output = seen[number]
            assert maps.weights.dtype == torch.float32
            assert maps.weights.shape == (2, 2, tokens.shape[1], tokens.shape[1])
            torch.testing.assert_close(maps.weights.sum(-1), torch.ones(maps.weights.shape[:3]))
            values = attention.queries_keys_values(tokens, None)[2]
            mixed = (maps.weights @ values).transpose(1, 2).flatten(2)
            torch.testing.assert_close(attention.projection(mixed), output, atol=1e-5, rtol=1e-5)


def test_parts_of_a_map_by_name() -> None:
    model = perturbed(TINY)
    with torch.no_grad():
        (maps,) = attention_maps(model, images(2, 3, 48, 80))
    h, w, prefix = 3, 5, TINY.num_prefix_tokens
    assert maps.grid == (h, w)
    for row in range(h):
        for column in range(w):
            token = prefix + row * w + column
            assert torch.equal(maps.from_cls[:, :, row, column], maps.weights[:, :, 0, token])
            assert torch.equal(maps.from_registers[:, :, 1, row, column], maps.weights[:, :, 2, token])
            found = maps.from_patches[:, :, row, column].flatten(2)
            assert torch.equal(found, maps.weights[:, :, token, prefix:])
    assert maps.from_registers.shape == (2, 2, 2, h, w)


def test_layers_come_in_the_order_asked_for_and_later_blocks_are_not_run() -> None:
    model, x = perturbed(TINY), images(1, 3, 32, 32)
    ran: list[int] = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, inputs, output, number=number: ran.append(number))
    with torch.no_grad():
        everything = attention_maps(model, x, (0, 1, 2))
        ran.clear()
        found = attention_maps(model, x, (1, -3))
    assert ran == [0, 1]
    assert torch.equal(found[0].weights, everything[1].weights)
    assert torch.equal(found[1].weights, everything[0].weights)
    assert attention_maps(model, x, ()) == ()
    with pytest.raises(ValueError, match="layer 3 is none of this network's"):
        attention_maps(model, x, (3,))


def test_maps_are_fp32_under_autocast_and_follow_the_network_there() -> None:
    model, x = perturbed(TINY), images(2, 3, 48, 32)
    with torch.no_grad():
        (exact,) = attention_maps(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            (rounded,) = attention_maps(model, x)
    assert rounded.weights.dtype == torch.float32
    torch.testing.assert_close(rounded.weights.sum(-1), torch.ones(rounded.weights.shape[:3]))
    assert 0 < (rounded.weights - exact.weights).abs().max() < 0.05


def test_masked_patches_are_looked_at_as_mask_tokens() -> None:
    model, x = perturbed(dataclasses.replace(TINY, num_layers=1)), images(1, 3, 32, 32)
    changed = x.clone()
    changed[:, :, :16, :16] += 1.0
    masks = torch.tensor([[True, False, False, False]])
    with torch.no_grad():
        before, after = (attention_maps(model, pixels, masks=masks)[0].weights for pixels in (x, changed))
        assert torch.equal(before, after)
        assert not torch.equal(before, attention_maps(model, x)[0].weights)


def test_a_network_without_cls_says_so() -> None:
    model = perturbed(variant("no cls"))
    (maps,) = attention_maps(model, images(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no CLS token"):
        _ = maps.from_cls
    assert maps.from_patches.shape == (1, 2, 2, 2, 2, 2)
    assert joined(model(images(1, 3, 32, 32))).shape[1] == maps.weights.shape[-1]
