"""A block against its formula, and drop path: only kept rows are computed, and gradients are those of the formula."""

import dataclasses

import pytest
import torch
from torch import nn

from dinox_model import ViTConfig
from dinox_model.block import Block, KeptRows
from dinox_model.positions import RotaryPositions

CONFIG = ViTConfig(width=32, num_layers=1, num_heads=2, mlp_hidden=48, num_registers=1)
GRID = (2, 3)
NUM_IMAGES = 4


def random_block(config: ViTConfig) -> Block:
    block = Block(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return block


def tokens(seed: int = 1) -> torch.Tensor:
    shape = (NUM_IMAGES, CONFIG.num_prefix_tokens + GRID[0] * GRID[1], CONFIG.width)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotations_of(config: ViTConfig):
    mm = torch.linspace(0.4, 2.0, 2 * NUM_IMAGES).view(NUM_IMAGES, 2) if config.positions == "rope_mm" else None
    return RotaryPositions(config)(GRID, mm_per_pixel=mm) if config.is_rotary else None


def reference(block: Block, x: torch.Tensor, by, kept: KeptRows | None) -> torch.Tensor:
    """All rows are computed, and those that are not kept are multiplied by 0."""
    for number, gamma, norm, part in (
        (0, block.gamma1, block.norm1, "attention"),
        (1, block.gamma2, block.norm2, "mlp"),
    ):
        residual = block.attention(norm(x), by) if part == "attention" else block.mlp(norm(x))
        factor = torch.ones(len(x))
        if kept is not None:
            factor = torch.zeros(len(x)).index_fill(0, kept[number], kept[number + 2])
        x = x + factor[:, None, None] * (residual if gamma is None else gamma * residual)
    return x


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


KEPT = [
    None,
    KeptRows(rows(0, 2, 3), rows(1), 4 / 3, 4.0),
    KeptRows(rows(), rows(1, 3), 2.0, 2.0),
    KeptRows(rows(), rows(), 2.0, 2.0),
    KeptRows(rows(0, 1, 2, 3), rows(0, 1, 2, 3), 1.0, 1.0),
]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("layer_scale", [1e-5, None])
@pytest.mark.parametrize("positions", ["rope", "rope_mm", "fourier"])
def test_block_is_its_formula_and_so_are_its_gradients(kept: KeptRows | None, layer_scale, positions: str) -> None:
    config = dataclasses.replace(CONFIG, layer_scale=layer_scale, positions=positions)
    block, by = random_block(config), rotations_of(config)
    found, x = [], tokens().requires_grad_()
    for compute in (lambda x: block(x, by, kept), lambda x: reference(block, x, by, kept)):
        out = compute(x)
        wanted = [x, *block.parameters()]
        gradients = torch.autograd.grad((out * tokens(seed=2)).sum(), wanted, materialize_grads=True)
        found.append((out, *gradients))
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=2e-5)


def test_images_that_are_not_kept_cost_nothing() -> None:
    block = random_block(CONFIG)
    seen: list[int] = []
    for part in (block.norm1, block.attention.qkv, block.attention.projection, block.mlp.up, block.mlp.down):
        part.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    block(tokens(), rotations_of(CONFIG), KeptRows(rows(0, 2, 3), rows(1), 4 / 3, 4.0))
    assert seen == [3, 3, 1, 1] or seen == [3, 3, 3, 1, 1]


@pytest.mark.parametrize("layer_scale", [1e-5, None])
@pytest.mark.parametrize("kept", KEPT[:2])
def test_the_sum_of_residuals_stays_fp32_under_autocast(kept: KeptRows | None, layer_scale) -> None:
    block = random_block(dataclasses.replace(CONFIG, layer_scale=layer_scale))
    with torch.autocast("cpu", torch.bfloat16):
        out = block(tokens(), rotations_of(CONFIG), kept)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, block(tokens(), rotations_of(CONFIG), kept), atol=0.2, rtol=0.05)


@pytest.mark.parametrize("mlp", ["gelu", "relu2", "swiglu", "geglu"])
def test_a_block_that_begins_at_zero_adds_nothing_and_learns(mlp: str) -> None:
    config = dataclasses.replace(CONFIG, mlp=mlp, layer_scale=None, zero_init_residuals=True)
    block = Block(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(torch.nan)
    block.initialise(torch.Generator().manual_seed(0), config)
    x, by = tokens(), rotations_of(config)
    out = block(x, by)
    assert torch.equal(out, x)
    (out * tokens(seed=3)).sum().backward()
    for linear in (block.attention.projection, block.mlp.down):
        assert isinstance(linear, nn.Linear)
        assert linear.weight.grad is not None
        assert linear.weight.grad.abs().max() > 0


def test_zeros_at_first_leave_the_other_first_weights_alone() -> None:
    weights = []
    for zero in (False, True):
        config = dataclasses.replace(CONFIG, zero_init_residuals=zero)
        block = Block(config)
        block.initialise(torch.Generator().manual_seed(0), config)
        weights.append(block.state_dict())
    differ = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert differ == {"attention.projection.weight", "mlp.down.weight"}
