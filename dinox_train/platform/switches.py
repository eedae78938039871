"""Switches of the libraries below torch, in the environment: set where safe, checked where not, told always.

They work if set before the library in question first looks; `settle` is called before the device does anything.
Invariant: what the user has set stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from dinox_train.platform.facts import Facts

ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""One setting under its names of different years."""


@dataclass(frozen=True)
class Switch:
    """One variable of the environment that should have a value on some machine."""

    name: str
    value: str
    why: str


def switches_for(facts: Facts) -> tuple[Switch, ...]:
    """Those that are safe to set on such a machine."""
    found: list[Switch] = []
    if facts.is_rdna:
        found += [
            Switch(
                "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL",
                "1",
                "without it attention falls to the math path, some 15 times slower",
            ),
            Switch("TRITON_HIP_USE_IN_THREAD_TRANSPOSE", "1", "fewer trips through shared memory in our kernels"),
        ]
    if facts.kind == "amd":
        found.append(Switch("ROCBLAS_USE_HIPBLASLT", "0", "so that rocBLAS is rocBLAS, and products can be routed"))
        if facts.unified:
            found.append(Switch(ALLOCATOR_NAMES[0], "expandable_segments:True", "large pools of a shared memory"))
    return tuple(found)


def settle(facts: Facts, environment: MutableMapping[str, str]) -> list[str]:
    """Set what is safe and not set yet; what was done, and found, in words. Warnings begin with `warning: `."""
    lines: list[str] = []
    for switch in switches_for(facts):
        names = ALLOCATOR_NAMES if switch.name in ALLOCATOR_NAMES else (switch.name,)
        given = next((name for name in names if name in environment), None)
        if given is None:
            environment[switch.name] = switch.value
            lines.append(f"{switch.name}={switch.value}, set: {switch.why}")
        elif environment[given] == switch.value:
            lines.append(f"{given}={switch.value}, as it was")
        else:
            lines.append(f"{given}={environment[given]} is yours and stays; {switch.value} is advised: {switch.why}")
    return lines + _warnings(facts, environment)


def _warnings(facts: Facts, environment: Mapping[str, str]) -> list[str]:
    found: list[str] = []
    if facts.kind == "amd" and environment.get("HSA_OVERRIDE_GFX_VERSION"):
        found.append(
            f"warning: HSA_OVERRIDE_GFX_VERSION={environment['HSA_OVERRIDE_GFX_VERSION']} makes ROCm run code for "
            "another chip, which faults with today's builds: unset it"
        )
    for name in ALLOCATOR_NAMES:
        if facts.kind == "amd" and "backend:malloc" in environment.get(name, ""):
            found.append(f"warning: {name} has backend:malloc, which crashes on AMD: take it away")
    return found
