"""Variables of the environment that slow or break training where somebody once set them and forgot.

Those that the trainer sets itself are in dinox_train/platform/switches.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


def _on(value: str) -> bool:
    return value.strip().lower() not in ("", "0", "false", "off", "no")


@dataclass(frozen=True, kw_only=True)
class Harmful:
    """One variable, where it does harm, and what it does."""

    name: str
    on: tuple[str, ...]
    """Kinds of devices: cpu, nvidia, amd."""
    does: str
    harms: Callable[[str], bool] = _on
    """Whether this value does."""


_GPUS = ("nvidia", "amd")
HARMFUL = (
    Harmful(name="CUDA_LAUNCH_BLOCKING", on=_GPUS, does="waits for each kernel: for finding faults only"),
    Harmful(name="HIP_LAUNCH_BLOCKING", on=("amd",), does="waits for each kernel: for finding faults only"),
    Harmful(name="AMD_SERIALIZE_KERNEL", on=("amd",), does="waits for each kernel: for finding faults only"),
    Harmful(name="AMD_SERIALIZE_COPY", on=("amd",), does="waits for each copy: for finding faults only"),
    Harmful(name="PYTORCH_NO_CUDA_MEMORY_CACHING", on=_GPUS, does="asks the driver for each tensor's memory"),
    Harmful(name="TRITON_INTERPRET", on=_GPUS, does="runs Triton's kernels in Python, on the CPU"),
    Harmful(
        name="PYTORCH_TUNABLEOP_TUNING",
        on=("amd",),
        does="tunes inside the run: one was seen to go from 2.7 to 60 s an update (comfyui-amd-go-fast#2); tune "
        "outside, with python -m dinox_train.platform tune",
    ),
    Harmful(name="TORCHDYNAMO_DISABLE", on=("cpu", *_GPUS), does="turns execution.compile off without a word"),
    Harmful(name="TORCH_COMPILE_DISABLE", on=("cpu", *_GPUS), does="turns execution.compile off without a word"),
    Harmful(
        name="NVIDIA_TF32_OVERRIDE",
        on=("nvidia",),
        does="makes fp32 products TF32, behind torch and `precision`",
        harms=lambda value: value.strip() == "1",
    ),
)
"""In the order in which they are told."""
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Say which GPUs a process sees; empty or -1: none."""


def kept(environment: Mapping[str, str]) -> dict[str, str]:
    """Of an environment, the variables that the checks look at; their values cut to 64 characters."""
    names = (*(row.name for row in HARMFUL), *HIDING)
    return {name: environment[name][:64] for name in names if name in environment}
