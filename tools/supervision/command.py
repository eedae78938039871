"""The run folder that a trainer's command means, read from its words and its configuration files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_folder(command: Sequence[str]) -> Path | None:
    """`run.folder` of a command line `… -m dinox_train --config C.yaml … a.b=value`, later ones over earlier ones.

    None where the command does not say, or a file cannot be read: then only the trainer knows.
    """
    import yaml

    files, overrides = _words(command)
    found: object = None
    try:
        for file in files:
            found = _named(yaml.safe_load(Path(file).read_text("utf-8")), found)
        for override in overrides:
            key, _, text = override.partition("=")
            value = yaml.safe_load(text)
            for name in reversed(key.strip().split(".")):
                value = {name: value}
            found = _named(value, found)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return Path(found) if isinstance(found, str) and found else None


def _words(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files of --config, and the words of the form a.b=value behind the program's name."""
    if "dinox_train" not in command:
        return [], []
    files: list[str] = []
    overrides: list[str] = []
    words = iter(command[list(command).index("dinox_train") + 1 :])
    for word in words:
        if word == "--config":
            files.append(next(words, ""))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        elif "=" in word and not word.startswith("-"):
            overrides.append(word)
    return files, overrides


def _named(tree: Any, otherwise: object) -> object:
    run = tree.get("run") if isinstance(tree, dict) else None
    return run.get("folder", otherwise) if isinstance(run, dict) else otherwise
