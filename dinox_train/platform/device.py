"""Which device a run is on, and whether it has what torch.compile needs."""

from __future__ import annotations

import torch

_NO_COMPILER = (
    "execution.compile needs a compiler, and torch finds {missing} for {device}. Install it ({package}), or set "
    "execution.compile=off."
)
_NOT_OURS = {
    "mps": "Apple's GPUs (mps: it has no 64-bit floats)",
    "xpu": "Intel's GPUs (xpu: never tried)",
    "hpu": "Gaudi (hpu)",
    "xla": "TPUs (xla)",
    "npu": "Ascend NPUs (npu)",
}


def check_device_name(name: str) -> str:
    """`name`, if it is auto, cpu, cuda or cuda:N. Raises ValueError else, also for devices that DINOX cannot use."""
    kind, colon, index = name.partition(":")
    if kind in _NOT_OURS:
        raise ValueError(
            f"device {name}: DINOX trains on CPUs, on NVIDIA GPUs (cuda) and on AMD GPUs (cuda too: ROCm calls itself "
            f"so), not on {_NOT_OURS[kind]}. Set device=cpu."
        )
    if kind not in ("auto", "cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"device {name!r} is none: it is auto, cpu, cuda or cuda:N")
    return name


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a torch device. Raises ValueError where there is no such GPU, and for kinds
    of devices that DINOX does not train on.
    """
    if check_device_name(name) == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"device: {name} was asked for, and torch {torch.__version__} sees {count} GPUs. Set device=cpu, or "
                "install a build of torch for your GPU (docs/hardware.md)."
            )
    return device


def idle_accelerator(device: torch.device) -> str | None:
    """Words for the log where a run is on the CPU beside an accelerator that it cannot use; None elsewhere."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device.type != "cpu" or found is None:
        return None
    if found.type == "cuda":
        return "this run is on the CPU; the GPU beside it stays idle (device=auto takes it)"
    return f"this run is on the CPU: DINOX does not train on {_NOT_OURS.get(found.type, found.type)}"


def check_compiler(device: torch.device) -> None:
    """Raises ValueError where torch.compile has no compiler for the device: C++ for a CPU, Triton for a GPU."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, OSError) as error:
            raise ValueError(_NO_COMPILER.format(missing="no C++ one", device="the CPU", package="g++")) from error
    else:
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError(_NO_COMPILER.format(missing="no Triton", device=device, package="pip install triton"))
