"""How networks run: checkpointing and compiling change memory and speed, never results, gradients or names."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dinox_model
from dinox_model import ViTConfig
from dinox_model.draws import draw, draw_from, keep_rows, num_residuals
from dinox_model.execution import Execution, prepare
from dinox_model.storage_meter import StorageMeter

# Dynamo looks at each input's .grad, and hides the warning for it, where warnings are no errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

PLAIN = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=48, layer_scale=0.5)
OPTIONS = {
    "plain": PLAIN,
    "all": replace(
        PLAIN,
        layer_scale=None, mlp="swiglu", norm="rms", qk_norm=True, qkv_bias="full", drop_path=0.4, rope_shift=0.2,
        rope_jitter=1.2, rope_rescale=2.0, positions="rope_mm", scale_conditioning=True, cls_token=False,
        untied_cls_norm=True,
    ),
    "learned": replace(PLAIN, mlp="relu2", qkv_bias="none", positions="learned", learned_grid=(4, 4)),
    "fourier": replace(PLAIN, mlp="geglu", positions="fourier", num_registers=0, drop_path=0.3),
}  # fmt: skip
CHECKPOINTED = [
    Execution(checkpointing=kind, checkpoint_every=n) for kind, n in product(("block", "selective"), (1, 2))
]


def images(number: int, side: int = 48) -> Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(number + side))


def everything_of(model: dinox_model.VisionTransformer, views: list[Tensor], dtype: torch.dtype | None = None) -> list:
    """Features of several sizes of view, then the gradients of their sum."""
    config, generator = model.config, torch.Generator().manual_seed(5)
    model.zero_grad(set_to_none=True)
    parts: list[Tensor] = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
        for x in views:
            mm = torch.rand(len(x), 2, generator=generator) if config.uses_mm_per_pixel else None
            draws = draw_from(config, len(x), generator)
            features = model(x, draws=draws, mm_per_pixel=mm, layers=(0,), local_crops=config.untied_cls_norm)
            parts += [part for part in (*features[:3], features.layers[0].patches) if part is not None]
    torch.stack([(part.float() * part.float().sin()).sum() for part in parts]).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [part.detach() for part in parts] + gradients


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile with all of its tracing and none of its code generation; the graphs that were made."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    return graphs


@pytest.mark.parametrize("execution", CHECKPOINTED, ids=lambda e: f"{e.checkpointing}-{e.checkpoint_every}")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpointing_changes_no_bit(name: str, execution: Execution, dtype: torch.dtype | None) -> None:
    model = dinox_model.build(OPTIONS[name])
    # With two views autocast adds up a weight's two gradients in bf16, and a checkpointed block in fp32.
    views = [images(4), images(6, 32)] if dtype is None else [images(4)]
    expected = everything_of(model, views, dtype)
    prepare(model, execution)
    for ours, theirs in zip(everything_of(model, views, dtype), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("execution", CHECKPOINTED, ids=lambda e: f"{e.checkpointing}-{e.checkpoint_every}")
def test_checkpointing_two_views_in_bf16_changes_little(execution: Execution) -> None:
    model = dinox_model.build(PLAIN)
    views = [images(4), images(6, 32)]
    expected = everything_of(model, views, torch.bfloat16)
    prepare(model, execution)
    for ours, theirs in zip(everything_of(model, views, torch.bfloat16), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2 * float(theirs.abs().max()), rtol=0)


def kept_bytes(execution: Execution, config: ViTConfig = PLAIN) -> int:
    model = dinox_model.build(config)
    prepare(model, execution)
    with StorageMeter() as meter:
        meter.see(model.parameters())
        before, features = meter.live, model(images(8))
        kept = meter.live - before
        features.patches.sum().backward()
    return kept


def test_less_is_kept_with_more_checkpointing() -> None:
    deep = replace(PLAIN, num_layers=6)
    kept = [
        kept_bytes(Execution(), deep),
        kept_bytes(Execution(checkpointing="selective"), deep),
        kept_bytes(Execution(checkpointing="block", checkpoint_every=2), deep),
        kept_bytes(Execution(checkpointing="block"), deep),
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[1] < 0.7 * kept[0]
    per_block = (kept[3] - kept_bytes(Execution(checkpointing="block"), PLAIN)) / (6 - 2)
    assert per_block == 8 * (9 + 5) * 32 * 4, "a checkpointed block keeps its input and nothing else"


def flops_of(execution: Execution) -> int:
    model = dinox_model.build(PLAIN)
    prepare(model, execution)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images(2)).patches.sum().backward()
    return counter.get_total_flops()


def test_selective_checkpointing_repeats_no_product() -> None:
    assert flops_of(Execution(checkpointing="selective")) == flops_of(Execution())
    assert flops_of(Execution(checkpointing="block")) > 1.2 * flops_of(Execution())


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("plain", "none"), ("all", "none"), ("all", "block"), ("plain", "selective")]
)
def test_blocks_compiled_compute_the_same(name: str, checkpointing: Any, eager_compiler: list) -> None:
    model = dinox_model.build(OPTIONS[name])
    views = [images(4), images(6, 32)]
    expected = everything_of(model, views)
    prepare(model, Execution(compile="blocks", checkpointing=checkpointing))
    for ours, theirs in zip(everything_of(model, views), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert eager_compiler, "nothing was compiled"


@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_whole_network_compiled_computes_the_same(name: str, eager_compiler: list) -> None:
    model = dinox_model.build(OPTIONS[name])
    expected = everything_of(model, [images(4)])
    prepare(model, Execution(compile="full"))
    for ours, theirs in zip(everything_of(model, [images(4)]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len(eager_compiler) == 1


def test_each_size_is_compiled_once_for_all_blocks_and_numbers_of_images(eager_compiler: list) -> None:
    model = dinox_model.build(PLAIN)
    prepare(model, Execution(compile="blocks"))
    for number, side, graphs in ((4, 48, 1), (16, 32, 2), (3, 48, 2), (5, 32, 2), (4, 48, 2)):
        model(images(number, side)).patches.sum().backward()
        assert len(eager_compiler) == graphs, (number, side)
    with torch.no_grad():
        for number in (4, 7):
            model(images(number, 48))
    assert len(eager_compiler) == 3, "without gradients a size is a graph of its own"


def test_a_whole_network_is_compiled_once_for_each_size(eager_compiler: list) -> None:
    model = dinox_model.build(replace(PLAIN, num_layers=1))
    prepare(model, Execution(compile="full"))
    for number, side, graphs in ((4, 48, 1), (16, 32, 2), (3, 48, 2), (5, 32, 2)):
        model(images(number, side))
        assert len(eager_compiler) == graphs, (number, side)


def test_networks_do_not_share_the_room_for_graphs(eager_compiler: list) -> None:
    from torch import _dynamo

    with torch.no_grad(), _dynamo.config.patch(recompile_limit=2):
        for width in (8, 16):
            model = dinox_model.build(ViTConfig(width=width, num_layers=1, num_heads=1, mlp_hidden=8))
            prepare(model, Execution(compile="blocks"))
            for side in (16, 32):
                model(images(2, side))
    assert len(eager_compiler) == 4


@pytest.mark.fault  # a minute of C++ compiler; the tests above trace and run the same graphs without it
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for torch.compile")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, as it imports its code generator
def test_generated_code_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    model = dinox_model.build(PLAIN)
    x = images(4)
    with torch.no_grad():
        expected = model(x).patches
        prepare(model, Execution(compile="blocks"))
        torch.testing.assert_close(model(x).patches, expected, atol=1e-5, rtol=1e-5)
    assert list(tmp_path.rglob("*.cpp")), "no code was generated"


def test_rows_that_drop_path_keeps_are_no_new_shape(eager_compiler: list) -> None:
    config = replace(PLAIN, drop_path=0.4)
    model = dinox_model.build(config)
    prepare(model, Execution(compile="blocks"))
    kept = keep_rows(np.random.default_rng(0).random((24, num_residuals(config))), config.drop_path)
    counts = set()
    for rows in np.arange(24).reshape(3, 8):
        draws = draw(config, kept, None, rows)
        counts |= {len(indices) for indices in draws.kept or ()}
        model(images(8), draws=draws)
    assert len(counts) > 3
    assert len(eager_compiler) == 1


@pytest.mark.parametrize("execution", [Execution(compile="blocks"), Execution(compile="full"), *CHECKPOINTED])
def test_names_copies_and_the_way_back(execution: Execution, eager_compiler: list) -> None:
    model = dinox_model.build(PLAIN)
    names = list(model.state_dict())
    prepare(model, execution)
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    x = images(2)
    assert not twin(x).patches.any(), "a copy runs its own weights"
    assert model(x).patches.any()
    prepare(model, Execution())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_head_is_compiled_as_a_whole(eager_compiler: list) -> None:
    head = dinox_model.PrototypeHead(8, 8, 4, 12)
    x = torch.randn(3, 8)
    expected = head(x)
    prepare(head, Execution(compile="blocks", checkpointing="block"))
    torch.testing.assert_close(head(x), expected)
    head(torch.randn(7, 8))
    assert len(eager_compiler) == 1
    prepare(head, Execution(checkpointing="block"))
    assert "forward" not in vars(head)


@pytest.mark.parametrize("name", ["plain", "all", "learned"])
def test_networks_can_be_exported_with_any_number_of_images(name: str) -> None:
    config = OPTIONS[name]
    model = dinox_model.build(config).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    mm = torch.rand(2, 2) if config.uses_mm_per_pixel else None
    named = {"mm_per_pixel": mm} if mm is not None else {}
    shapes = {"x": {0: batch}} | ({"mm_per_pixel": {0: batch}} if named else {})
    program = torch.export.export(model, (images(2),), named, dynamic_shapes=shapes)
    for number in (1, 5):
        x = images(number)
        named = {"mm_per_pixel": torch.rand(number, 2)} if mm is not None else {}
        torch.testing.assert_close(program.module()(x, **named).patches, model(x, **named).patches)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compile": "block"}, "Execution.compile must be one of off, blocks, full.*did you mean 'blocks'"),
        ({"checkpointing": "selectiv"}, "did you mean 'selective'"),
        ({"checkpoint_every": 0}, "Execution.checkpoint_every must be at least 1"),
    ],
)
def test_other_choices_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Execution(**values)


DISABLED = """
import torch, dinox_model
from dinox_model.execution import Execution, prepare
from torch._dynamo.utils import counters
model = dinox_model.build(dinox_model.ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=48, layer_scale=0.5))
x = torch.randn(2, 3, 32, 32)
expected = model(x).patches
for choice in ("blocks", "full"):
    prepare(model, Execution(compile=choice))
    assert torch.equal(model(x).patches, expected)
    model(x).patches.sum().backward()
assert not counters["stats"], counters
"""


def test_torch_compile_disable_runs_eagerly(repository: Path) -> None:
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": str(repository)}
    subprocess.run([sys.executable, "-c", DISABLED], check=True, env=environment, timeout=120)
