"""Collect in one folder all that an install on a machine without internet needs: `make wheels`.

For that machine the Python version, operating system and processor must be those of this one. The folder is whole or
absent: it is filled under a temporary name. torch has exactly the version of this environment; where it belongs to the
machine and no index has it, it is left out, and the target must bring its own, as this one did.
"""

import argparse
import importlib.metadata
import platform
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

from environment.installer import Pip, say
from environment.machine import SetupError, requirements
from setup_environment import EXTRAS, PROJECT, TRITON_OF_CPU, needs_triton, read_ready

BUILD_TOOLS = ("pip", "setuptools", "wheel")


def wanted_packages(project: Path, torch_version: str) -> list[str]:
    """Requirement lines of the project with the extras of `make setup`, torch apart, and of its build."""
    described = requirements(project)
    lines = list(described["dependencies"])
    for extra in EXTRAS:
        lines += described["optional-dependencies"][extra]
    if needs_triton(torch_version, wheels=None):
        lines.append(TRITON_OF_CPU)
    built_with = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    return [line for line in lines if not line.startswith("torch>")] + built_with + list(BUILD_TOOLS)


def build_own_wheel(pip: Pip, project: Path, folder: Path) -> None:
    """Builds the project's wheel from a copy, so that no build folder is left in the checkout."""
    with tempfile.TemporaryDirectory() as copy:
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(project / name, copy)
        for package in sorted(project.glob("dinox_*")):
            shutil.copytree(package, Path(copy) / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        pip.must("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), copy)


def collect_torch(pip: Pip, folder: Path) -> bool:
    """torch of this environment's version with its dependencies; False where no index has it."""
    version = importlib.metadata.version("torch")
    ready = read_ready(pip.folder)
    index = ["--extra-index-url", ready.torch_index] if ready and ready.torch_index else []
    download = ["download", "--only-binary=:all:", "--dest", str(folder), *index]
    say(f"torch {version}")
    status, lines = pip.run(*download, f"torch=={version}")
    if status == 0:
        return True
    if not any("No matching distribution found for torch==" in line for line in lines):
        raise SetupError(
            "\n".join([*lines[-25:], f"torch {version} could not be downloaded: the last lines are above."])
        )
    return False


def collect(pip: Pip, project: Path, output: Path) -> bool:
    """Fills `output`; whether torch is in it."""
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    say("the project's own wheel")
    build_own_wheel(pip, project, temporary)
    has_torch = collect_torch(pip, temporary)
    say("what the project depends on")
    constraints = ["--constraint", str(pip.constraints)] if pip.constraints.exists() else []
    wanted = wanted_packages(project, importlib.metadata.version("torch"))
    pip.must("download", "--only-binary=:all:", "--dest", str(temporary), *constraints, *wanted)
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)
    return has_torch


def check_replaceable(output: Path) -> None:
    """Raises SetupError where something would be lost: `output` is a file, or a folder with more than wheels."""
    if not output.is_dir():
        if output.exists() or output.is_symlink():
            raise SetupError(f"{output} is no folder. Name a new one, or one that holds nothing but wheels.")
        return
    if any(file.suffix != ".whl" for file in output.iterdir()):
        raise SetupError(f"{output} holds more than wheels, and would be replaced. Name another folder.")


def report(output: Path, has_torch: bool) -> None:
    files = list(output.iterdir())
    mebibytes = sum(file.stat().st_size for file in files) / 2**20
    python = platform.python_version().rpartition(".")[0]
    say(f"\n{output}: {len(files)} files, {mebibytes:.0f} MiB")
    say(f"for Python {python} on {platform.system()} {platform.machine()}. Carry it over with this repository; there:")
    say(f"  make setup WHEELS={output.name}     everything, with the tests and tools")
    say(f"  pip install --no-index --find-links {output.name} dinox     the three packages, in an environment of yours")
    if not has_torch:
        version = importlib.metadata.version("torch")
        say(f"Not in it: torch {version}. It belongs to this machine and no package index here has that build, so the")
        say("target needs a torch of its own before that (docs/hardware.md); it will be reused.")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Collect an install for a machine without internet (same Python and system)."
    )
    parser.add_argument("--output", type=Path, default=PROJECT / "wheels", help="folder to make anew (default: wheels)")
    output = parser.parse_args().output.absolute()
    try:
        check_replaceable(output)
        has_torch = collect(Pip(Path(sys.prefix), {}), PROJECT, output)
    except (SetupError, OSError) as error:
        print(f"wheels: {error}", file=sys.stderr)
        return 1
    report(output, has_torch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
