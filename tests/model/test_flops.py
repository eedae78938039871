"""FLOPs from a shape: equal to what torch counts while the network runs, and to the table of DINOv3's recipes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dinox_model
from dinox_model import PRESETS, ViTConfig
from dinox_model.draws import draw_from
from dinox_model.execution import Execution, prepare
from dinox_model.flops import FlopsRow, forward_flops, head_flops, kept_rows, training_flops
from dinox_model.heads.prototype import PrototypeHeadConfig
from dinox_model.workload import Workload, grid_of, masked_patches, num_tokens

SMALL = ViTConfig(width=32, num_layers=3, num_heads=2, mlp_hidden=48, layer_scale=0.5)
HEAD = PrototypeHeadConfig(hidden=24, bottleneck=8, prototypes=40)
OPTIONS = {
    "plain": SMALL,
    "gated": replace(SMALL, mlp="swiglu", norm="rms", qk_norm=True, qkv_bias="full", layer_scale=None),
    "geglu": replace(SMALL, mlp="geglu", positions="rope_mm", scale_conditioning=True, cls_token=False),
    "relu2": replace(SMALL, mlp="relu2", positions="learned", learned_grid=(3, 3), num_registers=0, layer_scale=None),
    "one slice": replace(SMALL, in_channels=1, patch_size=8, positions="fourier"),
    "drop path": replace(SMALL, drop_path=0.4),
}


def counted(model: dinox_model.VisionTransformer, x: torch.Tensor, backward: bool) -> int:
    """What torch counts, with attention as plain matrix products."""
    config = model.config
    mm = torch.ones(len(x), 2) if config.uses_mm_per_pixel else None
    draws = draw_from(config, len(x), torch.Generator().manual_seed(0)) if backward else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = model(x, mm_per_pixel=mm, draws=draws)
        if backward:
            features.patches.square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
def test_forward_is_what_torch_counts(name: str, size: tuple[int, int]) -> None:
    config = OPTIONS[name]
    found = counted(dinox_model.build(config), torch.randn(3, config.in_channels, *size), backward=False)
    assert 3 * sum(forward_flops(config, size).values()) == found


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
@pytest.mark.parametrize("every", [1, 2])
def test_backward_and_recomputing_are_what_torch_counts(name: str, checkpointing: str, every: int) -> None:
    config, execution = OPTIONS[name], Execution(checkpointing=checkpointing, checkpoint_every=every)  # type: ignore[arg-type]
    model = dinox_model.build(config)
    if model.scale is not None:
        torch.nn.init.ones_(model.scale.down.weight)
    prepare(model, execution)
    workload = Workload(images=5, num_global=1, num_local=0, global_size=32, dino_head=None, ibot_head=None)
    found = counted(model, torch.randn(5, config.in_channels, 32, 32), backward=True)
    flops = training_flops(config, workload, execution)
    assert flops.total - flops.of(step="teacher") == found


def test_heads_are_what_torch_counts() -> None:
    head = HEAD.build(SMALL)
    x = torch.randn(7, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        head(x).sum().backward()
    assert counter.get_total_flops() == 3 * 7 * head_flops(32, HEAD)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_torch_counts(name: str) -> None:
    config = replace(PRESETS[name], num_layers=2)
    with FakeTensorMode(), torch.no_grad():
        found = counted(dinox_model.VisionTransformer(config), torch.empty(1, 3, 224, 224), backward=False)
    assert sum(forward_flops(config, 224).values()) == found
    deep, shallow = forward_flops(PRESETS[name], 224), forward_flops(config, 224)
    for part in ("qkv", "attention", "projection", "mlp"):
        assert deep[part] * 2 == shallow[part] * PRESETS[name].num_layers


# An image's 2 global and 8 local views, both heads of 65536 prototypes, half of the global views masked.
TABLE = [
    ("vit_s", 224, 96, None, 0.0, 0.130),
    ("vit_b", 224, 96, None, 0.0, 0.469),
    ("vit_l", 224, 96, None, 0.0, 1.62),
    ("vit_l", 224, 96, None, 0.3, 1.21),
    ("vit_g", 224, 96, None, 0.0, 5.98),
    ("vit_7b", 224, 96, None, 0.0, 35.1),
    ("vit_l", 512, 112, None, 0.0, 6.67),
    ("vit_l", 512, 224, None, 0.0, 8.89),
    ("vit_l", 512, 112, 1024, 0.0, 15.0),
    ("vit_l", 256, 112, 512, 0.0, 3.58),
    ("vit_g", 512, 112, None, 0.0, 23.8),
]


@pytest.mark.parametrize(("name", "global_size", "local_size", "gram_size", "drop_path", "tera"), TABLE)
def test_updates_of_known_recipes(
    name: str, global_size: int, local_size: int, gram_size: int | None, drop_path: float, tera: float
) -> None:
    config = replace(PRESETS[name], drop_path=drop_path)
    rows, columns = grid_of(config, global_size)
    workload = Workload(
        images=64,
        global_size=global_size,
        local_size=local_size,
        gram_size=gram_size,
        masked_patches=masked_patches(128, rows * columns),
    )
    flops = training_flops(config, workload)
    # The table takes thrice the forward for the student; the images' gradient, which nobody needs, is up to 0.4 %.
    assert flops.per_image == pytest.approx(1e12 * tera, rel=5e-3)
    assert flops.per_image < 1e12 * tera * 1.001
    assert sum(row.flops for row in flops.rows) == flops.total
    if gram_size == 1024:
        assert flops.of(step="gram teacher") / flops.total == pytest.approx(0.55, abs=0.01)


def test_parts_and_passes() -> None:
    workload = Workload(images=2, global_size=32, local_size=16, num_local=3, masked_patches=6,
                        dino_head=HEAD, ibot_head=HEAD)  # fmt: skip
    flops = training_flops(SMALL, workload, Execution(checkpointing="block"))
    assert FlopsRow("teacher", "dino_head", 4 * head_flops(32, HEAD)) in flops.rows
    assert FlopsRow("student forward", "dino_head", 10 * head_flops(32, HEAD)) in flops.rows
    assert FlopsRow("student backward", "ibot_head", 2 * 6 * head_flops(32, HEAD)) in flops.rows
    assert flops.of(step="student backward", part="mlp") == 2 * flops.of(step="student forward", part="mlp")
    assert flops.of(step="recomputation", part="qkv") == flops.of(step="student forward", part="qkv")
    assert flops.of(part="patch_embed") == 2 * 2 * 768 * 32 * (2 * 4 * (1 + 1 + 1) + 3 * (1 + 1))


@given(st.integers(1, 200), st.floats(0.0, 0.99))
def test_rows_kept_are_those_that_the_draws_keep(rows: int, drop_path: float) -> None:
    kept = kept_rows(rows, drop_path)
    assert 1 <= kept <= rows
    draws = draw_from(replace(SMALL, num_layers=1, drop_path=drop_path), rows, torch.Generator())
    if draws.kept is not None:
        assert [len(indices) for indices in draws.kept] == [kept, kept]


@pytest.mark.parametrize(("views", "patches", "total"), [(128, 196, 3771), (128, 256, 4941), (32, 1024, 5114)])
def test_masked_patches_of_known_batches(views: int, patches: int, total: int) -> None:
    assert masked_patches(views, patches) == total


def test_tokens_and_views_that_are_none() -> None:
    assert num_tokens(SMALL, 224) == 201
    assert num_tokens(replace(SMALL, cls_token=False, num_registers=0), (96, 160)) == 60
    with pytest.raises(ValueError, match="multiple of 16 pixels high and wide, not 40 x 32"):
        num_tokens(SMALL, (40, 32))
    with pytest.raises(ValueError, match="masked_patches is 3, and there is no ibot_head"):
        Workload(images=1, masked_patches=3, ibot_head=None)
