"""What the kernel's log says of failing hardware, counted by kind."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from checkup.finding import Status


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of trouble."""

    name: str
    pattern: re.Pattern[str]
    status: Status
    why: str
    mend: str


_GPU_FAULT = "the GPU or its driver failed since this machine was started, and will again"
KINDS = (
    Kind(
        name="NVIDIA Xid of hardware",
        pattern=re.compile(r"NVRM: Xid \([^)]*\): (48|6[0-4]|7[49]|9[2-5]|119|120|14\d|15\d)\b"),
        status="fail",
        why=_GPU_FAULT,
        mend="look the number up in NVIDIA's list of Xid errors; power and seat of the card, its driver, then the card",
    ),
    Kind(
        name="NVIDIA Xid",
        pattern=re.compile(r"NVRM: Xid"),
        status="warn",
        why="a program on the GPU was ended since this machine was started",
        mend="look the number up in NVIDIA's list of Xid errors; 13, 31 and 43 are faults of programs, ours too",
    ),
    Kind(
        name="amdgpu hang or reset",
        pattern=re.compile(
            r"amdgpu.*(ring \S+ timeout|GPU reset|page fault|MES failed|failed to (suspend|halt) )|HW exception"
        ),
        status="fail",
        why=_GPU_FAULT,
        mend="see the lines (`sudo dmesg | grep amdgpu`), and kernel, firmware and rocm on this page; docs/hardware.md",
    ),
    Kind(
        name="machine check",
        pattern=re.compile(r"mce: \[Hardware Error\]|EDAC .* UE "),
        status="fail",
        why="a processor or the memory reported an error of the hardware: bits of a run may flip unseen",
        mend="test the memory for a night, take away overclocking and memory profiles (XMP, EXPO), replace what fails",
    ),
    Kind(
        name="disk error",
        pattern=re.compile(
            r"blk_update_request: I/O error|I/O error, dev |EXT4-fs error|XFS .*orruption|nvme.*timeout"
        ),
        status="fail",
        why="checkpoints and shards lie on it",
        mend="`smartctl -a` of that disk; copy what is on it, and replace it",
    ),
    Kind(
        name="out of memory",
        pattern=re.compile(r"Out of memory: Killed process|oom-kill:"),
        status="warn",
        why="the kernel killed a process since the start because memory ran out",
        mend="find out which (`sudo dmesg | grep -i oom`); lower data.pool_mib, data.prefetch_mib or data.cache_mib, "
        "or stop what ran beside it",
    ),
    Kind(
        name="thermal throttling",
        pattern=re.compile(r"temperature (is )?above threshold|clock throttled"),
        status="warn",
        why="the processor got too hot and slowed itself",
        mend="clean filters and fans, make room for air; a fortnight is longer than any test",
    ),
)


def count(lines: Iterable[str]) -> Mapping[str, int]:
    """Lines of each kind; kinds that have none are left out."""
    found: dict[str, int] = {}
    for line in lines:
        for kind in KINDS:
            if kind.pattern.search(line):
                found[kind.name] = found.get(kind.name, 0) + 1
                break
    return found


def read() -> Mapping[str, int] | None:
    """Of this machine's log, since it was started; None: not readable by this user."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return count(done.stdout.splitlines())
