"""The house's directions, read from the source: who may import whom, and what may be imported only where it is used.

`import dinox_model`, and the parts of `dinox_train` that compute, need torch and numpy only: a process that can import
nothing else imports them.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = ("dinox_io", "dinox_model", "dinox_train")
OURS = {*PACKAGES, "tools", "benchmarks", "tests", "conftest"}
MAY_IMPORT_OF_OURS = {"dinox_io": set(), "dinox_model": set(), "dinox_train": {"dinox_io", "dinox_model"}}
# What stands in an import statement, where that is not the package's name.
IMPORTED_AS = {
    "python-gdcm": "gdcm",
    "pylibjpeg-openjpeg": "openjpeg",
    "pyjpegls": "jpeg_ls",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "pytest-timeout": "pytest_timeout",
}
# The only files that may import these at all.
ONLY_IN = {
    "pydicom": {"dinox_io/dicom.py"},
    "pydantic": {
        "dinox_train/config.py",
        *(
            f"dinox_train/sections/{name}.py"
            for name in (
                *("data", "execution", "kernels", "model", "objective", "optimizer", "parallel", "plan", "profile"),
                *("rehearsal", "run", "section", "views", "watch"),
            )
        ),
    },
    "yaml": {"dinox_io/about.py", "dinox_model/fields.py", "dinox_train/config_file.py"},
    "matplotlib": {"dinox_train/pictures.py"},
    "triton": {"dinox_model/kernels/language.py", "dinox_model/kernels/compiled.py"},
}
# Tries to import triton when it is imported itself, and does without.
MAY_TRY_AT_TOP = {("dinox_model/kernels/language.py", "triton")}
TORCH_AND_NUMPY_ONLY = (
    "dinox_model",
    "dinox_model.execution",
    "dinox_model.memory_plan",
    "dinox_model.commands.summarize",
    "dinox_model.commands.validate",
    "dinox_model.kernels.architecture",
    "dinox_model.kernels.compiled",
    "dinox_model.kernels.choice",
    "dinox_model.kernels.residual_norm",
    "dinox_model.kernels.rotate",
    "dinox_model.kernels.tiles",
    "dinox_model.kernels.traffic",
    "dinox_model.kernels.unfilter",
    "dinox_model.linear",
    "dinox_train.kernels.adamw_average",
    "dinox_train.kernels.balanced_cross_entropy",
    "dinox_train.kernels.fused_losses",
    "dinox_train.kernels.prototype_potential",
    "dinox_train.keyed",
    "dinox_train.kernels.crop",
    "dinox_train.views",
    "dinox_train.view_statistics",
    "dinox_train.schedule",
    "dinox_train.optimizer",
    "dinox_train.optimizer_trial",
    "dinox_train.teacher",
    "dinox_train.working_weights",
    "dinox_train.part",
    "dinox_train.sharded_weights",
    "dinox_train.warm_start",
    "dinox_train.lengths",
    "dinox_train.step",
    "dinox_train.platform",
    "dinox_train.platform.start",
    "dinox_train.platform.tune",
    "dinox_train.masking",
    "dinox_train.micro_batch",
    "dinox_train.network",
    "dinox_train.network_draws",
    "dinox_train.view_batch",
    "dinox_train.objectives.centering",
    "dinox_train.objectives.classification",
    "dinox_train.objectives.comparison",
    "dinox_train.objectives.dino",
    "dinox_train.objectives.dinov3",
    "dinox_train.objectives.gram",
    "dinox_train.objectives.ibot",
    "dinox_train.objectives.koleo",
    "dinox_train.objectives.mae",
    "dinox_train.objectives.masked_autoencoder",
    "dinox_train.objectives.objective",
    "dinox_train.objectives.prototypes",
    "dinox_train.objectives.sinkhorn",
    "dinox_train.objectives.supervised",
)


@dataclass(frozen=True)
class Import:
    """One import: the file (from the repository), the line, the top-level name, and whether it runs with the module."""

    file: str
    line: int
    name: str
    at_top: bool


def imports_of(tree: ast.AST, file: str, at_top: bool = True) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name.partition(".")[0], at_top)
        elif isinstance(node, ast.ImportFrom):
            name = file.partition("/")[0] if node.level else (node.module or "").partition(".")[0]
            yield Import(file, node.lineno, name, at_top)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            inside |= isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            yield from imports_of(node, file, at_top and not inside)


def imports_in(repository: Path, package: str) -> list[Import]:
    files = sorted((repository / package).rglob("*.py"))
    assert files, f"{package} holds no Python file"
    return [
        found
        for file in files
        for found in imports_of(ast.parse(file.read_text("utf-8")), file.relative_to(repository).as_posix())
    ]


def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]


def import_names(lines: list[str]) -> set[str]:
    names = [re.match(r"[A-Za-z0-9._-]+", line).group().lower() for line in lines]  # type: ignore[union-attr]
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}


def core_names(repository: Path) -> set[str]:
    return import_names(project(repository)["dependencies"])


def optional_names(repository: Path) -> set[str]:
    extras = project(repository)["optional-dependencies"].values()
    return import_names([line for lines in extras for line in lines]) | {"triton"}


@pytest.mark.parametrize("package", PACKAGES)
def test_directions(repository: Path, package: str) -> None:
    allowed = MAY_IMPORT_OF_OURS[package] | {package}
    wrong = [found for found in imports_in(repository, package) if found.name in OURS - allowed]
    assert not wrong


def test_dinox_io_knows_no_torch(repository: Path) -> None:
    assert not [found for found in imports_in(repository, "dinox_io") if found.name in {"torch", "triton"}]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_declared(repository: Path, package: str) -> None:
    known = {*sys.stdlib_module_names, *PACKAGES} | core_names(repository) | optional_names(repository)
    assert not [found for found in imports_in(repository, package) if found.name not in known]


@pytest.mark.parametrize("package", PACKAGES)
def test_optional_packages_are_imported_where_they_are_used(repository: Path, package: str) -> None:
    optional = optional_names(repository) - core_names(repository)
    found = [one for one in imports_in(repository, package) if (one.file, one.name) not in MAY_TRY_AT_TOP]
    assert not [one for one in found if one.name in optional and one.at_top]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_with_one_home(repository: Path, package: str) -> None:
    found = imports_in(repository, package)
    assert not [one for one in found if one.name in ONLY_IN and one.file not in ONLY_IN[one.name]]


def test_dinox_model_needs_torch_and_numpy_only(repository: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "dinox_model"}
    wrong = [found for found in imports_in(repository, "dinox_model") if found.at_top and found.name not in allowed]
    assert not [found for found in wrong if (found.file, found.name) not in MAY_TRY_AT_TOP]
    safetensors = {found.file for found in imports_in(repository, "dinox_model") if found.name == "safetensors"}
    assert safetensors <= {"dinox_model/tensor_files.py"}


def test_the_walk_sees_every_kind_of_import() -> None:
    source = """
import a.b, c
from d.e import f
from . import g
if TYPE_CHECKING:
    import h
try:
    import i
except ImportError:
    pass
class K:
    import l
    def m(self):
        from n import o
"""
    found = {one.name: one.at_top for one in imports_of(ast.parse(source), "pack/file.py")}
    assert found == {"a": True, "c": True, "d": True, "pack": True, "h": False, "i": True, "l": True, "n": False}


BLOCKED_PROCESS = """
import importlib, importlib.metadata, re, sys

def required(name, seen):
    "import names of a distribution and of all it requires without an extra"
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return
    seen.add(name.lower().replace("-", "_"))
    for line in found.requires or []:
        other = re.match(r"[A-Za-z0-9._-]+", line).group()
        if "extra ==" not in line and other.lower().replace("-", "_") not in seen:
            required(other, seen)

theirs = set()
for name in ("torch", "numpy"):
    required(name, theirs)
allowed = {*sys.stdlib_module_names, *theirs, "dinox_model", "dinox_train"}
import torch, numpy
known = {name.partition(".")[0] for name in sys.modules}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in known:
            raise ModuleNotFoundError(f"No module named {name!r} (only torch and numpy are there)", name=name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
try:
    import yaml
except ModuleNotFoundError:
    pass
else:
    sys.exit("the blocker lets yaml through")
for name in sys.argv[2:]:
    importlib.import_module(name)
import dinox_model
dinox_model.build("vit_ti", in_channels=3)
"""


def test_they_run_where_nothing_but_torch_and_numpy_is(repository: Path) -> None:
    command = [sys.executable, "-c", BLOCKED_PROCESS, str(repository), *TORCH_AND_NUMPY_ONLY]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
