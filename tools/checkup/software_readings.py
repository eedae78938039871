"""Reads Python, torch, Triton, compilers and the environment. Judges nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from checkup import environment
from checkup.gpu_readings import signs_of_gpus
from checkup.machine import Software
from dinox_train.platform.device import check_compiler
from dinox_train.platform.facts import Facts, find

PROJECT = Path(__file__).resolve().parents[2]
_COMPUTE_DEVICE = Path("/dev/kfd")


def read_software(device: torch.device, variables: Mapping[str, str], switches: tuple[str, ...]) -> Software:
    """What a run on `device` would be run by. variables: of the environment; switches: what was said of it."""
    from environment.machine import in_range  # of tools/, the folder of this script

    return Software(
        python=platform.python_version(),
        torch=torch.__version__,
        in_range=in_range(torch.__version__, PROJECT),
        build=_build(),
        runtime=torch.version.hip or torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()) if torch.cuda.is_available() else (),
        triton=_triton(),
        compiler=_missing_compiler(device),
        filters=_filters(),
        environment=environment.kept(variables),
        switches=switches,
        signs=signs_of_gpus(),
        may_open=os.access(_COMPUTE_DEVICE, os.R_OK | os.W_OK) if _COMPUTE_DEVICE.exists() else None,
    )


def read_devices() -> tuple[Facts, ...]:
    """All GPUs that torch sees, in its order."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(find(torch.device("cuda", index)) for index in range(count))


def _build() -> Literal["cpu", "cuda", "rocm"]:
    if torch.version.hip is not None:
        return "rocm"
    return "cpu" if torch.version.cuda is None else "cuda"


def _triton() -> str | None:
    for name in ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _missing_compiler(device: torch.device) -> str:
    try:
        check_compiler(device)
    except ValueError as error:
        return str(error)
    return ""


def _filters() -> str | None:
    try:
        from dinox_io import codec
    except ImportError:  # zstandard or xxhash: this may run before `make setup`
        return None
    return codec.describe().removeprefix("filters: ")
