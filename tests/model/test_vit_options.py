"""The network's options: what each changes, and what it leaves alone."""

import dataclasses

import pytest
import torch

import dinox_model
from dinox_model import Draws, draw_from
from dinox_model.block import Block, KeptRows
from dinox_model.positions import fourier_positions
from tests.model.variants import MM, TINY, VARIANTS, images, joined, mm_for, perturbed, variant


@pytest.mark.parametrize("name", VARIANTS)
def test_parts_of_every_variant_have_their_shapes(name: str) -> None:
    config = variant(name)
    features = perturbed(config)(images(2, 3, 48, 80), mm_per_pixel=mm_for(config))
    assert (features.cls is None) == (not config.cls_token)
    assert features.pooled.shape == (2, 32)
    assert features.registers.shape == (2, config.num_registers, 32)
    assert features.patches_as_grid.shape == (2, 3, 5, 32)
    assert features.layers == ()
    expected = features.patches.mean(dim=1) if features.cls is None else features.cls
    assert torch.equal(features.pooled, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_sum_of_its_parts(name: str) -> None:
    # The whole network once more, from its modules, token by token; blocks have tests of their own.
    config = variant(name)
    model, x = perturbed(config), images(2, 3, 48, 32)
    masks = torch.rand(2, 6, generator=torch.Generator().manual_seed(4)) < 0.4
    draws = draw_from(config, 2, torch.Generator().manual_seed(5))
    found = model(x, masks, draws=draws, mm_per_pixel=mm_for(config), layers=(0, -1))
    embedded = model.patch_embed(x)
    patches = torch.where(masks[:, :, None], model.mask_token, embedded)
    if model.scale is not None:
        patches = patches + model.scale(MM, embedded)
    cls = model.cls_token
    if model.positions is not None:
        start = int(config.cls_token)
        patches = patches + model.positions.embedding[:, start:]
        cls = None if cls is None else cls + model.positions.embedding[:, :1]
    if config.positions == "fourier":
        patches = patches + fourier_positions((3, 2), 32).patches
    prefix = [*([] if cls is None else [cls]), model.register_tokens]
    tokens = torch.cat([*(part.expand(2, -1, -1) for part in prefix), patches], dim=1)
    by = None
    if model.rope is not None:
        by = model.rope((3, 2), mm_per_pixel=mm_for(config), moved=draws.rope)
    layers = []
    for number, block in enumerate(model.blocks):
        kept = None
        if draws.kept is not None and draws.kept_scale is not None:
            of_block = slice(2 * number, 2 * number + 2)
            kept = KeptRows(*draws.kept[of_block], *draws.kept_scale[of_block])
        tokens = block(tokens, by, kept)
        layers.append(model.norm(tokens))
    torch.testing.assert_close(joined(found), layers[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(joined(found.layers[0]), layers[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(joined(found.layers[1]), joined(found))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_of_every_variant_gets_a_gradient(name: str) -> None:
    config = variant(name)
    model = perturbed(config)
    masks = torch.zeros(2, 6, dtype=torch.bool)
    masks[:, 2] = True
    found = model(images(2, 3, 48, 32), masks, mm_per_pixel=mm_for(config), local_crops=True)
    (joined(found) * images(*joined(found).shape, seed=2)).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.numel() == 0 or (parameter_name.endswith("k_norm.bias") and not config.is_rotary):
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", ["plain", "learned", "untied"])
def test_layers_come_in_the_order_asked_for(name: str) -> None:
    model, x = perturbed(variant(name)), images(2, 3, 48, 32)
    features = model(x, layers=(2, 0, -1, 0))
    first, last = joined(features.layers[1]), joined(features)
    assert [len(one.layers) for one in features.layers] == [0] * 4
    for one, expected in zip(features.layers, (last, first, last, first), strict=True):
        assert torch.equal(joined(one), expected)
        assert one.grid == (3, 2)
    assert not torch.allclose(first, last, atol=1e-2)
    assert torch.equal(joined(model.intermediate(x, [0])[0]), first)
    shallow = dinox_model.build(dataclasses.replace(model.config, num_layers=1))
    shallow.load_state_dict({k: v for k, v in model.state_dict().items() if k in shallow.state_dict()})
    torch.testing.assert_close(joined(shallow(x)), first)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_there_is_not_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer} is none of this network's: they are 0 to 2"):
        dinox_model.build(TINY)(images(1, 3, 32, 32), layers=(layer,))


def test_local_crops_have_a_norm_of_their_own_for_the_prefix_only() -> None:
    model, x = perturbed(variant("untied")), images(2, 3, 48, 32)
    before, local = model(x, layers=(0,)), model(x, layers=(0,), local_crops=True)
    with torch.no_grad():
        assert model.cls_norm is not None
        model.cls_norm.weight.mul_(2.0)
        model.cls_norm.bias.mul_(2.0)
    after, local_after = model(x, layers=(0,)), model(x, layers=(0,), local_crops=True)
    assert torch.equal(joined(before), joined(after)), "without local_crops it is not looked at"
    torch.testing.assert_close(local.patches, before.patches)
    for old, new in ((local, local_after), (local.layers[0], local_after.layers[0])):
        assert old.cls is not None
        assert new.cls is not None
        torch.testing.assert_close(new.cls, 2 * old.cls)
        torch.testing.assert_close(new.registers, 2 * old.registers)
    tied = perturbed(TINY)
    assert torch.equal(joined(tied(x)), joined(tied(x, local_crops=True)))


def test_drop_path_skips_the_rows_that_are_not_kept_and_nothing_else() -> None:
    config = variant("drop path")
    model, x = perturbed(config), images(4, 3, 48, 32)
    draws = draw_from(config, 4, torch.Generator().manual_seed(6))
    assert draws.kept is not None
    assert [len(rows) for rows in draws.kept] == [2] * 6
    # An image that every residual skips leaves as it came.
    kept = tuple(torch.tensor([1, 3]) for _ in draws.kept)
    features = model(x, draws=Draws(kept, draws.kept_scale, draws.rope))
    plain = model.norm(model.embed(x, draws=draws).tokens)
    torch.testing.assert_close(joined(features)[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(joined(features)[[1, 3]], plain[[1, 3]], atol=1e-2)


def test_no_row_kept_at_all_works_and_has_gradients() -> None:
    config = variant("drop path")
    model, x = perturbed(config), images(2, 3, 48, 32)
    none = tuple(torch.zeros(0, dtype=torch.int64) for _ in range(6))
    moved = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    features = model(x, draws=Draws(none, (4.0,) * 6, moved))
    torch.testing.assert_close(joined(features), model.norm(model.embed(x).tokens))
    joined(features).square().sum().backward()
    assert model.patch_embed.weight.grad is not None
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_without_draws_there_is_no_randomness_in_training_either() -> None:
    config = variant("drop path")
    model, x = perturbed(config), images(4, 3, 48, 32)
    state = torch.get_rng_state()
    assert torch.equal(model.train()(x).patches, model.eval()(x).patches)
    plain = perturbed(dataclasses.replace(config, drop_path=0.0, rope_shift=None, rope_jitter=None, rope_rescale=None))
    assert torch.equal(plain(x).patches, model(x).patches)
    drawn = draw_from(config, 4, torch.Generator().manual_seed(6))
    assert torch.equal(model(x, draws=drawn).patches, model.eval()(x, draws=drawn).patches)
    assert torch.equal(torch.get_rng_state(), state), "torch's own random state must stay as it was"


def test_moved_coordinates_move_the_features() -> None:
    config = dataclasses.replace(TINY, rope_shift=0.3)
    model, x = perturbed(config), images(2, 3, 48, 32)
    same = Draws(rope=torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    moved = Draws(rope=torch.tensor([[0.3, 0.0], [1.2, 1.0]]))
    torch.testing.assert_close(model(x, draws=same).patches, model(x).patches, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(x, draws=moved).patches, model(x).patches, atol=1e-3)


def test_draws_of_another_config_are_refused() -> None:
    x = images(2, 3, 48, 32)
    other = draw_from(variant("drop path"), 2, torch.Generator().manual_seed(0))
    deeper = dataclasses.replace(variant("drop path"), num_layers=4)
    with pytest.raises(ValueError, match=r"drop_path 0\.0 needs kept rows of no residuals, there are 6"):
        dinox_model.build(TINY)(x, draws=other)
    with pytest.raises(ValueError, match="kept rows of 8 residuals, there are 6"):
        dinox_model.build(deeper)(x, draws=other)
    with pytest.raises(ValueError, match="coordinates are moved, there are none"):
        dinox_model.build(dataclasses.replace(TINY, rope_shift=0.1))(x, draws=Draws())


@pytest.mark.parametrize("name", ["rope_mm", "scale"])
def test_the_size_of_pixels_matters_where_it_is_looked_at(name: str) -> None:
    model, x = perturbed(variant(name)), images(1, 3, 48, 32).expand(2, -1, -1, -1)
    features = model(x, mm_per_pixel=MM)
    assert not torch.allclose(features.patches[0], features.patches[1], atol=1e-4)
    same = model(x, mm_per_pixel=MM[:1].expand(2, -1))
    torch.testing.assert_close(same.patches[0], same.patches[1], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"needs mm_per_pixel, float32 \(2, 2\): millimetres"):
        model(x)
    for wrong in (MM[:1], MM.double()):
        with pytest.raises(ValueError, match=r"needs mm_per_pixel, float32 \(2, 2\).*, not torch"):
            model(x, mm_per_pixel=wrong)


def test_the_size_of_pixels_is_refused_where_nothing_looks_at_it() -> None:
    with pytest.raises(ValueError, match="does not look at mm_per_pixel"):
        dinox_model.build(TINY)(images(2, 3, 48, 32), mm_per_pixel=MM)


@pytest.mark.parametrize("name", ["rope_mm", "scale", "plain"])
def test_encode_tells_networks_the_spacing(name: str) -> None:
    model = perturbed(variant(name))
    hu = torch.randint(-1000, 1000, (2, 3, 48, 32), dtype=torch.int16, generator=torch.Generator().manual_seed(8))
    spacing = torch.cat((torch.ones(2, 1), MM), dim=1)
    features = dinox_model.encode(model, hu, spacing)
    with torch.no_grad():
        expected = model(model.preprocess.apply(hu), mm_per_pixel=mm_for(model.config))
    assert torch.equal(features.patches, expected.patches)


def test_encode_works_without_a_cls_token() -> None:
    model = dinox_model.build(variant("bare"))
    assert dinox_model.encode(model, torch.zeros(1, 3, 20, 20, dtype=torch.int16), [[1, 1, 1]]).cls is None


@pytest.mark.parametrize("name", ["plain", "bare", "rms", "drop path"])
def test_the_sum_of_residuals_is_fp32_under_autocast(name: str) -> None:
    config = variant(name)
    model, x = perturbed(config), images(2, 3, 48, 32)
    seen: list[torch.dtype] = []
    for block in model.blocks:
        assert isinstance(block, Block)
        block.register_forward_hook(lambda block, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    draws = draw_from(config, 2, torch.Generator().manual_seed(0))
    exact = model(x, draws=draws)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x, draws=draws)
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(rounded.patches.float(), exact.patches, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_in_bf16_and_fp64_work(name: str) -> None:
    config = variant(name)
    model, x = perturbed(config), images(2, 3, 48, 32)
    exact = model(x, mm_per_pixel=mm_for(config)).patches
    for dtype, tolerance in ((torch.bfloat16, 0.3), (torch.float64, 1e-4)):
        found = model.to(dtype)(x.to(dtype), mm_per_pixel=mm_for(config)).patches
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact.double(), atol=tolerance, rtol=tolerance)
        model = perturbed(config)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_saved_and_loaded(name: str, tmp_path) -> None:
    model = perturbed(variant(name))
    dinox_model.save(model, tmp_path / "model")
    loaded = dinox_model.load(tmp_path / "model")
    assert loaded.config == model.config
    x, mm = images(2, 3, 48, 32), mm_for(model.config)
    assert torch.equal(joined(loaded(x, mm_per_pixel=mm)), joined(model(x, mm_per_pixel=mm)))


@pytest.mark.parametrize(
    "change",
    [{}, {"positions": "rope_mm", "scale_conditioning": True, "norm": "rms", "qk_norm": True}, VARIANTS["bare"]],
)
def test_networks_export_with_a_batch_of_any_size(change: dict) -> None:
    config = dataclasses.replace(TINY, num_layers=1, **change)
    model = perturbed(config).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    mm = mm_for(config)
    shapes = {"x": {0: batch}} | ({} if mm is None else {"mm_per_pixel": {0: batch}})
    inputs = {} if mm is None else {"mm_per_pixel": mm}
    with torch.no_grad():
        program = torch.export.export(model, (images(2, 3, 48, 32),), inputs, dynamic_shapes=shapes)
        for size in (1, 5):
            x = images(size, 3, 48, 32)
            inputs = {} if mm is None else {"mm_per_pixel": MM[:1].expand(size, -1).contiguous()}
            found, expected = program.module()(x, **inputs), model(x, **inputs)
            torch.testing.assert_close(found[2], expected.patches, atol=1e-5, rtol=1e-5)
