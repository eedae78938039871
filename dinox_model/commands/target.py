"""What a command is given to look at: a preset's name, a file with a `ViTConfig`, or weights on disk."""

from __future__ import annotations

from pathlib import Path

from dinox_model.config import PRESETS, ViTConfig, nearest
from dinox_model.vit import VisionTransformer

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


class UsageError(ValueError):
    """The target is nothing that a command can look at."""


def is_config_file(path: Path) -> bool:
    """Whether `path` is a file with a `ViTConfig` alone."""
    return path.is_file() and path.suffix in CONFIG_SUFFIXES


def read_config(target: str) -> ViTConfig:
    """The config of `target`: a preset's name, a YAML or JSON file, or weights, which are not read where it stands
    beside them. Raises UsageError for what there is not, ValueError for what is not whole."""
    if target in PRESETS:
        return PRESETS[target]
    path = existing(target)
    return ViTConfig.from_yaml(path.read_text()) if is_config_file(path) else load_network(path).config


def existing(target: str) -> Path:
    """The path that `target` names. Raises UsageError where there is none."""
    path = Path(target)
    if not path.exists() and target in PRESETS:
        raise UsageError(f"{target}: a preset, of which nothing is on disk; give a folder of weights or a config file")
    if not path.exists():
        raise UsageError(f"{target}: no such file or folder, and no preset{nearest(target, PRESETS)}")
    return path


def load_network(path: Path) -> VisionTransformer:
    """The network at `path`, ours or others', on the CPU. Raises ValueError that says what is wrong."""
    from dinox_model.convert.pretrained import load_pretrained

    return load_pretrained(path)[0]
