"""Parameter groups, clipping, and that a masked update changes not a single bit."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import dinox_model
from dinox_model import heads
from dinox_train import optimizer as optimizer_module
from dinox_train.optimizer import Clipped, clip_gradients, make_optimizer, parameter_groups, set_group_values

SETTINGS = SimpleNamespace(beta1=0.9, beta2=0.999, layer_decay=0.9, patch_embed_scale=0.2)
CONFIG = dinox_model.ViTConfig(width=16, num_layers=3, num_heads=2, mlp_hidden=32)


def network(config: dinox_model.ViTConfig = CONFIG, **more: nn.Module) -> nn.Module:
    backbone = dinox_model.build(config, in_channels=3, seed=0)
    dino = dinox_model.PrototypeHead(16, 24, 8, 40, seed=1)
    return nn.ModuleDict({"backbone": backbone, "heads": nn.ModuleDict({"dino": dino, **more})})


def clip(net: nn.Module, max_norm: float, *, by_part: bool = False) -> Clipped:
    return clip_gradients(net.named_parameters(), max_norm, by_part=by_part)


@functools.cache
def scales() -> dict[str, tuple[float, float, bool, bool]]:
    """By name: lr_scale, wd_scale, prototypes, backbone."""
    groups = parameter_groups(network().named_parameters(), layer_decay=0.9, patch_embed_scale=0.2)
    return {
        name: (group["lr_scale"], group["wd_scale"], group["prototypes"], group["backbone"])
        for group in groups
        for name in group["names"]
    }


def set_gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all that an update may change."""
    tensors = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for name, parameter in net.named_parameters():
        tensors |= {f"{kind}.{name}": value.clone() for kind, value in optimizer.state[parameter].items()}
    return tensors


def equal_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before
    )


def step(net: nn.Module, optimizer: torch.optim.Optimizer, applied: float) -> None:
    optimizer.found_inf = 1.0 - torch.tensor(applied)  # type: ignore[attr-defined]
    optimizer.step()


# ------------------------------------------------------------------ groups


def test_every_parameter_stands_in_exactly_one_group() -> None:
    net = network()
    groups = parameter_groups(net.named_parameters(), 0.9, 0.2)
    named = dict(net.named_parameters())
    assert sorted(name for group in groups for name in group["names"]) == sorted(named)
    for group in groups:
        assert [id(parameter) for parameter in group["params"]] == [id(named[name]) for name in group["names"]]


def test_learning_rates_fall_towards_the_input() -> None:
    lr = {name: scale[0] for name, scale in scales().items()}
    assert lr["heads.dino.mlp.0.weight"] == lr["heads.dino.last_layer.weight"] == lr["backbone.norm.weight"] == 1.0
    for block in range(3):
        of_block = {value for name, value in lr.items() if name.startswith(f"backbone.blocks.{block}.")}
        assert of_block == {0.9 ** (3 - block)}
    assert lr["backbone.cls_token"] == lr["backbone.register_tokens"] == lr["backbone.mask_token"] == 0.9**4
    patch = {value for name, value in lr.items() if name.startswith("backbone.patch_embed.")}
    assert patch == {0.9**4 * 0.2}


def test_matrices_decay_and_vectors_and_tokens_do_not() -> None:
    parameters = dict(network().named_parameters())
    for name, (_, wd_scale, *_) in scales().items():
        is_token = name.endswith(("_token", "_tokens"))
        assert wd_scale == float(parameters[name].ndim > 1 and not is_token), name
    assert scales()["backbone.blocks.0.gamma1"][1] == scales()["backbone.blocks.0.norm1.weight"][1] == 0.0
    assert scales()["backbone.blocks.0.attention.qkv.weight"][1] == scales()["heads.dino.last_layer.weight"][1] == 1.0


def test_only_the_prototypes_are_the_last_layer() -> None:
    assert [name for name, scale in scales().items() if scale[2]] == ["heads.dino.last_layer.weight"]


def test_the_patch_embedding_learns_while_the_backbone_is_frozen() -> None:
    alone = {name for name, scale in scales().items() if not scale[3]}
    assert {name.split(".")[0] for name in alone} == {"backbone", "heads"}
    assert {name for name in alone if name.startswith("backbone.")} == {
        "backbone.patch_embed.weight",
        "backbone.patch_embed.bias",
    }


OPTIONS = {
    "dinov3": {},
    "bare": {"layer_scale": None, "qkv_bias": "none", "cls_token": False, "num_registers": 0, "norm": "rms"},
    "full": {"qkv_bias": "full", "qk_norm": True, "untied_cls_norm": True, "mlp": "swiglu"},
    "dinov2": {"positions": "learned", "learned_grid": (3, 3), "qkv_bias": "full", "num_registers": 0},
    "scale": {"positions": "rope_mm", "scale_conditioning": True, "mlp": "geglu", "qk_norm": True, "norm": "rms"},
    "stored": {"rope_stored_periods": True, "mlp": "relu2", "zero_init_residuals": True},
    "fourier": {"positions": "fourier", "num_registers": 2},
}
HEADS: tuple[heads.HeadConfig, ...] = (
    heads.PrototypeHeadConfig(hidden=24, bottleneck=8, prototypes=12),
    heads.LinearHeadConfig(out_features=3),
    heads.AttentivePoolHeadConfig(out_features=3),
    heads.TransposedConvolutionDecoderConfig(classes=2),
    heads.UpsamplingDecoderConfig(classes=2),
    heads.CrossAttentionDecoderConfig(num_queries=2, out_features=3),
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_of_every_option_has_a_rule_and_only_weights_of_products_decay(options: dict) -> None:
    """The reference goes by modules, the rules by names."""
    config = dataclasses.replace(CONFIG, **options)
    net = network(config, **{head.kind: head.build(config) for head in HEADS})
    groups = parameter_groups(net.named_parameters(), 0.9, 0.2)
    found = [
        (name, parameter, group)
        for group in groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    ]
    assert sorted(name for name, *_ in found) == sorted(dict(net.named_parameters()))
    products = {
        id(module.weight) for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    }
    for name, parameter, group in found:
        assert group["wd_scale"] == float(id(parameter) in products), name
        assert group["backbone"] == (name.startswith("backbone.") and ".patch_embed." not in name), name
        assert group["prototypes"] == name.endswith(".last_layer.weight"), name
    assert sum(group["prototypes"] for group in groups) == 1


def test_blocks_of_a_head_are_no_blocks_of_the_backbone() -> None:
    named = [("backbone.blocks.0.mlp.up.weight", nn.Parameter(torch.zeros(2, 2)))]
    named += [(f"heads.decoder.blocks.{i}.mlp.up.weight", nn.Parameter(torch.zeros(2, 2))) for i in range(9)]
    scales = {name: group["lr_scale"] for group in parameter_groups(named, 0.5) for name in group["names"]}
    assert scales.pop("backbone.blocks.0.mlp.up.weight") == 0.5
    assert set(scales.values()) == {1.0}


def test_the_groups_do_not_depend_on_decays_of_one() -> None:
    groups = parameter_groups(network().named_parameters())
    assert sorted((g["lr_scale"], g["wd_scale"], g["prototypes"], g["backbone"]) for g in groups) == [
        (1.0, 0.0, False, False),
        (1.0, 0.0, False, True),
        (1.0, 1.0, False, False),
        (1.0, 1.0, False, True),
        (1.0, 1.0, True, False),
    ]


def test_frozen_parameters_are_left_out_and_unknown_names_refused() -> None:
    net = network()
    net["backbone"].requires_grad_(False)
    groups = parameter_groups(net.named_parameters(), 0.9, 0.2)
    assert all(name.startswith("heads.") for group in groups for name in group["names"])
    for name in ("backbone.rope.weight", "predictor.weight", "weight"):
        with pytest.raises(ValueError, match=f"parameter {name}: no rule"):
            parameter_groups([(name, nn.Parameter(torch.zeros(2, 2)))])


def test_values_of_an_update_reach_every_group() -> None:
    optimizer = make_optimizer(network().named_parameters(), SETTINGS)
    set_group_values(optimizer, 1e-3, 0.04)
    for group in optimizer.param_groups:
        assert group["lr"] == 1e-3 * group["lr_scale"]
        assert group["weight_decay"] == 0.04 * group["wd_scale"]
        assert group["betas"] == (0.9, 0.999)


def test_a_frozen_last_layer_keeps_its_values() -> None:
    net = network()
    optimizer = make_optimizer(net.named_parameters(), SETTINGS)
    before = everything(net, optimizer)
    set_gradients(net, 0)
    set_group_values(optimizer, 1e-2, 0.1, last_layer_frozen=True)
    step(net, optimizer, applied=1.0)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) == (name == "heads.dino.last_layer.weight")
    set_group_values(optimizer, 1e-2, 0.1)
    step(net, optimizer, applied=1.0)
    assert not torch.equal(net["heads"]["dino"].last_layer.weight, before["heads.dino.last_layer.weight"])


def test_a_frozen_backbone_keeps_its_values_and_follows_later() -> None:
    net = network()
    optimizer = make_optimizer(net.named_parameters(), SETTINGS)
    before = everything(net, optimizer)
    set_gradients(net, 0)
    set_group_values(optimizer, 1e-2, 0.1, backbone_scale=0.0)
    step(net, optimizer, applied=1.0)
    for name, parameter in net.named_parameters():
        kept = name.startswith("backbone.") and ".patch_embed." not in name
        assert torch.equal(parameter, before[name]) == kept, name
    set_group_values(optimizer, 1e-2, 0.1, backbone_scale=0.5)
    for group in optimizer.param_groups:
        assert group["lr"] == 1e-2 * group["lr_scale"] * (0.5 if group["backbone"] else 1.0)


# ------------------------------------------------------------------ the mask


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), None])
def test_a_masked_update_changes_nothing(poison: float | None) -> None:
    net = network()
    optimizer = make_optimizer(net.named_parameters(), SETTINGS)
    set_group_values(optimizer, 1e-2, 0.1)
    for update in range(3):
        set_gradients(net, update)
        step(net, optimizer, applied=1.0)
    before = everything(net, optimizer)
    set_gradients(net, 7)
    if poison is not None:
        next(net.parameters()).grad.view(-1)[3] = poison
    norm, _ = clip(net, 3.0, by_part=True)
    assert bool(norm.isfinite()) == (poison is None)
    step(net, optimizer, applied=0.0)
    assert equal_bits(before, everything(net, optimizer))


def test_updates_after_a_masked_one_are_as_if_it_had_not_been() -> None:
    outcomes = []
    for with_mask in (False, True):
        net = network()
        optimizer = make_optimizer(net.named_parameters(), SETTINGS)
        set_group_values(optimizer, 1e-2, 0.1)
        if with_mask:  # the very first update too: it must not begin the moments
            set_gradients(net, 99)
            next(net.parameters()).grad.fill_(torch.nan)
            clip(net, 3.0)
            step(net, optimizer, applied=0.0)
        for update in range(3):
            set_gradients(net, update)
            clip(net, 3.0)
            step(net, optimizer, applied=1.0)
        outcomes.append(everything(net, optimizer))
    assert equal_bits(*outcomes)


def test_an_applied_update_is_adamw() -> None:
    net, reference = network(), network()
    optimizer = make_optimizer(net.named_parameters(), SETTINGS)
    set_group_values(optimizer, 1e-2, 0.1)
    plain = torch.optim.AdamW(
        [
            {"params": [parameter], "lr": 1e-2 * scales()[name][0], "weight_decay": 0.1 * scales()[name][1]}
            for name, parameter in reference.named_parameters()
        ],
        betas=(0.9, 0.999),
        foreach=False,
        fused=False,
    )
    for update in range(4):
        set_gradients(net, update)
        set_gradients(reference, update)
        step(net, optimizer, applied=1.0)
        plain.step()
    for (name, ours), theirs in zip(net.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_the_flag_is_never_read_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for CUDA's sync debug mode: what waits for a device goes through one of these."""
    net = network()
    optimizer = make_optimizer(net.named_parameters(), SETTINGS)
    set_group_values(optimizer, 1e-2, 0.1)
    set_gradients(net, 0)

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read by the host")

    monkeypatch.setattr(optimizer_module, "_short_enough", lambda norm, max_norm: False)  # as on a GPU

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    norm, clipped = clip(net, 3.0, by_part=True)
    optimizer.found_inf = 1.0 - norm.isfinite().float() * clipped  # type: ignore[attr-defined]
    optimizer.step()


# ------------------------------------------------------------------ clipping


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_scales_all_gradients_together(max_norm: float) -> None:
    net = network()
    set_gradients(net, 0)
    before = [parameter.grad.clone() for parameter in net.parameters()]
    expected = torch.sqrt(sum((gradient.double() ** 2).sum() for gradient in before))
    norm, clipped = clip(net, max_norm)
    assert norm.ndim == clipped.ndim == 0
    assert float(norm) == pytest.approx(float(expected), rel=1e-5)
    assert float(clipped) == float(expected > max_norm)
    scale = min(1.0, max_norm / float(expected))
    for gradient, parameter in zip(before, net.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient * scale, rtol=1e-5, atol=1e-8)


def test_what_the_cpu_leaves_out_would_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    for max_norm in (1e6, 200.0, 50.0, 1.0):
        gradients = []
        for leave_out in (True, False):
            with monkeypatch.context() as patch:
                if not leave_out:
                    patch.setattr(optimizer_module, "_short_enough", lambda norm, max_norm: False)
                net = network()
                set_gradients(net, 0)
                clip(net, max_norm)
                gradients.append([parameter.grad for parameter in net.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_each_part_is_clipped_for_itself() -> None:
    """A head whose gradient is a thousand times as large shortens its own only."""
    net = network(mark=dinox_model.PrototypeHead(16, 24, 8, 12, seed=2))
    set_gradients(net, 0)
    for parameter in net["heads"]["mark"].parameters():
        parameter.grad *= 1000.0
    parts = {"backbone": net["backbone"], "dino": net["heads"]["dino"], "mark": net["heads"]["mark"]}

    def norms() -> dict[str, float]:
        return {
            name: float(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in part.parameters()])))
            for name, part in parts.items()
        }

    before = norms()
    limit = 2 * before["backbone"]
    norm, clipped = clip(net, limit, by_part=True)
    assert float(norm) == pytest.approx(sum(value**2 for value in before.values()) ** 0.5, rel=1e-5)
    assert float(clipped) == 1.0
    assert norms() == pytest.approx({**before, "mark": limit}, rel=1e-4)
    assert float(clip(net, 2 * limit, by_part=True).clipped) == 0.0


@pytest.mark.parametrize("by_part", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_gradients_that_are_not_finite_show_in_the_norm(poison: float, by_part: bool) -> None:
    net = network()
    set_gradients(net, 0)
    list(net.parameters())[-1].grad.view(-1)[0] = poison
    assert not clip(net, 3.0, by_part=by_part).norm.isfinite()


def test_parameters_without_gradient_do_not_count() -> None:
    net = network()
    set_gradients(net, 0)
    net["backbone"].mask_token.grad = None
    optimizer = make_optimizer(net.named_parameters(), SETTINGS)
    set_group_values(optimizer, 1e-2, 0.1)
    before = net["backbone"].mask_token.detach().clone()
    assert clip(net, 3.0).norm.isfinite()
    step(net, optimizer, applied=1.0)
    assert torch.equal(net["backbone"].mask_token, before)


def test_a_part_without_gradients_does_not_count() -> None:
    moved, still = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    moved.grad = torch.tensor([3.0, 4.0])
    clipped = clip_gradients([("backbone.a", moved), ("heads.ibot.b", still)], 1.0, by_part=True)
    assert clipped.norm == 5.0
    assert still.grad is None
