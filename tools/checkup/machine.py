"""The facts of a machine that the checks look at, as plain values: None is what could not be read.

Invariant: nothing here names a person, a host, or a path; so the whole of it may stand in a file that is handed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dinox_train.platform.bandwidth import Bandwidth
from dinox_train.platform.facts import Facts


@dataclass(frozen=True, kw_only=True)
class System:
    """The kernel and what it is told to do."""

    release: str
    """As uname has it: 6.18.9-200.fc43.x86_64."""
    parameters: tuple[str, ...] = ()
    """Of the kernel's command line, those about GPUs, their memory and the IOMMU."""
    cwsr: int | None = None
    """amdgpu's cwsr_enable: whether compute waves may be stored and taken up again."""
    governors: tuple[str, ...] = ()
    """Of all processors, each once."""
    preferences: tuple[str, ...] = ()
    """Their energy_performance_preference, each once."""
    profile: str | None = None
    """The firmware's platform_profile."""
    suspends: str | None = None
    """Why this machine may go to sleep by itself; empty: it does not."""
    reboots: str | None = None
    """What may restart it by itself; empty: nothing."""
    upgrades: str | None = None
    """What installs upgrades by itself; empty: nothing."""
    reboot_pending: bool = False
    troubles: Mapping[str, int] | None = None
    """In the kernel's log since the start, lines by kind (kernel_log.KINDS)."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """Processors and memory."""

    cores: int
    memory_bytes: int
    available_bytes: int | None = None
    swap_bytes: int = 0
    swap_used_bytes: int = 0
    overcommit: int | None = None
    """vm.overcommit_memory."""
    memory_limit_bytes: int | None = None
    """Of the control group; None: none."""
    cpu_limit: float | None = None
    """Processors that the control group may use; None: all."""
    open_files: int | None = None
    """Limit of open files of a process."""
    temperature_c: float | None = None


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as its driver tells of it."""

    kind: Literal["nvidia", "amd"]
    name: str
    driver: str | None = None
    firmware: Mapping[str, int] = field(default_factory=dict)
    """AMD: versions by part, `mes`."""
    carve_out_bytes: int | None = None
    """AMD: memory that is the GPU's alone."""
    gtt_bytes: int | None = None
    """AMD: of the host's memory, what it may map."""
    link_width: int | None = None
    """PCIe lanes in use."""
    link_width_most: int | None = None
    uncorrected_errors: int | None = None
    """Of its memory, since the start."""
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    power_default_w: float | None = None
    throttled: str | None = None
    """Why its clock is held down; empty: it is not."""


@dataclass(frozen=True, kw_only=True)
class Software:
    """Python, torch, and what compiles."""

    python: str
    torch: str
    in_range: bool = True
    """Whether the project takes this torch."""
    build: Literal["cpu", "cuda", "rocm"]
    runtime: str | None = None
    """Version of CUDA or ROCm that torch was built for."""
    architectures: tuple[str, ...] = ()
    """That this torch has code for."""
    triton: str | None = None
    compiler: str | None = None
    """What is missing for torch.compile; empty: nothing."""
    filters: str | None = None
    """Which form of the shards' filters runs on this host."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that change what runs (environment.HARMFUL), where set."""
    switches: tuple[str, ...] = ()
    """What dinox_train.platform.switches says of the environment."""
    signs: tuple[str, ...] = ()
    """Of GPUs outside torch: `nvidia`, `amd`."""
    may_open: bool | None = None
    """AMD: whether this user may open the compute device."""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The disk beside --output."""

    kind: str
    """Its file system: ext4, nfs4, tmpfs."""
    free_bytes: int
    write_bytes_per_s: float | None = None
    """Written and synced."""
    read_bytes_per_s: float | None = None
    read_is_cached: bool = False
    """The system would not read it from the disk."""
    trouble: str | None = None
    """Why it was not tried."""


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What was tried on the device that a run would take."""

    facts: Facts
    copies: Bandwidth | None = None
    layouts: tuple[str, ...] = ()
    """TFLOP/s of matrix products by layout and library, in words."""
    tflops: Mapping[str, float] = field(default_factory=dict)
    """By layout, of the library that a run takes for it."""
    routing: str = ""
    attention: str | None = None
    """The backend that a run takes, forward and backward tried."""
    attention_reason: str = ""
    attention_warning: str | None = None
    attention_error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the run of --config, or the set of --shards, asks for."""

    device: str | None = None
    """As the configuration says."""
    checkpoint_bytes: int | None = None
    checkpoints: int | None = None
    """That are kept at once, and the one that is being written."""
    memory_gib: float | None = None
    """Of the device (execution.memory_gib)."""
    shards: int | None = None
    """Files that are open at once."""
    window_bytes: float | None = None
    """Read from the disk for a window, on average."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """All of it."""

    system: System
    host: Host
    gpus: tuple[Gpu, ...] = ()
    software: Software
    devices: tuple[Facts, ...] = ()
    """Those that torch sees, in its order."""
    device: str
    """That a run takes: cpu, cuda:0."""
    idle: str | None = None
    """What a run on the CPU leaves idle."""
    trials: Trials | None = None
    disk: Disk | None = None
    wanted: Wanted = Wanted()

    @property
    def taken(self) -> Facts | None:
        """The facts of the device that a run takes."""
        return None if self.trials is None else self.trials.facts
