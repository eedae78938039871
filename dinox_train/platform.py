"""The machine a run is on: which device, what it is called, and whether matrix products really run in the dtype asked
for.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PrecisionError(RuntimeError):
    """Matrix products run in another dtype than the configuration asks for."""


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a torch device. Raises ValueError where there is no such GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"device: {name} was asked for, and torch {torch.__version__} sees {count} GPUs. Set device=cpu, or "
                "install "
                "a build of torch for your GPU (docs/hardware.md)."
            )
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the networks run: a no-op for fp32, bfloat16 matrix products for bf16."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def asserted_precision(network: nn.Module, precision: str) -> Iterator[list[torch.dtype]]:
    """Within the context, every Linear of `network` that is called must give the dtype `precision` names.

    Yields the list of dtypes seen (one a call). Raises PrecisionError at the first other one, naming the layer.
    """
    wanted, seen = _DTYPES[precision], []

    def hook_of(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def check(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            seen.append(output.dtype)
            if output.dtype != wanted:
                raise PrecisionError(f"precision: {precision} was asked for, and {name} computes in {output.dtype}.")

        return check

    handles = [
        module.register_forward_hook(hook_of(name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def describe(device: torch.device) -> dict[str, Any]:
    """What env.json holds of the machine and the software. No host name, no user name, no path."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "architecture": getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}"),
        }
    packages = ("dinox", "torch", "numpy", "zstandard", "xxhash", "msgpack", "safetensors", "pydantic")
    return {
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in packages},
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "device": str(device),
        "gpu": gpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this runs from, `-dirty` behind it where files differ; None outside a checkout."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
