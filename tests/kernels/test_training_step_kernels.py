"""A whole update with every kernel on (attention, RoPE, norms, losses, optimizer, routing) equals the plain one."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinox_model import PRESETS, Preprocess
from dinox_model.kernels.dispatch import Kernels
from dinox_model.linear import OFF, Routes
from dinox_train.config import Config, validate
from dinox_train.kernel_choice import RunKernels
from dinox_train.learner import Learner
from dinox_train.micro_batch import GlobalBatch

CPU = torch.device("cpu")
ALL = RunKernels(
    network=Kernels(attention="triton", rotate="triton", residual_norm="triton"),
    fused_losses=True,
    fused_optimizer=True,
)
STRAY = 3e-5
"""Largest difference of a weight after an update that moves weights by 1e-3: Adam divides by the gradient's size, so
that rounding of the smallest gradients shows most."""


def config() -> Config:
    return validate(
        {
            "device": "cpu",
            "views": {"global_size": 32, "local_size": 16, "num_local": 1},
            "model": {"preset": "vit_ti", "layer_scale": 0.5},
            "objective": {"prototypes": 32, "head_hidden": 32, "head_bottleneck": 16},
            "optimizer": {"learning_rate": 1e-3},
            "train": {"batch_size": 2, "updates": 4},
        }
    )


class OurOperators(TorchDispatchMode):
    """Within it, the names of our operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("dinox::"):
            self.names.add(func.name().removeprefix("dinox::"))
        return func(*args, **(kwargs or {}))


def updated(kernels: RunKernels, routes: Routes) -> tuple[Learner, dict[str, float]]:
    learner = Learner(config(), Preprocess(), CPU, kernels, routes)
    images = (500 * torch.randn((2, 3, 48, 48), generator=torch.Generator().manual_seed(0))).to(torch.int16)
    made = GlobalBatch(learner.recipe(2), 0, gram=False)
    views, _ = made.micro_batch(images, np.arange(2), np.full((2, 2), 48), np.ones((2, 3)), None)
    result, _ = learner.step([views], 1)
    return learner, result.to_host()


def test_an_update_with_all_kernels_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(PRESETS["vit_ti"], num_layers=1, width=128, num_heads=2, mlp_hidden=64)
    monkeypatch.setitem(PRESETS, "vit_ti", tiny)
    plain, plain_figures = updated(RunKernels(), OFF)
    with OurOperators() as seen:
        ours, our_figures = updated(ALL, Routes(forward="cublas", grad_weight="cublas"))
    assert seen.names >= {"attention", "attention_backward", "residual_norm", "balanced_cross_entropy", "linear"}
    for name, value in plain_figures.items():
        assert our_figures[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for of_plain, of_ours in (
        (plain.networks.student_weights, ours.networks.student_weights),
        (plain.networks.teacher_weights, ours.networks.teacher_weights),
    ):
        assert float((of_plain.buffer - of_ours.buffer).abs().max()) < STRAY
    first = Learner(config(), Preprocess(), CPU)
    assert float((first.networks.student_weights.buffer - ours.networks.student_weights.buffer).abs().max()) > 5e-4
