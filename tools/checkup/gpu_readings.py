"""Reads what the drivers tell of each GPU: NVIDIA's through nvidia-smi, AMD's from /sys. Judges nothing.

`nvidia_gpus` and `amd_gpus` are functions of text and files alone. They were tried on texts that were written after the
drivers' own formats, and on no card.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from checkup.machine import Gpu
from checkup.readings import ROOT, number, text
from dinox_train.watch.amd import read_amd
from dinox_train.watch.nvidia import THROTTLED_BY

NVIDIA_FIELDS = (
    *("name", "driver_version", "pcie.link.width.current", "pcie.link.width.max"),
    *("ecc.errors.uncorrected.volatile.total", "temperature.gpu", "power.draw", "power.limit", "power.default_limit"),
    "clocks_event_reasons.active",
)
NAMED_BEFORE = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}
"""The names of fields in drivers before 535, which refuse a whole question for one name that they do not know. Newer
ones take both today."""
_AMD, _DISPLAY = "0x1002", ("0x0300", "0x0302", "0x0380", "0x1200")
"""A vendor, and the beginnings of the PCI classes of GPUs (the last: accelerators without a display)."""


def read_gpus(root: Path = ROOT) -> tuple[Gpu, ...]:
    """All GPUs whose drivers are loaded, NVIDIA's first."""
    return (*nvidia_gpus(_nvidia_smi() if root == ROOT else ""), *amd_gpus(root))


def signs_of_gpus(root: Path = ROOT) -> tuple[str, ...]:
    """Makers of GPUs whose drivers are loaded: `nvidia`, `amd`."""
    signs = {"nvidia": ("proc/driver/nvidia", "dev/nvidia0"), "amd": ("dev/kfd",)}
    return tuple(kind for kind, places in signs.items() if any((root / place).exists() for place in places))


def _nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    for names in (NVIDIA_FIELDS, [NAMED_BEFORE.get(name, name) for name in NVIDIA_FIELDS]):
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.SubprocessError):
            return ""
        if done.returncode == 0:
            return done.stdout
    return ""


def nvidia_gpus(answer: str) -> tuple[Gpu, ...]:
    """From nvidia-smi's answer to NVIDIA_FIELDS: a line a GPU, commas between; `[N/A]` where it does not know."""
    found = []
    for line in answer.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(NVIDIA_FIELDS):
            continue
        row = dict(zip(NVIDIA_FIELDS, values, strict=True))
        active = _value(row["clocks_event_reasons.active"])
        found.append(
            Gpu(
                kind="nvidia",
                name=row["name"],
                driver=row["driver_version"],
                link_width=_whole(row["pcie.link.width.current"]),
                link_width_most=_whole(row["pcie.link.width.max"]),
                uncorrected_errors=_whole(row["ecc.errors.uncorrected.volatile.total"]),
                temperature_c=_value(row["temperature.gpu"]),
                power_w=_value(row["power.draw"]),
                power_limit_w=_value(row["power.limit"]),
                power_default_w=_value(row["power.default_limit"]),
                throttled=None if active is None else _reasons(int(active)),
            )
        )
    return tuple(found)


def _value(given: str) -> float | None:
    try:
        return float(int(given, 16)) if given.startswith("0x") else float(given)
    except ValueError:
        return None


def _whole(given: str) -> int | None:
    value = _value(given)
    return None if value is None else int(value)


def _reasons(active: int) -> str:
    return ", ".join(name for bit, name in THROTTLED_BY.items() if active & bit)


def amd_gpus(root: Path = ROOT) -> tuple[Gpu, ...]:
    """From /sys/class/drm/cardN/device of each AMD GPU, by card."""
    cards = sorted((root / "sys/class/drm").glob("card[0-9]*"), key=lambda path: path.name)
    devices = [card / "device" for card in cards if re.fullmatch(r"card\d+", card.name)]
    return tuple(_amd_gpu(device, root) for device in devices if _is_amd(device))


def _is_amd(device: Path) -> bool:
    return text(device / "vendor") == _AMD and (text(device / "class") or "").startswith(_DISPLAY)


def _amd_gpu(device: Path, root: Path) -> Gpu:
    figures = read_amd(device, shared=False)
    return Gpu(
        kind="amd",
        name=text(device / "product_name") or f"AMD {text(device / 'device') or 'GPU'}",
        driver=text(root / "sys/module/amdgpu/version"),
        firmware=_firmware(device),
        carve_out_bytes=number(device / "mem_info_vram_total"),
        gtt_bytes=number(device / "mem_info_gtt_total"),
        uncorrected_errors=_memory_errors(device),
        temperature_c=figures.temperature_c,
        power_w=figures.power_w,
        power_limit_w=_watts(device, "power1_cap"),
        power_default_w=_watts(device, "power1_cap_default"),
    )


def _firmware(device: Path) -> Mapping[str, int]:
    found = {
        path.name.removesuffix("_fw_version"): number(path) for path in (device / "fw_version").glob("*_fw_version")
    }
    return {name: version for name, version in sorted(found.items()) if version}


def _memory_errors(device: Path) -> int | None:
    """`ue: 0` of the memory controllers, where the card keeps count."""
    match = re.search(r"ue:\s*(\d+)", text(device / "ras/umc_err_count") or "")
    return int(match[1]) if match else None


def _watts(device: Path, name: str) -> float | None:
    found = (number(path) for path in (device / "hwmon").glob(f"hwmon*/{name}"))
    return next((value * 1e-6 for value in found if value is not None), None)
