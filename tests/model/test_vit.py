"""The network: what it returns and where, masks, first weights."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import dinox_model
from dinox_model import VisionTransformer, ViTConfig

TINY = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64, layer_scale=0.5)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "grid"), [((224, 224), (14, 14)), ((96, 160), (6, 10)), ((16, 32), (1, 2))])
def test_features_have_these_shapes(size: tuple[int, int], grid: tuple[int, int]) -> None:
    features = dinox_model.build(TINY)(images(2, 3, *size))
    assert features.cls.shape == (2, 32)
    assert features.registers.shape == (2, 4, 32)
    assert features.patches.shape == (2, grid[0] * grid[1], 32)
    assert features.grid == grid
    assert features.patches_as_grid.shape == (2, *grid, 32)


def test_patches_stand_row_by_row() -> None:
    # With LayerScale 0 no token sees another, so a change of one patch's pixels shows where its token stands.
    model = dinox_model.build(dataclasses.replace(TINY, layer_scale=0.0))
    x = images(1, 3, 96, 160)
    changed = x.clone()
    changed[:, :, 4 * 16 : 5 * 16, 7 * 16 : 8 * 16] += 1.0
    before, after = model(x), model(changed)
    differs = (before.patches_as_grid != after.patches_as_grid).any(dim=-1)
    assert differs.nonzero().tolist() == [[0, 4, 7]]
    assert torch.equal(before.patches.flatten(), before.patches_as_grid.flatten())
    assert torch.equal(before.cls, after.cls)


def test_every_token_sees_every_patch() -> None:
    model = dinox_model.build(TINY)
    x = images(1, 3, 64, 48)
    changed = x.clone()
    changed[:, :, :16, :16] += 1.0
    before, after = model(x), model(changed)
    for old, new in zip(before[:3], after[:3], strict=True):
        assert (old != new).any(dim=-1).all()


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model = dinox_model.build(TINY)
    x = images(3, 3, 64, 48)
    torch.testing.assert_close(model(x).patches[1:2], model(x[1:2]).patches, atol=1e-5, rtol=0)


def test_patch_embedding_is_a_convolution() -> None:
    embed = dinox_model.build(TINY).patch_embed
    x = images(2, 3, 64, 96)
    weight = embed.weight.reshape(32, 3, 16, 16)
    expected = F.conv2d(x, weight, embed.bias, stride=16).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x), expected, atol=1e-5, rtol=1e-5)


def test_all_features_come_after_the_final_norm() -> None:
    model = dinox_model.build(TINY)
    x = images(2, 3, 64, 64)
    before = model(x)
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
        model.norm.bias.fill_(3.0)
    for old, new in zip(before[:3], model(x)[:3], strict=True):
        torch.testing.assert_close(old.mean(-1), torch.zeros(old.shape[:-1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(new, 2.0 * old + 3.0)


def test_pixels_under_a_mask_have_no_effect_and_the_mask_token_has() -> None:
    model = dinox_model.build(TINY)
    x = images(2, 3, 64, 48)
    masks = torch.zeros(2, 4, 3, dtype=torch.bool)
    masks[0, 1, 2] = masks[1, 3, 0] = True
    changed = x.clone()
    changed[0, :, 16:32, 32:48] = 7.0
    changed[1, :, 48:64, 0:16] = -7.0
    before = model(x, masks.flatten(1))
    assert torch.equal(before.patches, model(changed, masks.flatten(1)).patches)
    assert not torch.equal(before.patches, model(x).patches)
    with torch.no_grad():
        model.mask_token.fill_(0.3)
    assert not torch.equal(before.cls, model(x, masks.flatten(1)).cls)
    assert torch.equal(model(x, torch.zeros(2, 12, dtype=torch.bool)).cls, model(x).cls)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 32, 32), r"\(b, 3, y, x\)"),
        ((3, 32, 32), r"\(b, 3, y, x\)"),
        ((1, 3, 40, 32), "multiple of 16 pixels high and wide, not 40 x 32"),
        ((1, 3, 0, 32), "multiple of 16 pixels"),
    ],
)
def test_other_input_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dinox_model.build(TINY)(torch.zeros(shape))


@pytest.mark.parametrize("masks", [torch.zeros(1, 5, dtype=torch.bool), torch.zeros(1, 4)])
def test_other_masks_are_refused(masks: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"masks must be bool \(1, 4\)"):
        dinox_model.build(TINY)(images(1, 3, 32, 32), masks)


def test_input_of_another_dtype_is_refused_by_name_and_autocast_takes_it() -> None:
    model, x = dinox_model.build(TINY), torch.zeros(1, 3, 32, 32)
    with pytest.raises(
        ValueError, match=r"input is torch\.float16 and this network's weights are torch\.float32: give"
    ):
        model(x.half())
    with pytest.raises(ValueError, match=r"input must be floats, not torch\.int16: dinox_model\.encode"):
        model(x.to(torch.int16))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x.bfloat16()).cls.isfinite().all()
    with pytest.raises(ValueError, match=r"input is torch\.float32 and this network's weights are torch\.bfloat16"):
        model.bfloat16()(x)
    assert model(x.bfloat16()).cls.dtype == torch.bfloat16


def test_weights_are_a_function_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one = dinox_model.build(TINY, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "torch's own random state must stay as it was"
    torch.manual_seed(99)
    same, other = dinox_model.build(TINY, seed=1).state_dict(), dinox_model.build(TINY, seed=2).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["cls_token"], other["cls_token"])


def test_windows_may_have_other_numbers_of_slices() -> None:
    model = dinox_model.build(TINY, in_channels=5)
    assert model.config == dataclasses.replace(TINY, in_channels=5)
    assert model(images(1, 5, 32, 32)).cls.shape == (1, 32)
    assert dinox_model.build(model.config).config.in_channels == 5
    with torch.device("meta"):
        assert dinox_model.build("vit_s").config.in_channels == 3


def test_on_the_meta_device_it_has_shapes_and_no_memory() -> None:
    with torch.device("meta"):
        model = dinox_model.build("vit_7b")
        features = model(torch.empty(2, 3, 224, 224))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert features.cls.shape == (2, 4096)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "relu2", "geglu"])
def test_every_parameter_gets_a_gradient(mlp: str) -> None:
    model = dinox_model.build(dataclasses.replace(TINY, mlp=mlp))
    masks = torch.zeros(1, 6, dtype=torch.bool)
    masks[0, 2] = True
    loss = sum((tokens * images(*tokens.shape)).sum() for tokens in model(images(1, 3, 32, 48), masks)[:3])
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_autocast_gives_the_features_of_fp32_to_bf16_rounding() -> None:
    model: VisionTransformer = dinox_model.build(TINY)
    x = images(2, 3, 64, 64)
    exact = model(x).patches
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x).patches
    difference = (exact - rounded.float()).abs().max()
    assert 0 < difference < 0.1
