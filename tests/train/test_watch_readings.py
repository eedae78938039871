"""What is read of the machine: parses of recorded texts, an AMD GPU's files, NVML's answers, the file of readings."""

import ctypes
import json
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dinox_io.memory import free_memory_bytes
from dinox_train.metrics import read_lines
from dinox_train.watch.__main__ import main
from dinox_train.watch.amd import amd_folder, parse_active_mhz, read_amd
from dinox_train.watch.gpu import GPUFigures, pci_address
from dinox_train.watch.host import Host, cpu_sensor, parse_cpu_ticks, parse_pressure, parse_swap_used, parse_task_ticks
from dinox_train.watch.machine import FIGURES, Machine
from dinox_train.watch.nvidia import Nvml
from dinox_train.watch.system_file import SystemFile, thinned

MEMINFO = (
    "MemTotal:       24684092 kB\nMemAvailable:   23254120 kB\nSwapTotal:       8388604 kB\nSwapFree:  8380412 kB\n"
)
PRESSURE = (
    "some avg10=12.50 avg60=0.11 avg300=1.35 total=177217378\nfull avg10=0.00 avg60=0.07 avg300=0.83 total=71357110\n"
)
STAT = "cpu  5752100 797200 752225 2536094 64335 0 18411 159874 500 0\ncpu0 2646391 397515 333718 1564563 0 0 0 0 0 0\n"
TASK = "31 (dinox (a) b) S 1 1 1 0 -1 4194304 102 0 0 0 {user} {kernel} 0 0 20 0 1 0 5032579 3133440 390 18446744\n"
LEVELS = "0: 600Mhz\n1: 1100Mhz *\n2: 2900Mhz\n"
WRONG = (None, "", "\n", "some\n", "cpu x\n", "SwapTotal: many kB\n", "a b c d\n", "-1\n\n\n")


def write_all(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_what_the_kernel_says_of_the_host() -> None:
    assert parse_swap_used(MEMINFO) == 1024 * (8388604 - 8380412)
    assert parse_pressure(PRESSURE) == 0.125
    busy, whole = parse_cpu_ticks(STAT) or (0, 0)
    assert (busy, whole) == (5752100 + 797200 + 752225 + 18411 + 159874, 10080239)
    assert parse_task_ticks(TASK.format(user=40, kernel=2)) == 42
    assert parse_active_mhz(LEVELS) == 1100


@pytest.mark.parametrize("text", WRONG)
def test_what_reads_otherwise_is_unknown(text: str | None) -> None:
    for parse in (parse_swap_used, parse_pressure, parse_cpu_ticks, parse_task_ticks, parse_active_mhz):
        assert parse(text) is None


def test_shares_are_of_the_time_between_two_looks(tmp_path: Path) -> None:
    proc = write_all(tmp_path, {"stat": "cpu 100 0 0 900 0 0 0 0 0 0\n", "self/stat": TASK.format(user=50, kernel=50)})
    stop = threading.Event()
    decoder = threading.Thread(target=stop.wait, name="dinox-decoder-0", daemon=True)
    host = Host(proc, tmp_path / "none")
    decoder.start()
    try:
        write_all(
            proc,
            {
                "stat": "cpu 130 0 0 960 10 0 0 0 0 0\n",
                "self/stat": TASK.format(user=100, kernel=100),
                f"self/task/{decoder.native_id}/stat": TASK.format(user=20, kernel=5),
            },
        )
        assert host.cpu_busy() == pytest.approx(0.3)
        assert host.loader_cpu_share() == pytest.approx(0.25)
        assert (host.cpu_busy(), host.loader_cpu_share()) == (None, None)  # no time went by
        assert (host.swap_used_bytes(), host.pressure("io"), host.cpu_temperature_c()) == (None, None, None)
    finally:
        stop.set()
        decoder.join()


def test_the_cpu_sensor_is_the_packages(tmp_path: Path) -> None:
    files = {
        "hwmon0/name": "nvme\n",
        "hwmon0/temp1_input": "38850\n",
        "hwmon1/name": "k10temp\n",
        "hwmon1/temp1_input": "71250\n",
    }
    hwmon = write_all(tmp_path, files)
    assert cpu_sensor(hwmon) == hwmon / "hwmon1" / "temp1_input"
    assert Host(tmp_path, hwmon).cpu_temperature_c() == 71.25
    assert cpu_sensor(tmp_path / "hwmon0") is None


CARD = {
    "vendor": "0x1002\n",
    "gpu_busy_percent": "97\n",
    "mem_info_vram_total": "25753026560\n",
    "mem_info_vram_used": "20000000000\n",
    "mem_info_gtt_total": "67364249600\n",
    "mem_info_gtt_used": "364249600\n",
    "pp_dpm_sclk": LEVELS,
    "hwmon/hwmon3/temp1_label": "edge\n",
    "hwmon/hwmon3/temp1_input": "61000\n",
    "hwmon/hwmon3/temp2_label": "junction\n",
    "hwmon/hwmon3/temp2_input": "84000\n",
    "hwmon/hwmon3/temp3_label": "mem\n",
    "hwmon/hwmon3/temp3_input": "90000\n",
    "hwmon/hwmon3/power1_average": "303000000\n",
    "hwmon/hwmon3/freq1_label": "sclk\n",
    "hwmon/hwmon3/freq1_input": "2371000000\n",
}
"""A Radeon RX 7900 XTX under load, as amdgpu's documentation describes the files."""


def test_a_radeon_and_an_apu(tmp_path: Path) -> None:
    card = write_all(tmp_path / "card", CARD)
    assert read_amd(card, shared=False) == GPUFigures(0.97, 5753026560, 84.0, 303.0, 2371.0, None)
    names = ("gpu_busy_percent", "pp_dpm_sclk", "hwmon/hwmon3/temp1_label", "hwmon/hwmon3/temp1_input")
    apu = {name: CARD[name] for name in CARD if name in names or name.startswith("mem_info")}
    apu |= {"hwmon/hwmon3/power1_input": "54012000\n"}
    folder = write_all(tmp_path / "apu", apu)
    assert read_amd(folder, shared=True) == GPUFigures(0.97, 5753026560 + 67000000000, 61.0, 54.012, 1100.0, None)
    assert read_amd(tmp_path / "nothing", shared=True) == GPUFigures()


def test_the_gpu_is_found_by_its_address_or_as_the_only_one(tmp_path: Path) -> None:
    address = pci_address(SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC5, pci_device_id=0))
    assert address == "0000:c5:00.0"
    assert pci_address(SimpleNamespace(name="of an older torch")) is None
    write_all(tmp_path / "bus/pci/devices/0000:c5:00.0", CARD)
    assert amd_folder(address, tmp_path) == tmp_path / "bus/pci/devices/0000:c5:00.0"
    assert amd_folder("0000:01:00.0", tmp_path) is None
    write_all(tmp_path / "class/drm/card0/device", {"vendor": "0x8086\n"})
    write_all(tmp_path / "class/drm/card1/device", CARD)
    write_all(tmp_path / "class/drm/card1-DP-1", {"status": "connected\n"})
    assert amd_folder(None, tmp_path) == tmp_path / "class/drm/card1/device"
    write_all(tmp_path / "class/drm/card2/device", CARD)
    assert amd_folder(None, tmp_path) is None


class FakeNvml:
    """Answers as NVML does: 0 and a value written through the last pointer, or an error's number."""

    def __init__(self, reasons: int = 0x04, lacks: tuple[str, ...] = ()) -> None:
        self.reasons, self.lacks, self.asked = reasons, lacks, []

    def __getattr__(self, name: str) -> Any:
        if name in self.lacks:
            raise AttributeError(name)

        def answer(*arguments: Any) -> int:
            self.asked.append(name)
            into: Any = arguments[-1]._obj if arguments else None
            values = {
                "nvmlDeviceGetTemperature": 67,
                "nvmlDeviceGetPowerUsage": 698_500,
                "nvmlDeviceGetClockInfo": 1830,
                "nvmlDeviceGetCurrentClocksEventReasons": self.reasons,
                "nvmlDeviceGetCurrentClocksThrottleReasons": self.reasons,
            }
            if name == "nvmlDeviceGetHandleByPciBusId_v2":
                return 0 if arguments[0].value == b"0000:c5:00.0" else 6
            if name == "nvmlDeviceGetHandleByUUID":
                return 0 if arguments[0].value == b"GPU-1234" else 6
            if name == "nvmlDeviceGetUtilizationRates":
                into.gpu, into.memory = 93, 41
            elif name == "nvmlDeviceGetMemoryInfo":
                into.total, into.free, into.used = 100, 30, 70
            elif name in values:
                into.value = values[name]
            return 0

        return answer


def test_nvml_answers() -> None:
    assert Nvml("0000:c5:00.0", None, FakeNvml()).read() == GPUFigures(0.93, 30, 67.0, 698.5, 1830.0, False)
    assert Nvml("0000:01:00.0", "1234", FakeNvml(0x44)).read().throttled is True
    assert Nvml(None, "GPU-1234", FakeNvml(lacks=("nvmlDeviceGetClockInfo",))).read().clock_mhz is None
    with pytest.raises(OSError, match="knows no GPU"):
        Nvml("0000:01:00.0", "5678", FakeNvml())


def test_reasons_for_a_clock_by_the_name_that_a_driver_has() -> None:
    names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    for reasons, throttled in ((0x40, True), (0x04, False), (0, False)):
        for lacks in (names[:1], names[1:]):  # one from before 535, and one that has dropped the old name
            assert Nvml("0000:c5:00.0", None, FakeNvml(reasons, lacks)).read().throttled is throttled
    assert Nvml("0000:c5:00.0", None, FakeNvml(0x40, names)).read().throttled is None


def test_nvml_is_asked_with_a_pointer_to_the_right_size() -> None:
    library = FakeNvml()
    Nvml("0000:c5:00.0", None, library).read()
    assert library.asked[:2] == ["nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2"]
    assert len(library.asked) == 8
    assert ctypes.sizeof(ctypes.c_ulonglong) == 8


def test_a_reading_has_every_figure_and_a_reader_that_fails_stops_no_other(tmp_path: Path) -> None:
    def broken() -> GPUFigures:
        raise RuntimeError("the driver is gone")

    reading = Machine(torch.device("cpu"), tmp_path, gpu=broken).read()
    assert tuple(reading) == FIGURES
    assert reading["gpu_busy"] is None
    assert reading["disk_free_bytes"] > 0  # type: ignore[operator]
    free = free_memory_bytes()
    assert free is None or abs(reading["host_free_bytes"] - free) < 2**30  # type: ignore[operator]
    host = Host(tmp_path / "none", tmp_path / "none")
    bare = Machine(torch.device("cpu"), tmp_path / "gone", host=host).read()
    assert {name for name, value in bare.items() if value is not None} <= {"host_free_bytes"}
    gpu = Machine(torch.device("cpu"), tmp_path, gpu=lambda: GPUFigures(0.5, 1, 2.0, 3.0, 4.0, True)).read()
    assert [gpu[name] for name in FIGURES if name.startswith("gpu") and "oc" not in name] == [
        0.5,
        None,
        1,
        2.0,
        3.0,
        True,
    ]


@pytest.mark.gpu
def test_a_real_gpu_is_read(tmp_path: Path) -> None:
    kept = torch.ones(2**20, device="cuda")
    reading = Machine(torch.device("cuda", torch.cuda.current_device()), tmp_path).read()
    assert reading["gpu_memory_reserved_bytes"] >= reading["gpu_memory_allocated_bytes"] >= 4 * kept.numel()  # type: ignore[operator]
    for name, most in {
        "gpu_busy": 1,
        "gpu_memory_free_bytes": 2**42,
        "gpu_temperature_c": 120,
        "gpu_clock_mhz": 9999,
    }.items():
        assert reading[name] is not None, name
        assert 0 <= reading[name] <= most, name  # type: ignore[operator]


def test_the_file_keeps_what_was_there_and_drops_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "system.jsonl"
    path.write_bytes(b'{"version": 1, "update": 7, "elapsed_s": 10.0, "since_digest_s": 5}\n{"version": 1, "upd')
    file = SystemFile(path)
    assert file.last["since_digest_s"] == 5
    file.write({"update": 3, "elapsed_s": 1.0, "gpu_busy": float("nan")})
    file.close()
    assert [line["update"] for line in read_lines(path)] == [7, 3]
    assert read_lines(path)[1]["gpu_busy"] is None
    new = SystemFile(tmp_path / "new.jsonl")
    assert new.last == {}
    new.close()


def test_the_file_stays_small_and_even_in_time(tmp_path: Path) -> None:
    path, most = tmp_path / "system.jsonl", 80
    file = SystemFile(path, most)
    for index in range(1000):
        file.write({"update": index, "elapsed_s": 10.0 * index})
    file.close()
    kept = [line["update"] for line in read_lines(path)]
    assert most // 2 <= len(kept) <= most
    assert kept[0] == 0
    assert kept == sorted(set(kept))
    assert kept[-20:] == list(range(980, 1000))
    gaps = [after - before for before, after in pairwise(kept)]
    assert max(gaps) <= 3 * 1000 / (most // 2)  # one in each part of the time, anywhere in it


def test_processes_that_begin_anew_are_thinned_as_one_run() -> None:
    elapsed = [float(second) for _ in range(5) for second in range(0, 200, 10)]
    kept = thinned(elapsed, 40)
    assert kept[-10:] == list(range(90, 100))
    assert len(kept) <= 31
    assert {index // 20 for index in kept} == set(range(5))
    assert thinned([], 40) == []
    assert thinned([0.0] * 50, 40) == [0, *range(40, 50)]


def test_the_command_says_what_is_readable_and_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--readings", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert tuple(found["reading"]) == FIGURES
    assert 0 < found["cpu_s"] < 1
    assert found["share_of_a_core"] == found["cpu_s"] / 10
    assert main(["--device", "cpu", "--readings", "4", "--every", "5"]) == 0
    said = capsys.readouterr().out
    assert "gpu_busy                     not readable here" in said
    assert "of one core" in said
    assert main(["--device", "mps"]) == 2
    assert "mps" in capsys.readouterr().err
