"""The host's figures from Linux: swap, pressure, the CPU's and the loader's time, its temperature.

Each is a parse of the text that the kernel gives, and a reading of it. What is not there, or reads otherwise than
expected, is None: another system, a container that hides it, an old kernel.
"""

from __future__ import annotations

import threading
from pathlib import Path

LOADER_THREADS = "dinox-decoder"
"""What the names of the loader's threads (dinox_io/pipeline.py) begin with."""
_CPU_SENSORS = ("k10temp", "zenpower", "coretemp", "cpu_thermal", "cpu-thermal")


def read_text(path: Path) -> str | None:
    """What a file of the kernel holds; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def number_of(text: str | None, scale: float = 1.0) -> float | None:
    """The number that a file holds alone, times `scale`; None where it holds something else."""
    try:
        return float(text) * scale if text is not None else None
    except ValueError:
        return None


def parse_swap_used(meminfo: str | None) -> int | None:
    """/proc/meminfo: bytes of swap that are in use."""
    sizes = dict.fromkeys(("SwapTotal:", "SwapFree:"), -1)
    for line in (meminfo or "").splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] in sizes and words[1].isdecimal():
            sizes[words[0]] = 1024 * int(words[1])
    total, free = sizes.values()
    return total - free if min(total, free) >= 0 else None


def parse_pressure(text: str | None) -> float | None:
    """/proc/pressure/*: the share of the last 10 s in which some task waited, 0 to 1."""
    for line in (text or "").splitlines():
        words = line.split()
        if words[:1] == ["some"]:
            average = next((word.removeprefix("avg10=") for word in words if word.startswith("avg10=")), None)
            percent = number_of(average)
            return None if percent is None else round(percent / 100, 4)
    return None


def parse_cpu_ticks(stat: str | None) -> tuple[int, int] | None:
    """/proc/stat: ticks of all cores since the start that were busy, and all of them."""
    words = (stat or "").split("\n", 1)[0].split()
    if len(words) < 6 or words[0] != "cpu" or not all(word.isdecimal() for word in words[1:]):
        return None
    ticks = [int(word) for word in words[1:9]]  # what follows, guests' time, is part of user's already
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # idle, and waiting for a disk


def parse_task_ticks(stat: str | None) -> int | None:
    """/proc/PID/stat or /proc/PID/task/TID/stat: ticks of CPU time, in user mode and in the kernel."""
    words = (stat or "").rpartition(")")[2].split()  # a name may hold anything, parentheses too
    if len(words) < 13 or not (words[11].isdecimal() and words[12].isdecimal()):
        return None
    return int(words[11]) + int(words[12])


def cpu_sensor(hwmon: Path) -> Path | None:
    """The file with the CPU's temperature (of the package, where there are several); None where there is none."""
    found = {(read_text(folder / "name") or "").strip(): folder for folder in sorted(hwmon.glob("hwmon*"))}
    files = (found[name] / "temp1_input" for name in _CPU_SENSORS if name in found)
    return next((file for file in files if file.exists()), None)


class Host:
    """The host and this process, looked at again and again: shares are of the time since the look before."""

    def __init__(self, proc: Path = Path("/proc"), hwmon: Path = Path("/sys/class/hwmon")) -> None:
        self._proc, self._sensor = proc, cpu_sensor(hwmon)
        self._cpu: tuple[int, int] | None = None
        self._process: int | None = None
        self._loader: dict[int, int] = {}
        self.cpu_busy()  # the first look, from which the second one's shares are
        self.loader_cpu_share()

    def swap_used_bytes(self) -> int | None:
        return parse_swap_used(read_text(self._proc / "meminfo"))

    def pressure(self, what: str) -> float | None:
        """what: memory, io or cpu."""
        return parse_pressure(read_text(self._proc / "pressure" / what))

    def cpu_temperature_c(self) -> float | None:
        return None if self._sensor is None else number_of(read_text(self._sensor), 1e-3)

    def cpu_busy(self) -> float | None:
        """Busy share of all cores."""
        before, self._cpu = self._cpu, parse_cpu_ticks(read_text(self._proc / "stat"))
        if before is None or self._cpu is None or self._cpu[1] <= before[1]:
            return None
        return min(max((self._cpu[0] - before[0]) / (self._cpu[1] - before[1]), 0.0), 1.0)

    def loader_cpu_share(self) -> float | None:
        """Of this process's CPU time, the share of the loader's threads."""
        before, loader_before = self._process, self._loader
        self._process = parse_task_ticks(read_text(self._proc / "self" / "stat"))
        self._loader = {}
        for thread in threading.enumerate():
            if thread.name.startswith(LOADER_THREADS) and thread.native_id is not None:
                ticks = parse_task_ticks(read_text(self._proc / "self" / "task" / str(thread.native_id) / "stat"))
                if ticks is not None:
                    self._loader[thread.native_id] = ticks
        if before is None or self._process is None or self._process <= before:
            return None
        # A thread that is new since the look before has spent all of its time since then.
        spent = sum(ticks - loader_before.get(thread, 0) for thread, ticks in self._loader.items())
        return min(max(spent / (self._process - before), 0.0), 1.0)
