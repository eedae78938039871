"""What env.json holds of machine and software."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


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
    packages = (
        "dinox",
        "torch",
        "triton",
        "pytorch-triton-rocm",
        "numpy",
        "zstandard",
        "xxhash",
        "msgpack",
        "safetensors",
        "pydantic",
    )
    return {
        "python": sys.version.split()[0],
        "kernel": platform.release(),
        "driver": _driver(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in packages},
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "device": str(device),
        "gpu": gpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_threads": torch.get_num_threads(),
        **_checkout(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The kernel's driver of the GPUs, as `nvidia 580.65.06`; None without one, or where it has no version of its own
    (an amdgpu that came with the kernel).
    """
    for name in ("nvidia", "amdgpu"):
        try:
            return f"{name} {Path(f'/sys/module/{name}/version').read_text(encoding='utf-8').strip()}"
        except OSError:
            continue
    return None


def _checkout() -> dict[str, Any]:
    """`commit` of the checkout this runs from and whether files differ from it (`dirty`); both None outside of one:
    then the version of the wheel, among `packages`, says what ran.
    """
    unknown = {"commit": None, "dirty": None}
    folder = Path(__file__).resolve().parent.parent.parent
    if not (folder / ".git").exists():
        return unknown
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return unknown
    return {"commit": said.removesuffix("-dirty"), "dirty": said.endswith("-dirty")} if said else unknown
