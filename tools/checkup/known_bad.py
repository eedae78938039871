"""Combinations of hardware, kernel, firmware and software that are known to break or slow a run, each with its source.

Data, no code that reads: a new one is a new row. Versions are compared as tuples of numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from checkup.finding import Status


@dataclass(frozen=True, kw_only=True)
class BadFirmware:
    """A version of a firmware that breaks an architecture."""

    architectures: tuple[str, ...]
    part: str
    version: int
    why: str
    mend: str
    source: str


@dataclass(frozen=True, kw_only=True)
class BadKernel:
    """Linux kernels before `since` that break an architecture."""

    architectures: tuple[str, ...]
    since: tuple[int, ...]
    status: Status
    why: str
    mend: str
    source: str
    unless_cwsr_off: bool = False
    """amdgpu.cwsr_enable=0 avoids it."""
    mended_oem: int | None = None
    """Ubuntu's OEM kernels from this number on have the fix, whatever their version."""


@dataclass(frozen=True, kw_only=True)
class BadRuntime:
    """Versions of ROCm that break an architecture: those before `since`, and `also`."""

    architectures: tuple[str, ...]
    since: tuple[int, ...]
    also: tuple[tuple[int, ...], ...] = ()
    status: Status
    why: str
    mend: str
    source: str


@dataclass(frozen=True, kw_only=True)
class BadTriton:
    """Versions of Triton, from `since` on, that are slow on some architectures."""

    architectures: tuple[str, ...]
    since: tuple[int, ...]
    why: str
    mend: str
    source: str


STRIX_HALO = ("gfx1151",)

FIRMWARE = (
    BadFirmware(
        architectures=("gfx1150", "gfx1151"),
        part="mes",
        version=0x83,
        why="MES firmware 0x83 (linux-firmware 20251125) hangs the GPU and faults in plain kernels",
        mend="install a linux-firmware that has 0x80 or one after 0x83 (20251111, or 20260110 and later), rebuild the "
        "initramfs, restart; a left-over amdgpu-dkms-firmware package brings 0x83 back",
        source="ROCm/legacy-rocm-build#5724, #5991; kyuz0/amd-strix-halo-toolboxes",
    ),
)

KERNELS = (
    BadKernel(
        architectures=STRIX_HALO,
        since=(6, 18),
        status="fail",
        why="it knows a wrong number of registers of this GPU, and kernels that use many, as ours do, crash or hang "
        "when waves are stored",
        mend="take Linux 6.18.4 or later; until then start the kernel with amdgpu.cwsr_enable=0",
        source="ROCm/TheRock#2991, ROCm/legacy-rocm-build#5590",
        unless_cwsr_off=True,
        mended_oem=1018,
    ),
    BadKernel(
        architectures=STRIX_HALO,
        since=(6, 18, 4),
        status="warn",
        why="kernels before 6.18.4 are reported to be unstable on this GPU",
        mend="take Linux 6.18.4 or later",
        source="kyuz0/amd-strix-halo-toolboxes",
        mended_oem=1018,
    ),
)

RUNTIMES = (
    BadRuntime(
        architectures=STRIX_HALO,
        since=(7, 2),
        also=((7, 9), (7, 10)),
        status="fail",
        why="its runtime knows a wrong number of registers of this GPU: crashes under kernels that use many",
        mend="install a torch for ROCm 7.2 or later (7.9 and 7.10, which are earlier than 7.11, have it too)",
        source="ROCm/TheRock#2991",
    ),
)

TRITONS = (
    BadTriton(
        architectures=("gfx1151", "gfx1100"),
        since=(3, 9),
        why="it spills registers in attention's backward, where Triton 3.7 spills none",
        mend="take the Triton that torch 2.13 is made with (3.7.1); `auto` tries attention's forms on this machine and "
        "passes over a slow one",
        source="docs/kernels.md, which was compiled with both",
    ),
)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (6, 18, 9) of 6.18.9-200.fc43; empty: none."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def kernel_is_bad(row: BadKernel, release: str, cwsr: int | None) -> bool:
    """Whether `row` speaks of this kernel, as it was started."""
    version = numbers(release)
    if not version or version >= row.since or (row.unless_cwsr_off and cwsr == 0):
        return False
    oem = re.search(r"-(\d+)-oem", release)
    return not (row.mended_oem is not None and oem is not None and int(oem[1]) >= row.mended_oem)


def runtime_is_bad(row: BadRuntime, runtime: str) -> bool:
    """Whether `row` speaks of this version of ROCm."""
    version = numbers(runtime)[:2]
    return bool(version) and (version < row.since or version in row.also)
