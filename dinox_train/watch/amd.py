"""An AMD GPU's figures, from the files that the driver amdgpu keeps in /sys; no library, and none of ROCm's tools.

A GPU without memory of its own (an APU, Strix Halo) takes the host's through GTT: there, free is what both leave.
The driver's files do not tell whether it throttles (concerns.py infers that from the clock): None.
"""

from __future__ import annotations

from pathlib import Path

from dinox_train.watch.gpu import GPUFigures
from dinox_train.watch.host import number_of, read_text

_AMD = "0x1002"
_HOTTEST = ("junction", "edge")
"""Of a GPU's sensors: junction is the hottest place, which the driver acts on; APUs have edge alone."""


def amd_folder(address: str | None, sys: Path = Path("/sys")) -> Path | None:
    """The folder of the GPU at a PCI address; without an address, that of the only AMD GPU; None where there is none.

    address: as gpu.pci_address gives it.
    """
    if address is not None:
        folder = sys / "bus" / "pci" / "devices" / address
        return folder if folder.is_dir() else None
    devices = [card / "device" for card in sorted((sys / "class" / "drm").glob("card*")) if card.name[4:].isdecimal()]
    ours = [device for device in devices if (read_text(device / "vendor") or "").strip() == _AMD]
    return ours[0] if len(ours) == 1 else None


def read_amd(folder: Path, shared: bool) -> GPUFigures:
    """The figures of the GPU in `folder`. shared: it has no memory of its own."""
    busy = number_of(read_text(folder / "gpu_busy_percent"), 0.01)
    pools = ("vram", "gtt") if shared else ("vram",)
    free = [_free(folder, pool) for pool in pools]
    sensors = next(iter(sorted((folder / "hwmon").glob("hwmon*"))), None)
    return GPUFigures(
        busy=busy,
        free_bytes=sum(size for size in free if size is not None) if any(size is not None for size in free) else None,
        temperature_c=_labelled(sensors, "temp", _HOTTEST, 1e-3),
        power_w=_power(sensors),
        clock_mhz=_clock(folder, sensors),
    )


def parse_active_mhz(levels: str | None) -> float | None:
    """pp_dpm_sclk: the clock of the level with a star, MHz. Lines are `1: 1100Mhz *`."""
    for line in (levels or "").splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "*":
            return number_of(words[1].lower().removesuffix("mhz"))
    return None


def _free(folder: Path, pool: str) -> int | None:
    total, used = (number_of(read_text(folder / f"mem_info_{pool}_{what}")) for what in ("total", "used"))
    return None if total is None or used is None else int(total - used)


def _labelled(sensors: Path | None, kind: str, labels: tuple[str, ...], scale: float) -> float | None:
    """The sensor of the first label that is there; the first sensor where they have no labels."""
    if sensors is None:
        return None
    found = {(read_text(file) or "").strip(): file for file in sorted(sensors.glob(f"{kind}*_label"))}
    file = next((found[label] for label in labels if label in found), sensors / f"{kind}1_label")
    return number_of(read_text(file.with_name(file.name.replace("_label", "_input"))), scale)


def _power(sensors: Path | None) -> float | None:
    """Watt: the driver's average, or, where it has none, the moment's."""
    if sensors is None:
        return None
    values = (number_of(read_text(sensors / name), 1e-6) for name in ("power1_average", "power1_input"))
    return next((value for value in values if value is not None), None)


def _clock(folder: Path, sensors: Path | None) -> float | None:
    moment = _labelled(sensors, "freq", ("sclk",), 1e-6)
    return parse_active_mhz(read_text(folder / "pp_dpm_sclk")) if moment is None else moment
