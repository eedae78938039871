"""The machine a run is on: which device, what it is called, and whether matrix products really run in the dtype asked
for.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NO_COMPILER = (
    "execution.compile needs a compiler, and torch finds {missing} for {device}. Install it ({package}), or set "
    "execution.compile=off."
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16_weights": torch.bfloat16}
"""By the configuration's `precision`: of matrix products and attention."""
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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the networks run: a no-op for fp32, else matrix products in bfloat16.

    Raises KeyError for another precision than the configuration knows.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=_DTYPES[precision] == torch.bfloat16)


class MatrixProducts(TorchDispatchMode):
    """Within it, the dtypes of all matrix products and attentions that really run are collected, by operator, and how
    many of `parameters` (matrices) are cast to another dtype on the way.
    """

    def __init__(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.dtypes: Counter[tuple[str, torch.dtype]] = Counter()
        self.casts = 0
        self._matrices = {parameter.data_ptr() for parameter in parameters if parameter.ndim == 2}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0].removeprefix("aten::")
        first: Any = output[0] if isinstance(output, tuple | list) else output
        if name in _PRODUCTS or name.startswith("_scaled_dot_product"):
            self.dtypes[name, first.dtype] += 1
        if name == "_to_copy" and first.dtype != args[0].dtype and args[0].data_ptr() in self._matrices:
            self.casts += 1
        return output


def assert_precision(
    network: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    precision: str,
    parameters: Iterable[torch.Tensor],
) -> str:
    """Run `network` on `images` forward and backward, and check the dtype of each matrix product and attention.

    parameters: those that `network` has. Matrices among them are cast on the way in bf16, where they are fp32, and
    never in fp32 and bf16_weights. Returns what was seen, in words. Raises PrecisionError that names the operator and
    its dtype where it is not what `precision` says, or where no product was seen.
    """
    with MatrixProducts(parameters) as products:
        with autocast(images.device, precision):
            output = network(images)
        output.float().sum().backward()
    for (name, dtype), count in products.dtypes.items():
        if dtype != _DTYPES[precision]:
            raise PrecisionError(f"precision: {precision} was asked for, and {count} {name} run in {dtype}.")
    if not products.dtypes:
        raise PrecisionError("precision: no matrix product was seen; the check has lost sight of the network.")
    if bool(products.casts) != (precision == "bf16"):
        raise PrecisionError(
            f"precision: {precision} was asked for, and {products.casts} weights are cast to another dtype in a "
            "forward: in bf16 all are, in fp32 and bf16_weights none is."
        )
    seen = ", ".join(f"{count} {name}" for (name, _), count in sorted(products.dtypes.items()))
    return f"{seen}; {products.casts} weights cast"


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
