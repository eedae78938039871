"""The machine a run is on: which device, what it is called, and whether matrix products really run in the dtype asked
for.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


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
                "install a build of torch for your GPU (docs/hardware.md)."
            )
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the networks run: a no-op for fp32, bfloat16 matrix products for bf16."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


class MatrixProducts(TorchDispatchMode):
    """Within it, the dtypes of all matrix products and attentions that really run are collected, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0].removeprefix("aten::")
        if name in _PRODUCTS or name.startswith("_scaled_dot_product"):
            first = output[0] if isinstance(output, tuple | list) else output
            self.dtypes[name, first.dtype] += 1
        return output


def assert_precision(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, precision: str) -> str:
    """Run `network` on `images` forward and backward, and check the dtype of each matrix product and attention.

    Returns what was seen, in words. Raises PrecisionError that names the operator and its dtype where it is not what
    `precision` says, or where no product was seen.
    """
    with MatrixProducts() as products:
        with autocast(images.device, precision):
            output = network(images)
        output.float().sum().backward()
    for (name, dtype), count in products.dtypes.items():
        if dtype != _DTYPES[precision]:
            raise PrecisionError(f"precision: {precision} was asked for, and {count} {name} run in {dtype}.")
    if not products.dtypes:
        raise PrecisionError("precision: no matrix product was seen; the check has lost sight of the network.")
    return ", ".join(f"{count} {name}" for (name, _), count in sorted(products.dtypes.items()))


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
