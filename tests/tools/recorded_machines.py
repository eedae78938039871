"""Machines that the doctor is tried on: what drivers, files and torch would say, written after the drivers' formats.

A folder of files stands for /proc, /sys and /etc; torch's part is given. As they stand they pass all checks; each test
spoils one thing.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from checkup import checks
from checkup.finding import Finding, Status
from checkup.gpu_readings import amd_gpus, nvidia_gpus
from checkup.machine import Disk, Machine, Software, Trials, Wanted
from checkup.readings import read_host, read_system

from dinox_train.platform.bandwidth import Bandwidth
from dinox_train.platform.facts import Facts

GIB = 2**30
TORCH = "2.13.0"
STRIX = {
    "proc/sys/kernel/osrelease": "6.18.9-200.fc43.x86_64",
    "proc/cmdline": "BOOT_IMAGE=/vmlinuz root=UUID=1-2-3 ro ttm.pages_limit=29360128 ttm.page_pool_size=29360128",
    "proc/meminfo": "MemTotal: 131072000 kB\nMemAvailable: 120000000 kB\nSwapTotal: 8388608 kB\nSwapFree: 8388608 kB\n",
    "proc/sys/vm/overcommit_memory": "0",
    "proc/self/cgroup": "0::/user.slice/session-2.scope",
    "proc/self/limits": "Limit  Soft Limit  Hard Limit  Units\nMax open files            65536    524288    files\n",
    "sys/fs/cgroup/user.slice/memory.max": "max",
    "sys/fs/cgroup/user.slice/session-2.scope/memory.max": "max",
    "sys/fs/cgroup/user.slice/cpu.max": "max 100000",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
    "sys/devices/system/cpu/cpu0/cpufreq/energy_performance_preference": "performance",
    "sys/firmware/acpi/platform_profile": "performance",
    "sys/module/amdgpu/parameters/cwsr_enable": "1",
    "sys/class/drm/card1/device/vendor": "0x1002",
    "sys/class/drm/card1/device/device": "0x1586",
    "sys/class/drm/card1/device/class": "0x038000",
    "sys/class/drm/card1/device/mem_info_vram_total": str(512 << 20),
    "sys/class/drm/card1/device/mem_info_gtt_total": str(112 * GIB),
    "sys/class/drm/card1/device/fw_version/mes_fw_version": "0x00000080",
    "sys/class/drm/card1/device/hwmon/hwmon4/name": "amdgpu",
    "sys/class/drm/card1/device/hwmon/hwmon4/temp1_label": "edge",
    "sys/class/drm/card1/device/hwmon/hwmon4/temp1_input": "41000",
    "sys/class/drm/card1/device/hwmon/hwmon4/power1_average": "9012000",
    "sys/class/drm/card1-HDMI-A-1/status": "connected",
    "sys/class/hwmon/hwmon2/name": "k10temp",
    "sys/class/hwmon/hwmon2/temp1_input": "48250",
    "sys/power/state": "freeze mem disk",
    "run/systemd/system/x": "",
    "etc/systemd/logind.conf": "[Login]\n#IdleAction=ignore\n",
}
"""Fedora on a Strix Halo, as docs/hardware.md sets it up."""
H200_SAYS = "NVIDIA H200, 580.65.06, 16, 16, 0, 33, 77.42, 700.00, 700.00, 0x0000000000000001\n"
RTX_SAYS = "NVIDIA GeForce RTX 4090, 575.57.08, 16, 16, [N/A], 38, 21.10, 450.00, 450.00, 0x0000000000000001\n"


def write(root: Path, files: dict[str, str]) -> Path:
    """A folder that is the machine's root."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


def facts(**given: Any) -> Facts:
    usual = {
        "kind": "amd",
        "architecture": "gfx1151",
        "name": "AMD Radeon Graphics",
        "memory_bytes": 112 * GIB,
        "host_memory_bytes": 125 * GIB,
        "unified": True,
        "units": 20,
        "torch": TORCH,
        "runtime": "7.2.53211",
        "system": "6.18.9",
    }
    return Facts(**(usual | given))


def trials(of: Facts, *, tflops: float, device: float, bus: float) -> Trials:
    return Trials(
        facts=of,
        copies=Bandwidth(host=40.0, device=device, to_device=bus, to_device_pinned=bus, from_device=bus),
        layouts=(f"products, forward: default {tflops:.3g} TFLOP/s",),
        tflops=dict.fromkeys(("forward", "grad_input", "grad_weight"), tflops),
        routing="off: routing by layout would save 0.0% of the products' time",
        attention="sdpa-flash",
        attention_reason="201 tokens: auto: sdpa-flash: 0.1 ms",
    )


def software(**given: Any) -> Software:
    usual = {
        "python": "3.12.4",
        "torch": TORCH,
        "build": "rocm",
        "runtime": "7.2.53211",
        "architectures": ("gfx1151",),
        "triton": "3.7.1",
        "compiler": "",
        "filters": "C (AVX2)",
        "switches": ("ROCBLAS_USE_HIPBLASLT=0, set: so that rocBLAS is rocBLAS, and products can be routed",),
        "signs": ("amd",),
        "may_open": True,
    }
    return Software(**(usual | given))


def machine(root: Path, files: dict[str, str], of: Facts, soft: Software, tried: Trials, smi: str = "") -> Machine:
    system = replace(read_system(write(root, files)), troubles={})
    return Machine(
        system=system,
        host=read_host(root),
        gpus=(*nvidia_gpus(smi), *amd_gpus(root)),
        software=soft,
        devices=(of,) if of.is_gpu else (),
        device="cuda:0" if of.is_gpu else "cpu",
        trials=tried,
        disk=Disk(kind="ext4", free_bytes=10**12, write_bytes_per_s=1.5e9, read_bytes_per_s=3e9),
        wanted=Wanted(),
    )


def strix_halo(root: Path, changed: dict[str, str] | None = None) -> Machine:
    """changed: files that say something else."""
    of = facts()
    return machine(root, STRIX | (changed or {}), of, software(), trials(of, tflops=33.0, device=210.0, bus=80.0))


def rx_7900_xtx(root: Path) -> Machine:
    card = "sys/class/drm/card0/device"
    files = {name: text for name, text in STRIX.items() if "drm/" not in name} | {
        "proc/cmdline": "root=UUID=1 ro",
        f"{card}/vendor": "0x1002",
        f"{card}/class": "0x030000",
        f"{card}/mem_info_vram_total": str(24 * GIB),
        f"{card}/mem_info_gtt_total": str(62 * GIB),
        f"{card}/hwmon/hwmon4/temp2_label": "junction",
        f"{card}/hwmon/hwmon4/temp2_input": "44000",
        f"{card}/hwmon/hwmon4/power1_average": "15000000",
        f"{card}/hwmon/hwmon4/power1_cap": "303000000",
        f"{card}/hwmon/hwmon4/power1_cap_default": "303000000",
    }
    of = facts(architecture="gfx1100", name="Radeon RX 7900 XTX", memory_bytes=24 * GIB, unified=False, units=48)
    soft = software(architectures=("gfx1100",))
    return machine(root, files, of, soft, trials(of, tflops=60.0, device=800.0, bus=25.0))


def mi300x(root: Path) -> Machine:
    card = "sys/class/drm/card1/device"
    files = {
        "proc/sys/kernel/osrelease": "6.8.0-79-generic",
        "proc/meminfo": "MemTotal: 2113000000 kB\nMemAvailable: 2000000000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB",
        f"{card}/vendor": "0x1002",
        f"{card}/class": "0x120000",
        f"{card}/mem_info_vram_total": str(192 * GIB),
        f"{card}/ras/umc_err_count": "ue: 0\nce: 3\n",
    }
    of = facts(architecture="gfx942", name="AMD Instinct MI300X", memory_bytes=192 * GIB, unified=False, units=304)
    soft = software(architectures=("gfx942",))
    return machine(root, files, of, soft, trials(of, tflops=600.0, device=4000.0, bus=50.0))


def nvidia(root: Path, name: str, says: str) -> Machine:
    """rtx_4090 or h200."""
    files = {
        "proc/sys/kernel/osrelease": "6.8.0-79-generic",
        "proc/meminfo": "MemTotal: 131072000 kB\nMemAvailable: 120000000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB",
    }
    rtx = name == "rtx_4090"
    of = facts(
        kind="nvidia",
        architecture="sm_89" if rtx else "sm_90",
        name="NVIDIA GeForce RTX 4090" if rtx else "NVIDIA H200",
        memory_bytes=(24 if rtx else 140) * GIB,
        unified=False,
        runtime="13.0",
    )
    soft = software(
        build="cuda",
        runtime="13.0",
        architectures=("sm_80", "sm_86", "sm_90"),
        signs=("nvidia",),
        may_open=None,
        switches=(),
    )
    tried = trials(of, tflops=130.0 if rtx else 700.0, device=900.0 if rtx else 4300.0, bus=25.0)
    return machine(root, files, of, soft, tried, says)


def cpu(root: Path) -> Machine:
    of = facts(kind="cpu", architecture="cpu", name="Some processor", units=2, runtime=None, memory_bytes=16 * GIB)
    files = {
        "proc/sys/kernel/osrelease": "6.8.0-79-generic",
        "proc/meminfo": "MemTotal: 16384000 kB\nMemAvailable: 12000000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB",
    }
    soft = software(build="cpu", runtime=None, architectures=(), signs=(), may_open=None, switches=(), triton=None)
    tried = replace(trials(of, tflops=0.1, device=1.0, bus=1.0), copies=Bandwidth(host=9.0))
    return machine(root, files, of, soft, tried)


def found(machine: Machine) -> dict[str, Finding]:
    findings, _ = checks.examine(machine)
    assert len({finding.id for finding in findings}) == len(findings)
    return {finding.id: finding for finding in findings}


def one(machine: Machine, name: str) -> tuple[Status, str]:
    """Status, and all words, of one finding."""
    finding = found(machine)[name]
    return finding.status, f"{finding.seen} | {finding.why} | {finding.mend}"
