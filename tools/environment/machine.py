"""What the project asks for, and what this machine has of it: a torch, a GPU's driver. Changes nothing."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

NVIDIA_SIGNS = ("/proc/driver/nvidia", "/dev/nvidia0")
AMD_SIGN = "/dev/kfd"


class SetupError(Exception):
    """What is wrong, where, and what to do; shown to the user as it is."""


@dataclass(frozen=True, kw_only=True)
class Torch:
    """A torch: its version with the local part (2.13.0+cpu), and the `__init__.py` it is imported from."""

    version: str
    file: str


def requirements(project: Path) -> dict:
    return tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def torch_range(project: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """First (major, minor) of torch that is allowed, and the first that is not, from pyproject.toml."""
    wanted = next(line for line in requirements(project)["dependencies"] if re.match(r"torch\b", line))
    match = re.fullmatch(r"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)", wanted)
    if match is None:
        raise SetupError(f"pyproject.toml asks for {wanted!r}; this script understands torch>=A.B,<C.D")
    low_major, low_minor, high_major, high_minor = map(int, match.groups())
    return (low_major, low_minor), (high_major, high_minor)


def in_range(version: str, project: Path) -> bool:
    """Whether pip would take this version (a pre-release of the first one counts as older than it)."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(a|b|rc|\.?dev)?", version)
    if match is None:
        return False
    minor = (int(match[1]), int(match[2]))
    low, high = torch_range(project)
    too_early = minor == low and int(match[3] or 0) == 0 and match[4] is not None
    return low <= minor < high and not too_early


def installed_torch() -> Torch | None:
    """The torch of the interpreter that runs this, found without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise SetupError(
            f"{spec.origin} is a torch that pip does not know of (no dist-info beside it), so that pip would install "
            "a second one. Install it as a package, or take it off the path and run this again."
        ) from None
    return Torch(version=version, file=str(Path(spec.origin).resolve()))


def check_reusable(torch: Torch, project: Path) -> None:
    """Refuses a torch that the project does not support, or that does not work."""
    if not in_range(torch.version, project):
        low, high = torch_range(project)
        raise SetupError(
            f"torch {torch.version} is installed ({torch.file}), and DINOX needs "
            f">={low[0]}.{low[1]},<{high[0]}.{high[1]}. It is yours, so it is left as it is. Upgrade it with the "
            "command of your GPU's vendor, or set up with an interpreter that has no torch: "
            "python3 -m venv ~/without-torch && make setup PYTHON=~/without-torch/bin/python"
        )
    trial = subprocess.run(
        [sys.executable, "-c", "import torch"], capture_output=True, text=True, cwd=tempfile.gettempdir()
    )
    if trial.returncode != 0:
        reason = (trial.stderr.strip().splitlines() or ["no message"])[-1]
        raise SetupError(
            f"torch {torch.version} is installed ({torch.file}) but cannot be imported: {reason}. Repair or remove it, "
            "or set up with another interpreter: make setup PYTHON=/path/to/python"
        )


def gpu_driver() -> str | None:
    """The vendor whose driver is loaded: nvidia (also beside an AMD processor's graphics), amd or None."""
    if any(Path(sign).exists() for sign in NVIDIA_SIGNS) or shutil.which("nvidia-smi"):
        return "nvidia"
    return "amd" if Path(AMD_SIGN).exists() else None
