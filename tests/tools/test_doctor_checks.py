"""Each check of the doctor, on machines as recorded: well where set up as documented, and told where spoiled."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkup import checks, kernel_log, known_bad, page
from checkup.finding import Status, worst
from checkup.gpu_readings import NVIDIA_FIELDS, amd_gpus, nvidia_gpus, read_gpus
from checkup.machine import Machine, Wanted
from checkup.readings import read_host, reboots, suspends, upgrades
from checkup.software_checks import has_code

from tests.tools.recorded_machines import (
    GIB,
    H200_SAYS,
    RTX_SAYS,
    STRIX,
    cpu,
    facts,
    found,
    mi300x,
    nvidia,
    one,
    rx_7900_xtx,
    strix_halo,
    write,
)

CARD = "sys/class/drm/card1/device"
GOOD: dict[str, Callable[[Path], Machine]] = {
    "strix_halo": strix_halo,
    "rx_7900_xtx": rx_7900_xtx,
    "mi300x": mi300x,
    "rtx_4090": lambda root: nvidia(root, "rtx_4090", RTX_SAYS),
    "h200": lambda root: nvidia(root, "h200", H200_SAYS),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_machine_set_up_as_the_documentation_says_is_well(name: str, tmp_path: Path) -> None:
    findings, unread = checks.examine(GOOD[name](tmp_path))
    assert [finding for finding in findings if finding.status != "ok"] == []
    assert worst(findings) == "ok"
    ids = {finding.id for finding in findings}
    assert {"torch", "devices", "environment", "kernel", "attention", "products", "copies", "disk-room"} <= ids
    if name == "strix_halo":
        assert unread == []
        assert {"firmware", "rocm", "gtt", "sleep", "restarts", "power-plan", "temperatures"} <= ids


def test_a_machine_without_a_gpu_runs_and_says_so(tmp_path: Path) -> None:
    machine = cpu(tmp_path)
    status, words = one(machine, "devices")
    assert status == "warn"
    assert "no GPU that torch can use" in words
    assert worst(found(machine).values()) == "warn"
    lines = page.page(machine, *checks.examine(machine), seconds=3.2)
    assert lines[-1].startswith("verdict: a run goes; read the warnings before you leave it alone (")
    assert max(map(len, lines)) <= 118


# --- what is known to be bad -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "cwsr", "status"),
    [
        ("6.18.9-200.fc43.x86_64", 1, "ok"),
        ("7.0.0-14-generic", 1, "ok"),
        ("6.18.2-arch1-1", 1, "warn"),
        ("6.17.0-8-generic", 1, "fail"),
        ("6.17.0-8-generic", 0, "warn"),
        ("6.14.0-1018-oem", 1, "ok"),
        ("6.14.0-1017-oem", 1, "fail"),
        ("6.18.9-microsoft-standard-WSL2", 1, "warn"),
    ],
)
def test_kernels_of_strix_halo(release: str, cwsr: int, status: Status, tmp_path: Path) -> None:
    changed = {"proc/sys/kernel/osrelease": release, "sys/module/amdgpu/parameters/cwsr_enable": str(cwsr)}
    seen, words = one(strix_halo(tmp_path, changed), "kernel")
    assert seen == status
    assert release in words


def test_other_gpus_may_have_older_kernels(tmp_path: Path) -> None:
    machine = rx_7900_xtx(tmp_path)
    old = replace(machine, system=replace(machine.system, release="6.8.0-79-generic"))
    assert one(old, "kernel")[0] == "ok"
    assert "firmware" not in found(old)


@pytest.mark.parametrize(
    ("runtime", "status"),
    [
        ("7.2.53211", "ok"),
        ("7.11.0", "ok"),
        ("7.10.2", "fail"),
        ("7.9.0", "fail"),
        ("6.4.1", "fail"),
        ("7.1.1", "fail"),
    ],
)
def test_rocm_of_strix_halo(runtime: str, status: Status, tmp_path: Path) -> None:
    machine = strix_halo(tmp_path)
    assert one(replace(machine, software=replace(machine.software, runtime=runtime)), "rocm")[0] == status


def test_firmware(tmp_path: Path) -> None:
    status, words = one(strix_halo(tmp_path, {f"{CARD}/fw_version/mes_fw_version": "0x00000083"}), "firmware")
    assert status == "fail"
    assert "mes 0x83" in words
    assert "5724" in words
    (tmp_path / CARD / "fw_version/mes_fw_version").unlink()
    machine = strix_halo(tmp_path)
    blind = replace(machine, gpus=tuple(replace(gpu, firmware={}) for gpu in machine.gpus))
    assert [each.id for each in checks.examine(blind)[1]] == ["firmware"]


def test_every_row_names_its_source() -> None:
    rows = (*known_bad.FIRMWARE, *known_bad.KERNELS, *known_bad.RUNTIMES, *known_bad.TRITONS)
    assert all(row.source and row.mend and row.why and row.architectures for row in rows)


# --- memory of an APU --------------------------------------------------------------------------------------------


def test_memory_that_an_apu_may_map(tmp_path: Path) -> None:
    half = strix_halo(tmp_path, {f"{CARD}/mem_info_gtt_total": str(62 * GIB)})
    status, words = one(half, "gtt")
    assert status == "warn"
    # 125 GiB of the system's, 13 of them the host's.
    assert "ttm.pages_limit=29360128" in words
    assert "(112 GiB)" in words
    wants = replace(half, wanted=Wanted(memory_gib=96))
    assert one(wants, "gtt")[0] == "fail"
    carved = strix_halo(tmp_path, {f"{CARD}/mem_info_vram_total": str(64 * GIB)})
    assert one(carved, "gtt")[0] == "warn"
    assert "gtt" not in found(rx_7900_xtx(tmp_path / "other"))


# --- torch and the GPUs ------------------------------------------------------------------------------------------


def changed(machine: Machine, **software: Any) -> Machine:
    return replace(machine, software=replace(machine.software, **software))


def test_a_cpu_build_beside_a_gpu(tmp_path: Path) -> None:
    machine = replace(cpu(tmp_path), device="cpu")
    status, words = one(changed(machine, signs=("nvidia",)), "torch")
    assert status == "fail"
    assert "a CPU build, beside the driver of an NVIDIA GPU" in words
    assert "TORCH_INDEX" in words
    # An AMD processor's graphics beside an NVIDIA card are no fault.
    assert one(changed(nvidia(tmp_path / "b", "h200", H200_SAYS), signs=("nvidia", "amd")), "torch")[0] == "ok"


@pytest.mark.parametrize(
    ("software", "mend"),
    [
        ({"may_open": False}, "usermod -aG render,video"),
        ({"environment": {"HIP_VISIBLE_DEVICES": ""}}, "unset HIP_VISIBLE_DEVICES"),
        ({}, "rocminfo"),
    ],
)
def test_a_gpu_that_torch_does_not_see(software: dict[str, Any], mend: str, tmp_path: Path) -> None:
    machine = replace(strix_halo(tmp_path), devices=(), device="cpu", idle=None)
    status, words = one(changed(machine, **software), "torch")
    assert status == "fail"
    assert mend in words


def test_a_build_without_code_for_the_gpu(tmp_path: Path) -> None:
    machine = changed(strix_halo(tmp_path), architectures=("gfx942", "gfx1100"))
    status, words = one(machine, "torch")
    assert status == "fail"
    assert "gfx1151" in words
    for architectures, name, expected in (
        (("sm_80", "sm_86", "sm_90"), "sm_89", True),
        (("sm_90", "sm_100"), "sm_89", False),
        (("sm_75", "compute_75"), "sm_89", True),
        (("sm_90", "sm_90a"), "sm_90", True),
        (("gfx1151", "gfx1100"), "gfx1151", True),
        ((), "sm_90", True),
    ):
        assert has_code(architectures, name) is expected, (architectures, name)


def test_all_devices_are_listed_and_the_choice_explained(tmp_path: Path) -> None:
    machine = rx_7900_xtx(tmp_path)
    graphics = facts(architecture="gfx1036", name="AMD Radeon Graphics", memory_bytes=2 * GIB)
    status, words = one(replace(machine, devices=(graphics, machine.devices[0])), "devices")
    assert status == "warn"
    assert "cuda:0 AMD Radeon Graphics" in words
    assert "device=cuda:1" in words
    status, words = one(replace(machine, devices=machine.devices * 2), "devices")
    assert (status, "the others stay idle" in words) == ("ok", True)
    assert one(replace(machine, device="cpu", idle="the GPU beside it stays idle"), "devices")[0] == "warn"
    asked = replace(cpu(tmp_path / "cpu"), wanted=Wanted(device="cuda"))
    assert one(asked, "devices")[0] == "fail"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET=1 runs Triton's kernels in Python"),
        ({"AMD_SERIALIZE_KERNEL": "3"}, "AMD_SERIALIZE_KERNEL=3"),
        ({"PYTORCH_TUNABLEOP_TUNING": "1"}, "python -m dinox_train.platform tune"),
        ({"TRITON_INTERPRET": "0", "NVIDIA_TF32_OVERRIDE": "1"}, None),
    ],
)
def test_variables_that_harm(environment: dict[str, str], words: str | None, tmp_path: Path) -> None:
    status, said = one(changed(strix_halo(tmp_path), environment=environment), "environment")
    assert status == ("ok" if words is None else "warn")
    assert words is None or words in said


def test_what_the_trainer_warns_of_is_a_warning_here(tmp_path: Path) -> None:
    from dinox_train.platform.switches import settle

    machine = strix_halo(tmp_path)
    assert machine.taken is not None
    for variables in ({"HSA_OVERRIDE_GFX_VERSION": "11.0.0"}, {"ROCBLAS_USE_HIPBLASLT": "1"}):
        said = tuple(settle(machine.taken, dict(variables)))
        status, words = one(changed(machine, switches=said), "environment")
        assert status == "warn"
        assert next(iter(variables)) in words
    assert one(changed(machine, switches=tuple(settle(machine.taken, {}))), "environment")[0] == "ok"


@pytest.mark.parametrize(
    ("software", "name", "status"),
    [
        ({"python": "3.10.4"}, "python", "fail"),
        ({"in_range": False}, "torch", "fail"),
        ({"triton": None}, "triton", "warn"),
        ({"triton": "3.9.0"}, "triton", "warn"),
        ({"triton": "3.2.0"}, "triton", "warn"),
        ({"triton": "3.8.0"}, "triton", "ok"),
        ({"compiler": "no Triton"}, "compiler", "warn"),
        ({"filters": "NumPy (the C extension was not built)"}, "filters", "warn"),
    ],
)
def test_software(software: dict[str, Any], name: str, status: Status, tmp_path: Path) -> None:
    assert one(changed(strix_halo(tmp_path), **software), name)[0] == status


# --- speed -------------------------------------------------------------------------------------------------------


def tried(machine: Machine, **given: Any) -> Machine:
    assert machine.trials is not None
    return replace(machine, trials=replace(machine.trials, **given))


def test_attention(tmp_path: Path) -> None:
    warning = "attention of 201 tokens falls to the math path on gfx1151, which is several times slower: start with X=1"
    status, words = one(tried(strix_halo(tmp_path), attention="math", attention_warning=warning), "attention")
    assert status == "fail"
    assert words.endswith("| start with X=1")
    assert one(tried(strix_halo(tmp_path), attention_error="no kernel image"), "attention")[0] == "fail"


def test_products_and_copies_beside_what_the_maker_publishes(tmp_path: Path) -> None:
    strix = strix_halo(tmp_path)
    slow = {"forward": 36.0, "grad_input": 36.0, "grad_weight": 10.0}  # hipBLASLt's weight gradients (TheRock#5314)
    status, words = one(tried(strix, tflops=slow), "products")
    assert status == "warn"
    assert "grad_weight runs at 10 TFLOP/s" in words
    assert "ROCBLAS_USE_HIPBLASLT" in words
    assert strix.trials is not None
    assert strix.trials.copies is not None
    copies = replace(strix.trials.copies, device=90.0)
    assert one(tried(strix, copies=copies), "copies")[0] == "warn"
    card = rx_7900_xtx(tmp_path / "b")
    assert card.trials is not None
    assert card.trials.copies is not None
    narrow = replace(card.trials.copies, to_device=1.5, to_device_pinned=1.6)
    assert one(tried(card, copies=narrow), "copies")[0] == "warn"
    unknown = tried(card, facts=facts(name="Radeon of next year", architecture="gfx1300", unified=False))
    assert one(tried(unknown, tflops=slow), "products")[0] == "warn"
    assert one(unknown, "products")[0] == "ok"


# --- GPUs --------------------------------------------------------------------------------------------------------


def test_what_nvidias_driver_says() -> None:
    assert len(H200_SAYS.split(",")) == len(NVIDIA_FIELDS)
    (gpu,) = nvidia_gpus(H200_SAYS)
    assert (gpu.name, gpu.driver, gpu.link_width, gpu.uncorrected_errors) == ("NVIDIA H200", "580.65.06", 16, 0)
    assert (gpu.power_w, gpu.power_limit_w, gpu.temperature_c, gpu.throttled) == (77.42, 700.0, 33.0, "")
    (card,) = nvidia_gpus(RTX_SAYS)
    assert card.uncorrected_errors is None
    assert nvidia_gpus("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n") == ()


# What nvidia-smi answers to a name that its driver does not know, with exit code 2 and on standard output.
NVIDIA_SMI = """\
#!/bin/sh
case "$1" in
    *{refused}*) echo 'Field "{refused}" is not a valid field to query.'; exit 2 ;;
    --query-gpu=*) echo '{says}' ;;
esac
"""


@pytest.mark.parametrize("refused", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_drivers_that_name_the_reasons_for_a_clock_otherwise(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI.format(refused=refused, says=H200_SAYS.strip().replace("0001", "0040")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (gpu,) = [one for one in read_gpus() if one.kind == "nvidia"]
    assert (gpu.name, gpu.throttled) == ("NVIDIA H200", "heat, by hardware")


@pytest.mark.parametrize(
    ("says", "name", "status"),
    [
        (H200_SAYS.replace("16, 16, 0,", "16, 16, 2,"), "memory-errors", "fail"),
        (H200_SAYS.replace("16, 16,", "4, 16,"), "link", "warn"),
        (H200_SAYS.replace("16, 16,", "8, 16,"), "link", "ok"),
        (H200_SAYS.replace(" 33,", " 91,"), "temperatures", "warn"),
        (H200_SAYS.replace("0x0000000000000001", "0x0000000000000040"), "temperatures", "warn"),
        (H200_SAYS.replace("0x0000000000000001", "0x0000000000000004"), "temperatures", "ok"),
        (H200_SAYS.replace("700.00, 700.00", "400.00, 700.00"), "power-limit", "warn"),
    ],
)
def test_an_nvidia_gpu(says: str, name: str, status: Status, tmp_path: Path) -> None:
    assert one(nvidia(tmp_path, "h200", says), name)[0] == status


def test_uncorrected_errors_of_an_amd_gpu(tmp_path: Path) -> None:
    machine = mi300x(tmp_path)
    assert [gpu.uncorrected_errors for gpu in machine.gpus] == [0]
    write(tmp_path, {f"{CARD}/ras/umc_err_count": "ue: 4\nce: 3"})
    assert one(replace(machine, gpus=amd_gpus(tmp_path)), "memory-errors")[0] == "fail"


LOG = """\
[    1.0] Linux version 6.18
[  100.0] NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus.
[  100.5] NVRM: Xid (PCI:0000:01:00): 31, pid=1, MMU Fault
[  101.0] amdgpu 0000:c5:00.0: amdgpu: ring comp_1.0.0 timeout, signaled seq=5
[  102.0] amdgpu 0000:c5:00.0: [gfxhub] page fault (src_id:0 ring:24 vmid:8 pasid:32794)
[  103.0] mce: [Hardware Error]: Machine check events logged
[  104.0] blk_update_request: I/O error, dev sda, sector 5
[  105.0] Out of memory: Killed process 5 (python)
[  106.0] CPU3: Core temperature is above threshold, cpu clock is throttled
"""


def test_the_kernels_log(tmp_path: Path) -> None:
    counted = kernel_log.count(LOG.splitlines())
    assert set(counted) == {kind.name for kind in kernel_log.KINDS}
    assert counted["amdgpu hang or reset"] == 2
    machine = strix_halo(tmp_path)
    for troubles, status in ((counted, "fail"), ({"out of memory": 1}, "warn"), ({}, "ok")):
        assert one(replace(machine, system=replace(machine.system, troubles=troubles)), "kernel-log")[0] == status
    silent = replace(machine, system=replace(machine.system, troubles=None))
    assert [each.id for each in checks.examine(silent)[1]] == ["kernel-log"]


# --- the host ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "name", "status"),
    [
        ({"sys/fs/cgroup/user.slice/memory.max": str(32 * GIB)}, "memory-limit", "warn"),
        ({"sys/fs/cgroup/user.slice/cpu.max": "50000 100000"}, "processors", "warn"),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": str(32 * GIB)}, "memory-limit", "warn"),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
         "processors", "warn"),
        ({"proc/sys/vm/overcommit_memory": "2"}, "overcommit", "warn"),
        ({"proc/self/limits": "Max open files            256    524288    files"}, "open-files", "warn"),
        ({"proc/meminfo": STRIX["proc/meminfo"].replace("SwapFree: 8388608", "SwapFree: 8388")}, "swap", "ok"),
        ({"proc/meminfo": STRIX["proc/meminfo"].replace("120000000", "20000000")}, "memory", "warn"),
        ({"proc/meminfo": STRIX["proc/meminfo"].replace("120000000", "1000000")}, "memory", "warn"),
        ({"sys/devices/system/cpu/cpu0/cpufreq/energy_performance_preference": "power"}, "power-plan", "warn"),
        ({"sys/firmware/acpi/platform_profile": "low-power"}, "power-plan", "warn"),
        ({f"{CARD}/hwmon/hwmon4/temp1_input": "91000"}, "temperatures", "warn"),
    ],
)  # fmt: skip
def test_the_host(files: dict[str, str], name: str, status: Status, tmp_path: Path) -> None:
    assert one(strix_halo(tmp_path, files), name)[0] == status


def test_limits_of_control_groups_are_the_smallest_above(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user.slice"
    root = write(tmp_path, STRIX | {f"{group}/memory.max": str(8 * GIB),
                                    f"{group}/session-2.scope/memory.max": str(16 * GIB),
                                    f"{group}/session-2.scope/cpu.max": "150000 100000"})  # fmt: skip
    host = read_host(root)
    assert (host.memory_limit_bytes, host.cpu_limit) == (8 * GIB, 1.5)
    assert (host.open_files, host.temperature_c, host.swap_bytes) == (65536, 48.25, 8 * GIB)


def test_shards_are_open_files(tmp_path: Path) -> None:
    machine = strix_halo(tmp_path)
    few = replace(machine, host=replace(machine.host, open_files=1024))
    assert one(replace(few, wanted=Wanted(shards=900)), "open-files")[0] == "ok"
    assert one(replace(few, wanted=Wanted(shards=1000)), "open-files")[0] == "fail"


def test_what_sends_a_machine_to_sleep(tmp_path: Path) -> None:
    root = write(tmp_path, STRIX)
    assert suspends(root) == ""
    units = root / "etc/systemd/system"
    units.mkdir(parents=True, exist_ok=True)
    (units / "default.target").symlink_to("/usr/lib/systemd/system/graphical.target")
    assert "desktop" in (suspends(root) or "")
    write(root, {"etc/systemd/logind.conf.d/idle.conf": "[Login]\nIdleAction=suspend\n"})
    assert suspends(root) == "logind has IdleAction=suspend"
    assert one(strix_halo(root), "sleep")[0] == "warn"
    for target in ("sleep.target", "suspend.target"):
        (units / target).symlink_to("/dev/null")
    assert suspends(root) == ""
    assert suspends(tmp_path / "container") is None


def test_what_restarts_a_machine(tmp_path: Path) -> None:
    root = write(tmp_path / "apt", STRIX | {
        "etc/apt/apt.conf.d/20auto-upgrades": 'APT::Periodic::Unattended-Upgrade "1";',
        "etc/apt/apt.conf.d/50unattended-upgrades": '//Unattended-Upgrade::Automatic-Reboot "true";',
    })  # fmt: skip
    assert (reboots(root), upgrades(root)) == ("", "unattended-upgrades")
    write(root, {"etc/apt/apt.conf.d/99x": 'Unattended-Upgrade::Automatic-Reboot "true";'})
    assert "unattended-upgrades restarts it" in (reboots(root) or "")
    assert one(strix_halo(root), "restarts")[0] == "warn"
    other = write(tmp_path / "dnf", STRIX | {
        "etc/dnf/automatic.conf": "[commands]\nreboot = when-needed\n",
        "etc/systemd/system/timers.target.wants/dnf5-automatic.timer": "",
        "run/reboot-required": "",
    })  # fmt: skip
    assert (reboots(other), upgrades(other)) == ("dnf-automatic restarts it (reboot=when-needed)", "dnf-automatic")


# --- the disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disk", "wanted", "name", "status"),
    [
        ({"kind": "tmpfs"}, {}, "disk", "fail"),
        ({"kind": "overlay"}, {}, "disk", "warn"),
        ({"kind": "nfs4"}, {}, "disk", "warn"),
        ({"trouble": "Permission denied"}, {}, "disk", "fail"),
        ({"free_bytes": 10**10}, {}, "disk-room", "warn"),
        ({"free_bytes": 10**10}, {"checkpoint_bytes": 6 * 10**9, "checkpoints": 4}, "disk-room", "fail"),
        ({"free_bytes": 2 * 10**10}, {"checkpoint_bytes": 6 * 10**9, "checkpoints": 4}, "disk-room", "warn"),
        ({"free_bytes": 3 * 10**10}, {"checkpoint_bytes": 6 * 10**9, "checkpoints": 4}, "disk-room", "ok"),
        ({"write_bytes_per_s": 4e7}, {}, "disk-speed", "warn"),
        ({"write_bytes_per_s": 9e7}, {"checkpoint_bytes": 6 * 10**9, "checkpoints": 4}, "disk-speed", "warn"),
        ({}, {"window_bytes": 3e5}, "disk-speed", "ok"),
    ],
)
def test_disks(disk: dict[str, Any], wanted: dict[str, Any], name: str, status: Status, tmp_path: Path) -> None:
    machine = strix_halo(tmp_path)
    assert machine.disk is not None
    spoiled = replace(machine, disk=replace(machine.disk, **disk), wanted=Wanted(**wanted))
    assert one(spoiled, name)[0] == status
