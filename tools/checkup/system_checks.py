"""Kernel, firmware, ROCm, the memory an APU may map, and what slows or ends a run from outside: facts -> findings."""

from __future__ import annotations

from checkup import known_bad
from checkup.finding import Outcome, Unread, fail, ok, warn
from checkup.kernel_log import KINDS
from checkup.machine import Machine
from dinox_train.platform.memory import HOST_RESERVE

_GIB = 2**30
_PAGES_PER_GIB = 262144
"""Of 4 KiB."""
LEAST_GTT, MOST_CARVE_OUT = 0.75, 4 * _GIB
"""What of the host's memory an APU should be able to map, and what it should keep for itself at most."""


def kernel(machine: Machine) -> Outcome:
    """Linux kernels that break this GPU."""
    release, taken = machine.system.release, machine.taken
    parameters = f" ({', '.join(machine.system.parameters)})" if machine.system.parameters else ""
    seen = f"Linux {release}{parameters}"
    for row in known_bad.KERNELS:
        if taken and taken.architecture in row.architectures:
            bad = known_bad.kernel_is_bad(row, release, machine.system.cwsr)
            if bad and row.status == "fail":
                return fail("kernel", seen, why=f"{row.why} ({row.source})", mend=row.mend)
            if bad:
                return warn("kernel", seen, why=f"{row.why} ({row.source})", mend=row.mend)
    if taken and taken.kind == "amd" and "microsoft" in release.lower():
        return warn(
            "kernel",
            f"{seen}, Windows' Linux",
            why="the GPU's events give wrong times there, by which kernels are chosen and stages are timed "
            "(gstoner/tessera, measured)",
            mend="install Linux itself; until then name the kernels in the configuration (kernels: reference)",
        )
    return ok("kernel", seen)


def firmware(machine: Machine) -> Outcome:
    """Firmware versions that break this GPU."""
    taken = machine.taken
    rows = [row for row in known_bad.FIRMWARE if taken and taken.architecture in row.architectures]
    if not rows:
        return None
    seen = {name: version for gpu in machine.gpus for name, version in gpu.firmware.items()}
    for row in rows:
        if seen.get(row.part) == row.version:
            return fail("firmware", f"{row.part} {row.version:#x}", why=f"{row.why} ({row.source})", mend=row.mend)
    if any(row.part not in seen for row in rows):
        return Unread("firmware", "sudo grep MES /sys/kernel/debug/dri/*/amdgpu_firmware_info: 0x83 is broken")
    return ok("firmware", ", ".join(f"{row.part} {seen[row.part]:#x}" for row in rows))


def rocm(machine: Machine) -> Outcome:
    """Versions of ROCm, and the ways into it, that break this GPU."""
    software, taken = machine.software, machine.taken
    if software.build != "rocm" or software.runtime is None:
        return None
    for row in known_bad.RUNTIMES:
        if taken and taken.architecture in row.architectures and known_bad.runtime_is_bad(row, software.runtime):
            return fail("rocm", f"ROCm {software.runtime}", why=f"{row.why} ({row.source})", mend=row.mend)
    return ok("rocm", f"ROCm {software.runtime}")


def gtt(machine: Machine) -> Outcome:
    """On an APU: how much of the memory the GPU may map, and how much the host has lost to it."""
    if machine.taken is None or machine.taken.kind != "amd" or not machine.taken.unified:
        return None
    gpu = next((gpu for gpu in machine.gpus if gpu.gtt_bytes is not None), None)
    if gpu is None or gpu.gtt_bytes is None:
        return Unread("gtt", "cat /sys/class/drm/card*/device/mem_info_gtt_total")
    total, mapped, own = machine.host.memory_bytes, gpu.gtt_bytes, gpu.carve_out_bytes or 0
    seen = f"the GPU may map {mapped / _GIB:.1f} of {total / _GIB:.1f} GiB, and keeps {own / _GIB:.1f} GiB for itself"
    wide = max(1, int((total - HOST_RESERVE) / _GIB))
    mend = (
        f"in the BIOS the smallest UMA frame buffer (512 MiB); for the kernel ttm.pages_limit={wide * _PAGES_PER_GIB} "
        f"ttm.page_pool_size={wide * _PAGES_PER_GIB} ({wide} GiB); amdgpu.gttsize is not needed"
    )
    wanted = machine.wanted.memory_gib
    if wanted is not None and wanted * _GIB > mapped + own:
        return fail("gtt", seen, why=f"the run counts on {wanted:g} GiB (execution.memory_gib)", mend=mend)
    if own > MOST_CARVE_OUT:
        return warn(
            "gtt", seen, why="what the GPU keeps for itself is lost to the host, and torch does not need it", mend=mend
        )
    if mapped < LEAST_GTT * total:
        return warn("gtt", seen, why="larger batches and networks would fit", mend=mend)
    return ok("gtt", seen)


def power_plan(machine: Machine) -> Outcome:
    """Settings that trade speed for power."""
    system = machine.system
    governors, preferences = set(system.governors), set(system.preferences)
    parts = [*sorted(governors), *sorted(preferences), *([system.profile] if system.profile else [])]
    if not parts:
        return None
    seen = f"processors: {', '.join(dict.fromkeys(parts))}"
    # With a preference, `powersave` is the name of the driver's own, dynamic choice.
    saves = ("powersave" in governors and not preferences) or "power" in preferences
    if saves or system.profile in ("low-power", "quiet", "cool"):
        return warn(
            "power-plan",
            seen,
            why="loader and launches wait for a slow processor, and the GPU of an APU gets less power",
            mend="powerprofilesctl set performance, or tuned-adm profile accelerator-performance",
        )
    return ok("power-plan", seen)


def sleep(machine: Machine) -> Outcome:
    """Whether the machine goes to sleep on a run."""
    reason = machine.system.suspends
    if reason is None:
        return None
    if reason:
        return warn(
            "sleep",
            reason,
            why="a run makes no key presses: it looks idle, and few drivers wake up with a run in them",
            mend="sudo systemctl mask sleep.target suspend.target hibernate.target hybrid-sleep.target",
        )
    return ok("sleep", "nothing sends it to sleep")


def restarts(machine: Machine) -> Outcome:
    """Whether something restarts the machine, or changes drivers under a run."""
    system = machine.system
    resumes = "and have tools/supervise.py start the run at boot (docs/supervise.md)"
    if system.reboots:
        return warn(
            "restarts",
            system.reboots,
            why="a run of two weeks meets it",
            mend=f'set Automatic-Reboot "false" (apt), or reboot = never (dnf), {resumes}',
        )
    if system.upgrades:
        return warn(
            "restarts",
            f"{system.upgrades} installs upgrades",
            why="beside a new driver nothing starts, a resumed run neither, until the machine restarts",
            mend=f"hold the packages of kernel, firmware and driver for these two weeks, {resumes}",
        )
    if system.reboot_pending:
        return warn(
            "restarts",
            "upgrades wait for a restart",
            why="what runs is not what is installed",
            mend="restart before the run begins",
        )
    if system.reboots is None:
        return None
    return ok("restarts", "nothing that we know of restarts it or upgrades it by itself")


def kernel_log(machine: Machine) -> Outcome:
    """Faults of hardware since the start."""
    troubles = machine.system.troubles
    if troubles is None:
        return Unread("kernel-log", "sudo dmesg | grep -E 'Xid|amdgpu|Hardware Error|I/O error'")
    found = [kind for kind in KINDS if troubles.get(kind.name)]
    if not found:
        return ok("kernel-log", "no fault of hardware since the machine was started")
    seen = ", ".join(f"{kind.name}: {troubles[kind.name]} lines" for kind in found)
    why, mend = ("; ".join(dict.fromkeys(getattr(kind, name) for kind in found)) for name in ("why", "mend"))
    bad = any(kind.status == "fail" for kind in found)
    return fail("kernel-log", seen, why=why, mend=mend) if bad else warn("kernel-log", seen, why=why, mend=mend)


CHECKS = (kernel, firmware, rocm, gtt, power_plan, kernel_log, sleep, restarts)
