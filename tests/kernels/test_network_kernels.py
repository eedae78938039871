"""A whole network with its kernels on computes what it computes without: features and every gradient."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

import dinox_model
from dinox_model import ViTConfig
from dinox_model.block import Block
from dinox_model.draws import draw
from dinox_model.execution import Execution, prepare, use
from dinox_model.kernels.dispatch import REFERENCE, Kernels
from dinox_model.vit import VisionTransformer

CONFIG = ViTConfig(
    width=128, num_layers=2, num_heads=2, mlp_hidden=64, patch_size=4, num_registers=2, layer_scale=0.5, in_channels=1
)
ELEMENTWISE = Kernels(rotate="triton", residual_norm="triton")
ALL = Kernels(attention="triton", rotate="triton", residual_norm="triton")


VARIANTS = {
    "default": CONFIG,
    "rms and normed queries": dataclasses.replace(CONFIG, norm="rms", qk_norm=True, layer_scale=None),
    "each image its own positions": dataclasses.replace(CONFIG, positions="rope_mm"),
    "no rotations": dataclasses.replace(CONFIG, positions="fourier", qkv_bias="full"),
}
NUM_IMAGES = 2


def network_of(config: ViTConfig, dtype: torch.dtype = torch.float32) -> VisionTransformer:
    return dinox_model.build(config, seed=3).to(dtype)


def results(network: VisionTransformer, autocast: bool = False, draws=None) -> list[Tensor]:
    """Features, and the gradients of images and all parameters, for a fixed sum of the features."""
    config, generator = network.config, torch.Generator().manual_seed(5)
    dtype = network.mask_token.dtype
    images = torch.randn(NUM_IMAGES, 1, 4, 8, generator=generator).to(dtype).requires_grad_()
    mm = torch.tensor([[0.5, 0.7], [1.5, 2.0]]) if config.uses_mm_per_pixel else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = network(images, mm_per_pixel=mm, draws=draws)
    features = torch.cat((found.cls[:, None], found.registers, found.patches), dim=1)
    loss = (features * torch.randn(features.shape, generator=generator)).sum()
    used = [one for one in (images, *network.parameters()) if one is not network.mask_token]
    return [features.detach(), *torch.autograd.grad(loss, used)]


def scaled_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Root mean square error of each, in units of the exact one's root mean square."""
    pairs = zip(found, exact, strict=True)
    return [float((one.double() - right).norm() / right.norm().clamp_min(1e-12)) for one, right in pairs]


@pytest.mark.parametrize(
    ("name", "kernels"), [*((name, ELEMENTWISE) for name in VARIANTS), *((name, ALL) for name in list(VARIANTS)[:2])]
)
def test_a_network_computes_the_same_in_fp32(name: str, kernels: Kernels) -> None:
    network = network_of(VARIANTS[name])
    expected = results(network)
    assert use(network, kernels) == 4  # two blocks, two attentions
    assert max(scaled_errors(results(network), expected)) < 5e-6
    use(network, REFERENCE)
    assert all(torch.equal(one, other) for one, other in zip(results(network), expected, strict=True))


@pytest.mark.parametrize("kernels", [ELEMENTWISE, ALL], ids=["elementwise", "all"])
def test_under_autocast_errors_are_those_without(kernels: Kernels) -> None:
    network = network_of(CONFIG)
    exact, torchs = results(network_of(CONFIG, torch.float64)), results(network, autocast=True)
    use(network, kernels)
    ours = results(network, autocast=True)
    assert [one.dtype for one in ours] == [one.dtype for one in torchs]
    for number, (one, other) in enumerate(zip(scaled_errors(ours, exact), scaled_errors(torchs, exact), strict=True)):
        assert one <= (2 if number == 0 else 3) * other + 1e-6


def test_without_gradients_it_is_the_same_forward() -> None:
    network = network_of(CONFIG)
    use(network, ELEMENTWISE)
    expected = results(network)[0]
    with torch.no_grad():  # queries and keys are rotated in place
        images = torch.randn(NUM_IMAGES, 1, 4, 8, generator=torch.Generator().manual_seed(5))
        found = network(images)
    assert torch.equal(torch.cat((found.cls[:, None], found.registers, found.patches), dim=1), expected)


@pytest.mark.parametrize("checkpointing", ["block", "selective"])
def test_recomputed_activations_give_the_same_gradients(checkpointing) -> None:
    network = network_of(CONFIG)
    use(network, ALL)
    expected = results(network, autocast=True)
    prepare(network, Execution(checkpointing=checkpointing))
    found = results(network, autocast=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_drop_path_keeps_its_own_path() -> None:
    config = dataclasses.replace(CONFIG, drop_path=0.5)
    kept = torch.tensor([[True, False, True, True], [False, True, True, False]]).numpy()
    draws = draw(config, kept, None, torch.arange(NUM_IMAGES).numpy())
    network = network_of(config)
    expected = results(network, draws=draws)
    use(network, ELEMENTWISE)
    assert max(scaled_errors(results(network, draws=draws), expected)) < 5e-6


def test_a_block_compiles_whole() -> None:
    network = network_of(CONFIG)
    use(network, ALL)
    block, (tokens, by, _) = network.blocks[0], network.embed(torch.ones(NUM_IMAGES, 1, 4, 8))
    tokens = tokens.detach().requires_grad_()

    def run(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(tokens, by)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected, found = run(tokens), compiled(tokens)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(one.square().sum(), tokens)[0] for one in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_a_copy_keeps_its_kernels() -> None:
    network = network_of(CONFIG)
    use(network, ELEMENTWISE)
    copied = copy.deepcopy(network).blocks[1]
    assert isinstance(copied, Block)
    assert copied.kernels == copied.attention.kernels == ELEMENTWISE
    assert network.state_dict().keys() == network_of(CONFIG).state_dict().keys()
