"""An NVIDIA GPU's figures, from NVML, the driver's own library, called by ctypes: no package, no program is started.

Each figure is asked for by itself: one that this GPU or driver does not have is None, the others stand.
"""

from __future__ import annotations

import ctypes
from typing import Any

from dinox_train.watch.gpu import GPUFigures

_LIBRARY = "libnvidia-ml.so.1"
_SM_CLOCK, _GPU_SENSOR = 1, 0
THROTTLED_BY = {
    0x08: "hardware slowdown",
    0x20: "heat, by software",
    0x40: "heat, by hardware",
    0x80: "the supply of power",
}
"""Of the reasons for a clock (nvmlClocksEventReason*), those that are faults. The power limit (0x04) is none: a GPU
that is used well sits at it."""


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """One GPU, as NVML sees it."""

    def __init__(self, address: str | None, uuid: str | None, library: Any = None) -> None:
        """address: as gpu.pci_address gives it. uuid: as torch gives it; either of them is enough.

        library: for tests; None: the driver's. Raises OSError where there is none, or where it does not know the GPU.
        """
        self._library = ctypes.CDLL(_LIBRARY) if library is None else library
        self._handle = ctypes.c_void_p()
        if self._call("nvmlInit_v2"):
            raise OSError("NVML does not start")
        named = (
            ("nvmlDeviceGetHandleByPciBusId_v2", address),
            ("nvmlDeviceGetHandleByUUID", uuid and f"GPU-{uuid.removeprefix('GPU-')}"),
        )
        for function, name in named:
            if name and not self._call(function, ctypes.c_char_p(name.encode()), ctypes.byref(self._handle)):
                return
        raise OSError(f"NVML knows no GPU {address or uuid}")

    def read(self) -> GPUFigures:
        """The figures of this moment."""
        use = self._ask("nvmlDeviceGetUtilizationRates", _Utilization())
        memory = self._ask("nvmlDeviceGetMemoryInfo", _Memory())
        heat = self._ask("nvmlDeviceGetTemperature", ctypes.c_uint(), ctypes.c_int(_GPU_SENSOR))
        power = self._ask("nvmlDeviceGetPowerUsage", ctypes.c_uint())
        clock = self._ask("nvmlDeviceGetClockInfo", ctypes.c_uint(), ctypes.c_int(_SM_CLOCK))
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons", ctypes.c_ulonglong())
        if reasons is None:  # a driver before 535
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong())
        return GPUFigures(
            busy=None if use is None else use.gpu / 100,
            free_bytes=None if memory is None else int(memory.free),
            temperature_c=None if heat is None else float(heat.value),
            power_w=None if power is None else power.value / 1000,
            clock_mhz=None if clock is None else float(clock.value),
            throttled=None if reasons is None else any(reasons.value & bit for bit in THROTTLED_BY),
        )

    def _ask(self, function: str, answer: Any, *given: Any) -> Any:
        """What NVML writes into `answer`; None where it has no such figure."""
        return None if self._call(function, self._handle, *given, ctypes.byref(answer)) else answer

    def _call(self, function: str, *arguments: Any) -> bool:
        """Whether it failed: an old driver lacks the function, a GPU the figure."""
        try:
            return getattr(self._library, function)(*arguments) != 0
        except AttributeError:
            return True
