#!/usr/bin/env python3
"""Make `.venv` with the project in it, round the torch that this machine already has.

Invariant: a torch that is installed for the calling interpreter, be it a ROCm, CUDA or CPU build, is seen through
`.venv` and never replaced; its exact version is pinned in `.venv/constraints.txt`, which every call of pip obeys, and
checked again at the end. Only where there is none is torch installed. `.venv/.ready` (JSON) says what was done; without
a change the next call returns at once.

Standard library only, as it runs before anything is installed; and this file parses on old Pythons, to tell them so.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        "setup: Python 3.11 or newer is needed, and {} is {}.{}. Install one (Debian, Ubuntu: sudo apt-get install "
        "python3.11 python3.11-venv) and name it: make setup PYTHON=python3.11".format(
            sys.executable, *sys.version_info
        )
    )

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from environment.installer import Pip, only_from, say
from environment.machine import SetupError, Torch, check_reusable, in_range, installed_torch
from environment.torch_builds import install_torch

PROJECT = Path(__file__).resolve().parent.parent
EXTRAS = ("dicom", "nifti", "dev")
# For CPU builds of torch, which bring none: the one that torch 2.13 is made with, and that docs/kernels_table.json was.
TRITON_OF_CPU = "triton==3.7.1"
# What must not move while torch does not: its compiler, whose name depends on the vendor, and what is built against it.
PINNED_WITH_TORCH = (
    "torch",
    "triton",
    "triton-rocm",
    "pytorch-triton",
    "pytorch-triton-rocm",
    "torchvision",
    "torchaudio",
)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The contents of `.venv/.ready`."""

    project: str  # sha256 of the project's folder, pyproject.toml, sources in C and these scripts
    interpreter: str  # that .venv was made with
    torch: Torch
    reused: bool  # torch belongs to the machine, not to .venv
    torch_index: str | None  # where torch came from, if it was said


def project_digest(project: Path) -> str:
    scripts = (Path(__file__), *sorted(Path(__file__).with_name("environment").glob("*.py")))
    files = (project / "pyproject.toml", *sorted(project.glob("dinox_io/*.c")), *scripts)
    return hashlib.sha256(b"\0".join([os.fsencode(project), *(file.read_bytes() for file in files)])).hexdigest()


def make_environment(folder: Path, torch: Torch | None) -> None:
    """An empty virtual environment that sees `torch`, if one is given."""
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            f"{sys.executable} cannot make virtual environments: its venv and ensurepip modules are not installed. "
            f"Debian, Ubuntu: sudo apt-get install python{version}-venv; then run this again."
        )
    of_base = sys.prefix == sys.base_prefix
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    unfinished(folder).touch()
    see_base = ["--system-site-packages"] if torch and of_base else []
    made = subprocess.run([sys.executable, "-m", "venv", *see_base, str(folder)], capture_output=True, text=True)
    if made.returncode != 0:
        raise SetupError(f"python -m venv failed:\n{made.stdout}{made.stderr}")
    if torch and not of_base:
        see_active_environment(folder)
    if torch and probe_torch(folder) != torch:
        raise SetupError(f"{folder} does not see {torch.file}: install that torch as a package, then run this again.")


def see_active_environment(folder: Path) -> None:
    """Appends the active environment's packages to those of `folder`: ours come first, theirs are only read."""
    theirs = [path for path in sys.path if path.endswith("-packages")]
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in theirs)
    (ours,) = (folder / "lib").glob("python3.*/site-packages")
    # Named to be read last, as the .pth files of a folder are read in alphabetical order.
    (ours / "zz_installed_torch.pth").write_text(lines, encoding="utf-8")


def unfinished(folder: Path) -> Path:
    return folder / ".unfinished"


def works(folder: Path) -> bool:
    """Whether `folder` holds a finished environment of a good Python with a pip, made by us or by someone else."""
    python = folder / "bin" / "python"
    if unfinished(folder).exists() or not python.exists():
        return False
    question = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([str(python), "-c", question], capture_output=True).returncode == 0


def probe_torch(folder: Path) -> Torch | None:
    """The torch that `folder`'s interpreter imports."""
    code = "import json, torch, importlib.metadata as m; print(json.dumps([m.version('torch'), torch.__file__]))"
    answer = subprocess.run(
        [str(folder / "bin" / "python"), "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir()
    )
    if answer.returncode != 0:
        return None
    version, file = json.loads(answer.stdout.splitlines()[-1])
    return Torch(version=version, file=str(Path(file).resolve()))


def pin_torch(folder: Path) -> None:
    """Writes the constraints file: torch and what belongs to it, at exactly the versions that `folder` sees."""
    names = json.dumps(PINNED_WITH_TORCH)
    code = f"""import importlib.metadata as m
for name in {names}:
    try: print(name + "==" + m.version(name))
    except m.PackageNotFoundError: pass"""
    answer = subprocess.run([str(folder / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True)
    (folder / "constraints.txt").write_text(answer.stdout, encoding="utf-8")


def read_ready(folder: Path) -> Ready | None:
    try:
        found = json.loads((folder / ".ready").read_text(encoding="utf-8"))
        return Ready(**found | {"torch": Torch(**found["torch"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_ready(folder: Path, ready: Ready) -> None:
    temporary = folder / ".ready.tmp"
    temporary.write_text(json.dumps(asdict(ready), indent=1), encoding="utf-8")
    temporary.rename(folder / ".ready")


def why_anew(folder: Path, ready: Ready | None, torch: Torch | None, torch_index: str | None) -> str | None:
    """Why an environment has to be made, though one may stand; None where that one can stay."""
    if not folder.exists():
        return "there is none yet"
    if not works(folder):
        return "it is broken or was not finished"
    # One that was made by hand or by another tool (no .ready) is kept, but for a torch that hides the installed one.
    standing = ready.torch if ready else probe_torch(folder)
    if torch is not None:
        return None if standing and standing.file == torch.file else "it does not use the torch that is installed"
    if ready and not Path(ready.torch.file).exists():
        return "the torch that it used is gone"
    if ready and not ready.reused and torch_index not in {None, ready.torch_index}:
        return "its torch is not from the index that is asked for now"
    return None


@contextlib.contextmanager
def marked_unfinished(folder: Path) -> Iterator[None]:
    """Killed inside, `folder` is rebuilt the next time; a clean error of pip has changed nothing that needs that."""
    was_new = unfinished(folder).exists()
    unfinished(folder).touch()
    try:
        yield
    except SetupError:
        if not was_new:
            unfinished(folder).unlink()
        raise
    unfinished(folder).unlink()


def set_up(project: Path, folder: Path, torch_index: str | None, wheels: Path | None) -> None:
    torch = installed_torch()
    ready = read_ready(folder)
    digest = project_digest(project)
    anew = why_anew(folder, ready, torch, torch_index)
    if not anew and ready and ready.project == digest and (torch is None or torch == ready.torch):
        (folder / ".ready").touch()
        say(f"{folder} is ready: torch {ready.torch.version} ({'reused' if ready.reused else 'its own'})")
        return
    if torch is not None:
        check_reusable(torch, project)
        say(f"torch {torch.version} is installed and reused: {torch.file}")
    if anew:
        say(f"making {folder} with Python {platform.python_version()}: {anew}")
        make_environment(folder, torch)
    pip = Pip(folder, only_from(wheels) if wheels else {})
    with marked_unfinished(folder):
        (folder / ".ready").unlink(missing_ok=True)
        fill(pip, project, folder, torch_index, wheels)
        seen = probe_torch(folder)
        if seen is None or (torch is not None and seen != torch):
            raise SetupError(
                f"{folder} imports {seen} where {torch or 'a torch'} was meant: remove it, and run this again."
            )
    index = torch_index or (ready.torch_index if ready and not anew else None)
    ready = describe(folder, seen, digest, index)
    write_ready(folder, ready)
    say(f"{folder} is ready: torch {seen.version} ({'reused' if ready.reused else 'its own'})")


def describe(folder: Path, torch: Torch, digest: str, torch_index: str | None) -> Ready:
    reused = not Path(torch.file).is_relative_to(folder.resolve())
    index = None if reused else torch_index
    return Ready(project=digest, interpreter=sys.executable, torch=torch, reused=reused, torch_index=index)


def fill(pip: Pip, project: Path, folder: Path, torch_index: str | None, wheels: Path | None) -> None:
    """Installs torch if `folder` sees none, pins it, and installs the project with its extras."""
    before = probe_torch(folder)
    if before is not None and not in_range(before.version, project):
        raise SetupError(
            f"{folder} holds torch {before.version}, which DINOX does not support: remove {folder} and run this again."
        )
    if before is None:
        pip.constraints.unlink(missing_ok=True)
        install_torch(pip, project, torch_index, wheels)
    pin_torch(folder)
    seen = probe_torch(folder)
    kernels = seen is not None and needs_triton(seen.version, wheels)
    extras = (*EXTRAS, "kernels") if kernels else EXTRAS
    say(f"the project, with its extras {', '.join(extras)}")
    pip.install("--editable", f"{project}[{','.join(extras)}]", *([TRITON_OF_CPU] if kernels else []))


def needs_triton(torch_version: str, wheels: Path | None) -> bool:
    """Whether Triton is ours to install: torch is a CPU build on Linux, and `wheels`, if that is all there is, has it.

    A build for a GPU brings its own, by another name on ROCm: a second one would overwrite it.
    """
    is_cpu_build = torch_version.endswith("+cpu") and platform.system() == "Linux"
    return is_cpu_build and (wheels is None or any(wheels.glob("triton-*.whl")))


def leave_environment(folder: Path) -> None:
    """Called by .venv's own interpreter, goes on with the one that .venv was made with: .venv may be made anew."""
    if Path(sys.prefix).resolve() != folder.resolve():
        return
    ready = read_ready(folder)
    outside = getattr(sys, "_base_executable", sys.executable)
    if ready and Path(ready.interpreter).exists():
        outside = ready.interpreter
    if Path(outside).parent.resolve() == Path(sys.executable).parent.resolve():
        raise SetupError(f"{sys.executable} belongs to {folder}: deactivate it and run this again.")
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    os.execve(outside, [outside, str(Path(__file__).resolve()), *sys.argv[1:]], environment)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Make .venv with the project in it; a torch that is installed is reused, never replaced."
    )
    parser.add_argument(
        "--torch-index",
        metavar="URL",
        help="package index to take torch from where none is installed (see docs/hardware.md)",
    )
    parser.add_argument(
        "--wheels",
        metavar="FOLDER",
        type=Path,
        help="install from this folder only, without a network (see `make wheels`)",
    )
    options = parser.parse_args()
    folder = PROJECT / ".venv"
    try:
        if options.wheels is not None and not options.wheels.is_dir():
            raise SetupError(
                f"{options.wheels} is not a folder: `make wheels`, on a machine with a network, makes one."
            )
        leave_environment(folder)
        set_up(PROJECT, folder, options.torch_index or None, options.wheels)
    except (SetupError, OSError) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
