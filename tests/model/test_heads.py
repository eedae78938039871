"""The prototype head: its formula, its first weights."""

import torch

from dinox_model import PrototypeHead


def test_logits_are_the_formula() -> None:
    head = PrototypeHead(12, 20, 8, 33, seed=3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    weights = dict(head.named_parameters())
    hidden = x
    for layer in (0, 2, 4):
        hidden = hidden @ weights[f"mlp.{layer}.weight"].T + weights[f"mlp.{layer}.bias"]
        if layer < 4:
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    expected = hidden / hidden.square().sum(1, keepdim=True).sqrt() @ weights["last_layer.weight"].T
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=1e-5)


def test_it_has_these_parameters_and_no_others() -> None:
    head = PrototypeHead(384, 2048, 256, 4096)
    shapes = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
    assert shapes == {
        "mlp.0.weight": (2048, 384),
        "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048),
        "mlp.4.bias": (256,),
        "last_layer.weight": (4096, 256),
    }
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert abs(parameter.std().item() - 0.02) < 5e-4, name
            assert abs(parameter.mean().item()) < 5e-4, name


def test_weights_are_a_function_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (PrototypeHead(16, 8, 4, 10, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["last_layer.weight"], other["last_layer.weight"])


def test_initialise_fills_everything() -> None:
    head = PrototypeHead(16, 8, 4, 10)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(torch.nan)
    head.initialise(torch.Generator().manual_seed(0))
    assert all(parameter.isfinite().all() for parameter in head.parameters())


def test_on_the_meta_device_it_has_no_memory() -> None:
    with torch.device("meta"):
        head = PrototypeHead(4096, 8192, 512, 262144)
    assert all(parameter.is_meta for parameter in head.parameters())


def test_bottleneck_lengths_are_exact_under_autocast() -> None:
    head = PrototypeHead(64, 64, 32, 32)
    with torch.no_grad():
        head.last_layer.weight.copy_(torch.eye(32))
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        lengths = head(x).float().norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(100), atol=3e-3, rtol=0)
