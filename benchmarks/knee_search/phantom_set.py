"""A set for whoever has none yet: a made-up study, packed, in a folder of the search. Made once, and found again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import machine

OPTIONS = ("--patients", "6", "--size", "256")
SPLIT = ("--val-fraction", "0.25", "--split-seed", "4")
# Phantoms have nothing to hide: a key that everybody knows gives everybody the same split.
KEY = b"phantoms have no secrets to keep\n"
SOME_REJECTED = 3


class PhantomFailed(RuntimeError):
    """The phantom could not be made or packed; what the tool said."""


def phantom_set(folder: Path, tell: Callable[[str], None]) -> Path:
    """The folder of shards. PhantomFailed."""
    shards = folder / "shards"
    if not (shards / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key").write_bytes(KEY)
        tell("making a phantom: six made-up patients")
        _tool("make_phantom.py", folder / "dicom", *OPTIONS)
        tell("packing it")
        _tool("pack_shards.py", folder / "dicom", "--output", shards, "--key-file", folder / "key", *SPLIT)
    return shards


def _tool(name: str, *arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, str(machine.REPOSITORY / "tools" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(machine.REPOSITORY)},
    )
    if done.returncode not in (0, SOME_REJECTED):
        raise PhantomFailed(
            f"tools/{name} ended with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}"
        )
