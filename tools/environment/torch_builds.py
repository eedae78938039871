"""Installs torch where there is none: which build, and from where.

Invariant: no build is taken that the machine cannot use without saying so, and a build that was asked for is never
swapped for another.
"""

import platform
import re
import sys
import tempfile
from pathlib import Path

from environment.installer import Pip, say
from environment.machine import AMD_SIGN, SetupError, gpu_driver, in_range, torch_range

NEWEST_CPU_BUILD = "2.13.0+cpu"


def install_torch(pip: Pip, project: Path, torch_index: str | None, wheels: Path | None) -> None:
    (low, high) = (".".join(map(str, bound)) for bound in torch_range(project))
    wanted = f"torch>={low},<{high}"
    if wheels is not None:
        if not list(wheels.glob("torch-*.whl")):
            raise SetupError(
                f"{wheels} holds no torch, and none is installed for {sys.executable}: install torch for your "
                "hardware first."
            )
        pip.install(wanted)
    elif torch_index is not None:
        install_torch_from(pip, wanted, torch_index)
    elif gpu_driver() == "amd":
        raise SetupError(
            f"an AMD GPU ({AMD_SIGN}) but no torch that can use it. Install a ROCm build of {wanted} first, or name "
            "the index of one: make setup TORCH_INDEX=URL (docs/hardware.md). To leave the GPU idle, give the URL of "
            "CPU builds."
        )
    elif gpu_driver() == "nvidia" or platform.system() != "Linux" or platform.machine() not in {"x86_64", "AMD64"}:
        say("torch: the general build")
        pip.install(wanted)
    else:
        install_cpu_torch(pip, project, wanted)


def install_torch_from(pip: Pip, wanted: str, torch_index: str) -> None:
    """Takes torch from this index and nowhere else: of several indexes pip takes the highest version, of any vendor."""
    say(f"torch: from {torch_index}")
    with tempfile.TemporaryDirectory() as folder:
        nothing = Path(folder) / "nothing"
        nothing.mkdir()
        here = {"PIP_EXTRA_INDEX_URL": torch_index, "PIP_FIND_LINKS": nothing.as_uri()}
        pip.must(
            "download", "--no-deps", "--only-binary=:all:", "--index-url", torch_index, "--dest", folder, wanted, **here
        )
        (wheel,) = Path(folder).glob("torch-*.whl")
        pip.install(str(wheel), "--extra-index-url", torch_index)


def install_cpu_torch(pip: Pip, project: Path, wanted: str) -> None:
    """The CPU build, by its local version, where the configured index has it; else the general build, and says so."""
    status, lines = pip.run("install", f"torch=={NEWEST_CPU_BUILD}")
    if status == 0:
        return
    if older := newest_cpu_build(lines, project):
        pip.install(f"torch=={older}")
        return
    say(
        "torch: your package index has no CPU build. The general build is installed now: it works without a GPU, but\n"
        "brings several GB of CUDA libraries. To avoid that, stop (Ctrl-C) and name an index of CPU builds:\n"
        "make setup TORCH_INDEX=URL"
    )
    pip.install(wanted)


def newest_cpu_build(pip_lines: list[str], project: Path) -> str | None:
    """The newest CPU build among the versions that pip listed when it did not find the one asked for."""
    offered = re.search(r"from versions: ([^)]*)\)", "\n".join(pip_lines))
    versions = offered[1].split(", ") if offered else []
    cpu = [version for version in versions if re.fullmatch(r"[\d.]+\+cpu", version) and in_range(version, project)]
    return max(cpu, key=lambda version: [int(part) for part in version.removesuffix("+cpu").split(".")], default=None)
