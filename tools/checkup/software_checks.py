"""Python, torch and its build, Triton, compilers, the environment, and which device a run takes: facts -> findings."""

from __future__ import annotations

from collections.abc import Sequence

from checkup import known_bad
from checkup.environment import HARMFUL, HIDING
from checkup.finding import Outcome, Unread, fail, ok, warn
from checkup.machine import Machine
from dinox_train.platform.facts import Facts

LEAST_PYTHON = (3, 11)
TRITON_RANGE = ((3, 6), (3, 10))
"""First and first not, as pyproject.toml has them for the extra [kernels]."""
_BUILDS = {"nvidia": "cuda", "amd": "rocm"}
_MAKERS = {"nvidia": "NVIDIA", "amd": "AMD"}


def python(machine: Machine) -> Outcome:
    version = machine.software.python
    if known_bad.numbers(version)[:2] < LEAST_PYTHON:
        return fail(
            "python",
            version,
            why="DINOX needs 3.11 or newer",
            mend="make setup PYTHON=python3.12 (or another newer one)",
        )
    return ok("python", version)


def torch(machine: Machine) -> Outcome:
    """The version of torch, and whether this build of it has anything to do with the GPUs."""
    software = machine.software
    seen = f"torch {software.torch}, {'a CPU build' if software.build == 'cpu' else f'for {_runtime(machine)}'}"
    if not software.in_range:
        return fail(
            "torch",
            seen,
            why="DINOX was not tried with it (pyproject.toml has the range)",
            mend="make setup with another",
        )
    fitting = [kind for kind in software.signs if _BUILDS[kind] == software.build]
    if software.signs and not fitting:
        maker = " and ".join(_MAKERS[kind] for kind in software.signs)
        return fail(
            "torch",
            f"{seen}, beside the driver of an {maker} GPU",
            why="the GPU stays idle, and nothing says so",
            mend="install a build of torch for it, then make setup; or make setup TORCH_INDEX=URL (docs/hardware.md)",
        )
    hidden = {name: software.environment[name] for name in HIDING if name in software.environment}
    if fitting and not machine.devices:
        return fail("torch", f"{seen}, which sees no GPU", why="the GPU stays idle", mend=_not_seen(machine, hidden))
    wrong = [one for one in machine.devices if not has_code(software.architectures, one.architecture)]
    if wrong:
        return fail(
            "torch",
            f"{seen}, with code for {', '.join(software.architectures)}",
            why=f"it has none for {wrong[0].name} ({wrong[0].architecture})",
            mend="install a build that has; do not set HSA_OVERRIDE_GFX_VERSION (docs/hardware.md)",
        )
    return ok("torch", seen)


def _runtime(machine: Machine) -> str:
    return f"{'ROCm' if machine.software.build == 'rocm' else 'CUDA'} {machine.software.runtime}"


def _not_seen(machine: Machine, hidden: dict[str, str]) -> str:
    if hidden:
        return "unset " + ", ".join(f"{name}={value!r}" for name, value in hidden.items())
    if machine.software.build == "rocm" and machine.software.may_open is False:
        return "you may not open /dev/kfd: sudo usermod -aG render,video $USER, and log in again"
    if machine.software.build == "cuda":
        return f"see what nvidia-smi says: its driver may be too old for CUDA {machine.software.runtime}"
    return "see what rocminfo says; in a container give it /dev/kfd and /dev/dri"


def has_code(architectures: Sequence[str], one: str) -> bool:
    """Whether a torch that has code for `architectures` runs on `one`: AMD's by its name; NVIDIA's of the same major
    number and no newer minor one, or any older one as text that the driver compiles."""
    if not architectures or one in architectures:
        return True
    if not one.startswith("sm_"):
        return any(name.split(":")[0] == one for name in architectures)
    own = _compute(one)
    for name in architectures:
        other = _compute(name)
        if name.startswith("compute_") and other <= own:
            return True
        if name.startswith("sm_") and other // 10 == own // 10 and other <= own:
            return True
    return False


def _compute(name: str) -> int:
    digits = "".join(letter for letter in name.partition("_")[2] if letter.isdecimal())
    return int(digits) if digits else 10**6


def devices(machine: Machine) -> Outcome:
    """All devices, which one a run takes, and why."""
    listed = [
        f"cuda:{number} {one.name} ({one.architecture}, {_memory(one)})" for number, one in enumerate(machine.devices)
    ]
    if machine.device == "cpu":
        if (machine.wanted.device or "").startswith("cuda"):
            return fail(
                "devices",
                "; ".join([*listed, "no GPU that torch can use"]),
                why=f"the configuration says device={machine.wanted.device}",
                mend="see torch above; device=cpu, if that is meant",
            )
        if machine.idle or listed:
            return warn(
                "devices",
                "; ".join([*listed, "a run is on the CPU"]),
                why=machine.idle or "the GPU beside it stays idle",
                mend="device=auto takes the first GPU",
            )
        return warn(
            "devices",
            "no GPU that torch can use: a run is on the CPU",
            why="enough for the demo, for packing, looking and probing; a ViT-S from scratch would take months",
            mend="nothing, for those; to pretrain, a GPU (docs/hardware.md)",
        )
    number = int(machine.device.partition(":")[2] or 0)
    largest = max(range(len(machine.devices)), key=lambda one: machine.devices[one].memory_bytes)
    seen = f"{'; '.join(listed)}; a run takes {machine.device}"
    if machine.devices[largest].memory_bytes > 1.2 * machine.devices[number].memory_bytes:
        return warn(
            "devices",
            seen,
            why="auto takes the first, and another one has more memory (an APU's graphics come first at times)",
            mend=f"device=cuda:{largest}",
        )
    return ok("devices", seen + (", the others stay idle: a run is on one" if len(listed) > 1 else ""))


def _memory(facts: Facts) -> str:
    return f"{facts.memory_bytes / 2**30:.1f} GiB{' shared with the host' if facts.unified else ''}"


def environment(machine: Machine) -> Outcome:
    """Variables that do harm, and what the trainer itself says of them."""
    software, kind = machine.software, "cpu" if machine.taken is None else machine.taken.kind
    harmful = [
        f"{row.name}={software.environment[row.name]} {row.does}"
        for row in HARMFUL
        if kind in row.on and row.name in software.environment and row.harms(software.environment[row.name])
    ]
    harmful += [line.removeprefix("warning: ") for line in software.switches if _is_advice(line)]
    if harmful:
        return warn(
            "environment",
            "; ".join(harmful),
            why="somebody set it once, and every run since has paid",
            mend="unset it, or give it the value that is advised",
        )
    said = "; ".join(software.switches)
    return ok("environment", said or "nothing in it that does harm")


def _is_advice(line: str) -> bool:
    return line.startswith("warning: ") or " is yours and stays; " in line


def triton(machine: Machine) -> Outcome:
    """Triton, which our own kernels need."""
    version, taken = machine.software.triton, machine.taken
    if version is None:
        if taken is None or not taken.is_gpu:
            return None
        return warn(
            "triton",
            "there is none",
            why="our own kernels cannot run, and execution.compile has no compiler",
            mend="install the one that belongs to this torch: pip install triton, or for ROCm what came with the wheel",
        )
    minor = known_bad.numbers(version)[:2]
    low, high = TRITON_RANGE
    if taken is not None and taken.is_gpu and not low <= minor < high:
        return warn(
            "triton",
            version,
            why="our kernels were compiled and tested with 3.6 to 3.9",
            mend="see that make test passes here; kernels: reference goes without them",
        )
    for row in known_bad.TRITONS:
        if taken is not None and taken.architecture in row.architectures and minor >= row.since:
            return warn("triton", version, why=f"{row.why} ({row.source})", mend=row.mend)
    return ok("triton", version)


def compiler(machine: Machine) -> Outcome:
    """What torch.compile needs."""
    missing = machine.software.compiler
    if missing is None:
        return None
    if missing:
        return warn(
            "compiler",
            "torch.compile has none",
            why=missing,
            mend="install it, or leave execution.compile off (its default)",
        )
    return ok("compiler", "torch.compile has what it needs")


def filters(machine: Machine) -> Outcome:
    """What undoes the shards' filter on the host."""
    found = machine.software.filters
    if found is None:
        return Unread("filters", "python -c 'from dinox_io import codec; print(codec.describe())', after make setup")
    if "numpy" in found.lower():
        return warn(
            "filters",
            found,
            why="several times slower than the C one: more threads decode, and a run may wait for them",
            mend="install a C compiler (gcc) and the Python headers, then make setup again",
        )
    return ok("filters", found)


CHECKS = (python, torch, devices, environment, triton, compiler, filters)
