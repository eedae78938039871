"""The memory plan: exact for what networks hold, and within 10 % of what runs take."""

import gc
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dinox_model
from dinox_model import PRESETS, ViTConfig
from dinox_model.draws import draw_from
from dinox_model.execution import Execution, prepare
from dinox_model.heads.prototype import PrototypeHeadConfig
from dinox_model.memory_plan import (
    GLOBAL,
    GRADIENTS,
    HEADS,
    LOCAL,
    OPTIMIZER,
    PRECISIONS,
    TEACHER,
    WEIGHTS,
    MemoryPlan,
    plan_pass,
    plan_training,
)
from dinox_model.storage_meter import WEIGHT_CASTS, StorageMeter
from dinox_model.workload import Workload

SMALL = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64, layer_scale=0.5)
OPTIONS = {
    "plain": SMALL,
    "all": replace(
        SMALL, mlp="swiglu", norm="rms", qk_norm=True, qkv_bias="full", layer_scale=None, drop_path=0.4,
        rope_shift=0.1, positions="rope_mm", scale_conditioning=True, cls_token=False, untied_cls_norm=True,
    ),
    "learned": replace(SMALL, mlp="geglu", positions="learned", learned_grid=(3, 3), qkv_bias="none"),
    "stored": replace(SMALL, mlp="relu2", rope_stored_periods=True, in_channels=5),
}  # fmt: skip
HEAD = PrototypeHeadConfig(hidden=48, bottleneck=16, prototypes=200)


def parameters_of(config: ViTConfig, *heads: PrototypeHeadConfig) -> int:
    with torch.device("meta"):
        networks = [dinox_model.VisionTransformer(config), *(head.build(config) for head in heads)]
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_weights_of_presets_are_exact(name: str) -> None:
    plan = plan_pass(PRESETS[name], 1, 16)
    assert plan.items[WEIGHTS] == 4 * parameters_of(PRESETS[name])


@pytest.mark.parametrize("name", ["all", "stored"])
def test_what_stays_for_the_whole_update_is_exact(name: str) -> None:
    config = OPTIONS[name]
    workload = Workload(images=2, global_size=32, local_size=16, dino_head=HEAD, ibot_head=HEAD, masked_patches=3)
    plan = plan_training(config, workload, accumulates=True)
    trained = 4 * parameters_of(config, HEAD, HEAD)
    buffers = 4 * (config.head_width // 4) if config.rope_stored_periods else 0
    found = [plan.items[item] for item in (WEIGHTS, GRADIENTS, OPTIMIZER, TEACHER)]
    assert found == [trained + buffers, trained, 2 * trained, trained + buffers]
    gram = plan_training(config, replace(workload, gram_size=48), accumulates=True)
    assert gram.items["Gram teacher"] == 4 * parameters_of(config) + buffers


def test_bf16_weights_are_a_copy_of_the_linears_for_student_and_teacher() -> None:
    workload = Workload(images=2, global_size=32, local_size=16, dino_head=HEAD, ibot_head=None)
    fp32, bf16 = (plan_training(SMALL, workload, precision=p, accumulates=True) for p in ("fp32", "bf16_weights"))
    networks = [dinox_model.build(SMALL), HEAD.build(SMALL)]
    linears = [module for network in networks for module in network.modules() if isinstance(module, torch.nn.Linear)]
    copied = sum(parameter.numel() for linear in linears for parameter in linear.parameters())
    assert bf16.items["bf16 copies of weights"] == 2 * 2 * copied
    for item in (WEIGHTS, OPTIMIZER, TEACHER):
        assert bf16.items[item] == fp32.items[item]


def saved_bytes(model: dinox_model.VisionTransformer, x: Tensor, dtype: torch.dtype | None) -> int:
    """What autograd keeps of a real forward: each storage once, without the network's own."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} | {
        x.untyped_storage().data_ptr()
    }
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mm = torch.ones(len(x), 2) if model.config.uses_mm_per_pixel else None
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
        features = model(x, mm_per_pixel=mm)
    size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del features
    return size


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_saves(name: str, precision: str) -> None:
    config = OPTIONS[name]
    model = dinox_model.build(config)
    x = torch.randn(6, config.in_channels, 64, 48)
    measured = saved_bytes(model, x, torch.bfloat16 if precision == "bf16" else None)
    plan = plan_pass(config, 6, (64, 48), precision=precision, backward=True)
    planned = plan.kept[GLOBAL] + plan.kept[WEIGHT_CASTS]
    features = 4 * 6 * (12 + config.num_prefix_tokens) * 32  # what the forward returns is alive too
    assert planned - features == pytest.approx(measured, rel=0.1)
    assert planned >= measured


@pytest.mark.parametrize("precision", PRECISIONS[:2])
@pytest.mark.parametrize(
    ("name", "checkpointing"), [("plain", "none"), ("all", "none"), ("plain", "block"), ("all", "selective")]
)
def test_a_real_update_takes_what_was_planned(name: str, checkpointing: Any, precision: str) -> None:
    config, execution = OPTIONS[name], Execution(checkpointing=checkpointing)
    workload = Workload(images=4, global_size=64, local_size=32, num_local=3, dino_head=HEAD, ibot_head=None)
    planned = plan_training(config, workload, precision=precision, execution=execution)
    student, teacher = (torch.nn.ModuleList([dinox_model.build(config), HEAD.build(config)]) for _ in range(2))
    teacher.requires_grad_(False)
    prepare(student[0], execution)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    sizes = [(8, 64), (12, 32)]
    views = [torch.randn(number, config.in_channels, size, size) for number, size in sizes]
    mm = [torch.ones(len(x), 2) if config.uses_mm_per_pixel else None for x in views]
    draws = [draw_from(config, len(x), torch.Generator().manual_seed(0)) for x in views]
    step(student, teacher, optimizer, views, mm, draws, precision)  # makes the moments
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    with StorageMeter() as meter:
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        meter.see([*student.parameters(), *teacher.parameters(), *moments, *views])
        step(student, teacher, optimizer, views, mm, draws, precision)
    assert planned.peak == pytest.approx(meter.peak, rel=0.1)


def step(student: Any, teacher: Any, optimizer: Any, views: list, mm: list, draws: list, precision: str) -> None:
    """A DINO update written down once more, with softmax in the place of Sinkhorn."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        with torch.no_grad():
            targets = teacher[1](teacher[0](views[0], mm_per_pixel=mm[0]).pooled).float().softmax(dim=1)
        features = [student[0](x, mm_per_pixel=m, draws=d) for x, m, d in zip(views, mm, draws, strict=True)]
        logits = student[1](torch.cat([one.pooled for one in features])).float()
    del features
    scaled = logits / 0.1
    loss = scaled.logsumexp(dim=1).sum() - (scaled[: len(targets)] * targets).sum()
    del logits, scaled
    loss.backward()
    optimizer.step()


RESIDENT = """
import gc, re, torch, dinox_model
from dinox_model.execution import Execution, prepare
from dinox_model.memory_plan import plan_pass
config = dinox_model.ViTConfig(width=192, num_layers=8, num_heads=3, mlp_hidden=768)
images, size = 24, 96
def run(number, checkpointing):
    model = dinox_model.build(config)
    prepare(model, Execution(checkpointing=checkpointing))
    features = model(torch.ones(number, 3, size, size))
    sum(part.sum() for part in features[:3]).backward()
def resident(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
run(1, "block")  # what the libraries take when they are first used
gc.collect()
before = resident("VmRSS")
run(images, "block")
measured = resident("VmHWM") - before
print(plan_pass(config, images, size, execution=Execution(checkpointing="block"), backward=True).peak, measured)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux' /proc")
def test_the_process_grows_by_what_was_planned(repository: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(repository),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # freed memory goes back at once, so that the process has its true size
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", RESIDENT], env=environment, capture_output=True, text=True, check=True)
    planned, measured = map(int, done.stdout.split())
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_gpu_takes_what_was_planned(precision: str, checkpointing: Any, backward: bool) -> None:
    config, execution = PRESETS["vit_s"], Execution(checkpointing=checkpointing)
    planned = plan_pass(config, 32, 224, precision=precision, execution=execution, backward=backward).peak
    before = torch.cuda.memory_allocated()
    model = dinox_model.build(config).cuda()
    prepare(model, execution)
    x = torch.randn(32, 3, 224, 224, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.set_grad_enabled(backward), torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
        features = model(x)
    if backward:
        torch.stack([part.float().sum() for part in features[:3]]).sum().backward()
    assert planned == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)


def test_more_images_and_less_checkpointing_take_more() -> None:
    def peak(images: int, **choices: Any) -> int:
        workload = Workload(images=images, global_size=64, local_size=32, dino_head=HEAD, ibot_head=None)
        return plan_training(SMALL, workload, execution=Execution(**choices)).peak

    assert peak(4) < peak(8)
    assert peak(8, checkpointing="block") < peak(8, checkpointing="selective") < peak(8)


def test_a_plan_is_a_sum_of_items_and_a_table() -> None:
    plan = plan_training(SMALL, Workload(images=2, global_size=64, local_size=32, dino_head=HEAD, ibot_head=None))
    assert plan.peak == sum(plan.items.values())
    assert set(plan.kept) >= {GLOBAL, LOCAL, HEADS}
    lines = plan.lines()
    assert lines[-1].startswith("peak")
    assert math.isclose(float(lines[-1].split()[-2].replace(",", "")), plan.peak / 2**20, abs_tol=0.06)
    assert MemoryPlan({"weights": 3 * 2**20}, {}).lines()[0].split() == ["weights", "3.0", "MiB"]


def test_a_plan_leaves_no_trace() -> None:
    model = dinox_model.build(SMALL)
    x = torch.randn(2, 3, 64, 48)
    expected = model(x).patches
    plan_pass(SMALL, 2, (64, 48), backward=True, precision="bf16")
    assert torch.equal(model(x).patches, expected)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiple of 16 pixels high and wide, not 100 x 100"):
        plan_training(SMALL, Workload(images=1, local_size=100))
    with pytest.raises(ValueError, match=r"precision must be one of fp32, bf16, bf16_weights, not 'bf61'.*'bf16'"):
        plan_pass(SMALL, 1, 16, precision="bf61")
    with pytest.raises(ValueError, match="images must be at least 1, not 0"):
        plan_pass(SMALL, 0, 16)
