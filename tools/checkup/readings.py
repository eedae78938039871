"""Reads what Linux tells of itself: kernel, memory, limits, power, what may restart it. Judges nothing.

Invariant: all is read below `root`, so that a folder of recorded files is a machine; what is missing is None.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from checkup import kernel_log
from checkup.machine import Host, System
from dinox_train.watch.host import cpu_sensor, number_of, read_text

ROOT = Path("/")
_Number = TypeVar("_Number", int, float)
_PARAMETERS = re.compile(r"^(amdgpu|ttm|amd_iommu|iommu|nvidia|pcie_aspm|pci)[._=]")
_SLEEP_TARGETS = ("sleep.target", "suspend.target")


def text(path: Path) -> str | None:
    """A small file's text without blanks around it; None: there is none, or it is not for us."""
    found = read_text(path)
    return None if found is None else found.strip()


def number(path: Path) -> int | None:
    """A file that holds one integer, decimal or 0x hexadecimal."""
    found = text(path)
    try:
        return None if found is None else int(found, 0)
    except ValueError:
        return None


def read_system(root: Path = ROOT) -> System:
    """The kernel of this machine, and what it is told to do."""
    here = root == ROOT
    processors = root / "sys/devices/system/cpu"
    return System(
        release=platform.release() if here else text(root / "proc/sys/kernel/osrelease") or "",
        parameters=tuple(word for word in (text(root / "proc/cmdline") or "").split() if _PARAMETERS.match(word)),
        cwsr=number(root / "sys/module/amdgpu/parameters/cwsr_enable"),
        governors=_each(processors, "cpu[0-9]*/cpufreq/scaling_governor"),
        preferences=_each(processors, "cpu[0-9]*/cpufreq/energy_performance_preference"),
        profile=text(root / "sys/firmware/acpi/platform_profile"),
        suspends=suspends(root),
        reboots=reboots(root),
        upgrades=upgrades(root),
        reboot_pending=(root / "run/reboot-required").exists(),
        troubles=kernel_log.read() if here else None,
    )


def _each(folder: Path, pattern: str) -> tuple[str, ...]:
    found = (text(path) for path in folder.glob(pattern))
    return tuple(sorted({value for value in found if value}))


# --- what ends a run from outside --------------------------------------------------------------------------------


def suspends(root: Path) -> str | None:
    """Why the machine may go to sleep by itself; empty: it does not; None: it has no systemd to ask."""
    if not (root / "run/systemd/system").exists():
        return None
    if "mem" not in (text(root / "sys/power/state") or "").split() or all(
        _is_masked(root, target) for target in _SLEEP_TARGETS
    ):
        return ""
    for line in _settings(root, ("etc/systemd/logind.conf", "etc/systemd/logind.conf.d/*.conf")):
        if re.match(r"IdleAction\s*=\s*(suspend|hibernate|hybrid-sleep|suspend-then-hibernate)", line):
            return f"logind has {line.replace(' ', '')}"
    return "it has a desktop, whose power settings may" if _has_desktop(root) else ""


def _is_masked(root: Path, unit: str) -> bool:
    path = root / "etc/systemd/system" / unit
    return path.is_symlink() and path.readlink() == Path("/dev/null")


def _has_desktop(root: Path) -> bool:
    for place in ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system"):
        target = root / place / "default.target"
        if target.is_symlink():
            return target.readlink().name == "graphical.target"
    return False


def reboots(root: Path) -> str | None:
    """What may restart the machine by itself; empty: nothing that we know of."""
    for line in _settings(root, ("etc/apt/apt.conf.d/*",)):
        if re.match(r'Unattended-Upgrade::Automatic-Reboot\s+"?(true|1|yes)"?\s*;', line):
            return "unattended-upgrades restarts it (Automatic-Reboot)"
    for line in _settings(root, ("etc/dnf/automatic.conf",)):
        if re.match(r"reboot\s*=\s*(when-needed|when-changed)", line):
            return f"dnf-automatic restarts it ({line.replace(' ', '')})"
    return ""


def upgrades(root: Path) -> str | None:
    """What installs upgrades by itself; empty: nothing that we know of."""
    for line in _settings(root, ("etc/apt/apt.conf.d/*",)):
        if re.match(r'APT::Periodic::Unattended-Upgrade\s+"?[1-9]', line):
            return "unattended-upgrades"
    wanted = root / "etc/systemd/system/timers.target.wants"
    if any(wanted.glob("dnf*-automatic*.timer")):
        return "dnf-automatic"
    return ""


def _settings(root: Path, patterns: tuple[str, ...]) -> Iterator[str]:
    """Lines of settings files that are no comments."""
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            for line in (text(path) or "").splitlines():
                if line.strip() and not line.lstrip().startswith(("#", "//", ";")):
                    yield line.strip()


# --- processors and memory ---------------------------------------------------------------------------------------


def read_host(root: Path = ROOT) -> Host:
    """Processors and memory, and how much of them this process may use."""
    memory = _memory(root)
    groups = _control_groups(root)
    here = root == ROOT
    return Host(
        cores=os.cpu_count() or 1 if here else len(list((root / "sys/devices/system/cpu").glob("cpu[0-9]*"))) or 1,
        memory_bytes=memory.get("MemTotal", 0),
        available_bytes=memory.get("MemAvailable"),
        swap_bytes=memory.get("SwapTotal", 0),
        swap_used_bytes=memory.get("SwapTotal", 0) - memory.get("SwapFree", 0),
        overcommit=number(root / "proc/sys/vm/overcommit_memory"),
        memory_limit_bytes=_smallest(_memory_limit(group) for group in groups),
        cpu_limit=_smallest(_cpu_limit(group) for group in groups),
        open_files=_open_files(root),
        temperature_c=_temperature(root),
    )


def _memory(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = (text(root / "proc/meminfo") or "").splitlines()
    matches = (re.match(r"(\w+):\s+(\d+) kB", line) for line in lines)
    return {match[1]: int(match[2]) << 10 for match in matches if match}


def _control_groups(root: Path) -> list[Path]:
    """The folders of this process's control group (version 2) and of those above it, or those of version 1."""
    base = root / "sys/fs/cgroup"
    own = next(
        (line[3:] for line in (text(root / "proc/self/cgroup") or "").splitlines() if line.startswith("0::")), ""
    )
    folder = base / own.lstrip("/")
    found = [folder, *(above for above in folder.parents if above == base or base in above.parents)]
    return [*dict.fromkeys((*found, base)), base / "memory", base / "cpu"]


def _memory_limit(group: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        limit = number(group / name)
        if limit is not None and limit < 1 << 60:  # version 1 has a huge number for none
            return limit
    return None


def _cpu_limit(group: Path) -> float | None:
    quota, _, period = (text(group / "cpu.max") or "").partition(" ")
    if not quota:
        first, second = number(group / "cpu.cfs_quota_us"), number(group / "cpu.cfs_period_us")
        return first / second if first and second and first > 0 else None
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _smallest(values: Iterator[_Number | None]) -> _Number | None:
    return min((value for value in values if value is not None), default=None)


def _open_files(root: Path) -> int | None:
    if root == ROOT:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return None if soft == resource.RLIM_INFINITY else soft
    match = re.search(r"Max open files\s+(\d+)", text(root / "proc/self/limits") or "")
    return int(match[1]) if match else None


def _temperature(root: Path) -> float | None:
    sensor = cpu_sensor(root / "sys/class/hwmon")
    return None if sensor is None else number_of(read_text(sensor), 1e-3)
