"""`python -m dinox_model validate`: whether a network, or a config, is whole and works."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinox_model.commands.target import UsageError, existing, is_config_file, load_network
from dinox_model.config import ViTConfig
from dinox_model.convert.source import find_source
from dinox_model.features import ViTFeatures
from dinox_model.vit import VisionTransformer

_EXAMPLES = """\
examples:
  python -m dinox_model validate runs/lung/checkpoints/step-00100000
  python -m dinox_model validate my_vit.yaml

Of weights: every file is there and is the one that was written (sha256, for our folders), every tensor belongs to the
network and is finite, and the network makes finite features. Of a config: its values make a network that runs.

exit code: 0 whole; 1 something is wrong, with the file or the tensors by name; 2 wrong usage, or nothing of that name
"""


def add_to(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "validate",
        help="check that a network or a config is whole and works",
        description="Check that a network on disk, or a config, is whole and works.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", metavar="FOLDER|CONFIG", help="a network: a folder or a safetensors file; or a YAML or JSON file"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check, and say what was found; returns the exit code."""
    try:
        path = existing(options.target)
        found = validate_config(path) if is_config_file(path) else validate_weights(path)
    except UsageError as error:
        print(f"validate: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"WRONG: {error}")
        return 1
    print(f"OK: {options.target}: {found}")
    return 0


def validate_weights(path: Path) -> str:
    """What was checked, in words. Raises ValueError that says what is wrong."""
    ours = find_source(path, None).format is None
    model = load_network(path)
    tensors = model.state_dict()
    wrong = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(f"{path}: not finite in {len(wrong)} of {len(tensors)} tensors: {', '.join(wrong)}")
    features = run_once(model)
    wrong = [name for name, part in parts_of(features).items() if not part.isfinite().all()]
    if wrong:
        raise ValueError(f"{path}: all weights are finite, but a forward gives {', '.join(wrong)} that are not")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    hashes = "hashes fit, " if ours else ""
    return f"{len(tensors)} tensors, {parameters:,} parameters, {hashes}weights and features finite"


def validate_config(path: Path) -> str:
    """What was checked, in words. Raises ValueError that says what is wrong."""
    try:
        config = ViTConfig.from_yaml(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with torch.device("meta"):
        model = VisionTransformer(config)
        run_once(model)
    return f"a network of {sum(parameter.numel() for parameter in model.parameters()):,} parameters, which runs"


@torch.no_grad()
def run_once(model: VisionTransformer) -> ViTFeatures:
    """The features of one smallest image of unit noise, of 2 x 2 patches."""
    config = model.config
    side, device = 2 * config.patch_size, model.mask_token.device
    shape = (1, config.in_channels, side, side)
    if device.type == "meta":
        x = torch.empty(shape, device=device)
    else:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    mm_per_pixel = torch.ones(1, 2, device=device) if config.uses_mm_per_pixel else None
    return model(x, mm_per_pixel=mm_per_pixel)


def parts_of(features: ViTFeatures) -> dict[str, Tensor]:
    """The features by name."""
    parts = {"cls": features.cls, "registers": features.registers, "patches": features.patches}
    return {name: part for name, part in parts.items() if part is not None}
