"""What runs in other interpreters imports nothing that may be missing there."""

import ast
import sys
from pathlib import Path

import pytest

STANDARD_LIBRARY_ONLY = ("timing", "serve", "harness", "intervals", "machine", "result", "compare", "loader_meters")
PEERS_WITH_TORCH = ("peak_memory", "peer_networks", "peer_transformers", "peer_updates")
PEERS = ("peer_codecs", "peer_stores", "peer_loaders", "peer_loader_stores")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("name", STANDARD_LIBRARY_ONLY + PEERS)
def test_imports(repository: Path, name: str) -> None:
    allowed = {*sys.stdlib_module_names, *STANDARD_LIBRARY_ONLY, *({"numpy", *PEERS} if name in PEERS else ())}
    assert imported(repository / "benchmarks" / f"{name}.py") <= allowed


@pytest.mark.parametrize("name", PEERS_WITH_TORCH)
def test_imports_with_torch(repository: Path, name: str) -> None:
    allowed = {*sys.stdlib_module_names, *STANDARD_LIBRARY_ONLY, *PEERS_WITH_TORCH, "numpy", "torch"}
    assert imported(repository / "benchmarks" / f"{name}.py") <= allowed


def test_no_benchmark_shadows_the_standard_library(repository: Path) -> None:
    names = {path.stem for path in (repository / "benchmarks").glob("*.py")}
    assert len(names) > 10
    assert not names & sys.stdlib_module_names
