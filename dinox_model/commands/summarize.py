"""`python -m dinox_model summarize`: parameters, tokens, FLOPs and memory of a network, in use and in training."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any

import torch

from dinox_model.commands.target import UsageError, read_config
from dinox_model.config import ViTConfig
from dinox_model.execution import Execution
from dinox_model.flops import forward_flops, training_flops
from dinox_model.memory_plan import PRECISIONS, plan_pass, plan_training
from dinox_model.vit import VisionTransformer
from dinox_model.workload import Workload, grid_of, masked_patches, num_tokens

Size = tuple[int, int]
_EXAMPLES = """\
examples:
  python -m dinox_model summarize vit_l
  python -m dinox_model summarize vit_7b --batch 4 --precision bf16 --checkpointing block
  python -m dinox_model summarize my_vit.yaml --sizes 224,512,96x160 --json
  python -m dinox_model summarize runs/lung/checkpoints/step-00100000

A size is the side of an image in pixels, or HEIGHTxWIDTH. Training is a DINOv3 update of --batch images in one piece:
two views of a size, eight local ones of 6 x 6 patches, DINO and iBOT heads of 65536 prototypes each, AdamW, a teacher.
FLOPs are 2 for each multiplication with addition of a matrix product. Memory is planned, in eager execution; what
kernels, allocator and runtime take for themselves comes on top. Where memory is
at its peak no gradient is there yet, unless training is in pieces (train.accumulation): that takes the memory of a
piece, and the gradients of those before.

exit code: 0 done; 1 the config or the weights are not whole; 2 wrong usage, or nothing of that name
"""


def add_to(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "summarize",
        help="parameters, tokens, FLOPs and memory of a network",
        description="Parameters, tokens, FLOPs and memory of a network, for using and for training it. No weights are "
        "made, so that the largest network is summarized anywhere.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", metavar="PRESET|CONFIG|FOLDER", help="vit_s, …; a YAML or JSON file with a config; or weights"
    )
    parser.add_argument("--sizes", type=_sizes, metavar="A,B", help="default: 14 x 14 and 32 x 32 patches")
    parser.add_argument("--batch", type=_positive, default=8, metavar="B", help="images at a time (default: 8)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="default: bf16 (autocast)")
    parser.add_argument("--checkpointing", choices=("none", "block", "selective"), default="none",
                        help="what a block computes again in the backward (default: none)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON: exact integers, bytes and FLOPs")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Summarize and print; returns the exit code."""
    try:
        config = read_config(options.target)
    except UsageError as error:
        print(f"summarize: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"summarize: {options.target}: {error}", file=sys.stderr)
        return 1
    sides = [side * config.patch_size for side in (14, 32)]
    sizes: list[Size] = options.sizes or [(side, side) for side in sides]
    execution = Execution(checkpointing=options.checkpointing)
    try:
        found = summarize(config, sizes, batch=options.batch, precision=options.precision, execution=execution)
    except ValueError as error:  # a size that is not one of patches
        print(f"summarize: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"target": options.target} | found, indent=1) if options.json else _table(options.target, found))
    return 0


def summarize(
    config: ViTConfig, sizes: list[Size], *, batch: int, precision: str, execution: Execution
) -> dict[str, Any]:
    """All figures, as JSON values: parameters by part; for each size tokens, FLOPs and bytes."""
    return {
        "config": config.to_dict(),
        "parameters": parameters_by_part(config),
        "batch": batch,
        "precision": precision,
        "checkpointing": execution.checkpointing,
        "sizes": [_at_size(config, size, batch, precision, execution) for size in sizes],
    }


def parameters_by_part(config: ViTConfig) -> dict[str, int]:
    """Numbers of parameters, `total` last."""
    with torch.device("meta"):
        model = VisionTransformer(config)
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[_part(name)] += parameter.numel()
    return dict(parts) | {"total": sum(parts.values())}


def _part(name: str) -> str:
    """The part of a network that a parameter belongs to."""
    first, *rest = name.split(".")
    if first != "blocks":
        return "tokens" if first.endswith(("_token", "_tokens")) else first
    inner = rest[1]
    return f"blocks: {inner}" if inner in ("attention", "mlp") else "blocks: norms and LayerScale"


def _at_size(config: ViTConfig, size: Size, batch: int, precision: str, execution: Execution) -> dict[str, Any]:
    rows, columns = grid_of(config, size)
    local = 6 * config.patch_size
    found: dict[str, Any] = {
        "size": list(size),
        "grid": [rows, columns],
        "tokens": num_tokens(config, size),
        "forward_flops": forward_flops(config, size),
        "forward_bytes": plan_pass(config, batch, size, precision=precision).peak,
        "backward_bytes": plan_pass(
            config, batch, size, precision=precision, execution=execution, backward=True
        ).peak,
    }  # fmt: skip
    if size[0] != size[1]:
        return found | {"training": None}
    workload = Workload(
        images=batch,
        global_size=size[0],
        local_size=local,
        masked_patches=masked_patches(2 * batch, rows * columns),
    )
    flops = training_flops(config, workload, execution)
    plan = plan_training(config, workload, precision=precision, execution=execution)
    by_step = {step: flops.of(step=step) for step in dict.fromkeys(row.step for row in flops.rows)}
    return found | {
        "training": {
            "local_size": local,
            "flops": by_step | {"total": flops.total, "per_image": flops.per_image},
            "bytes": dict(plan.items) | {"peak": plan.peak},
        }
    }


def _table(target: str, found: dict[str, Any]) -> str:
    config, parameters = ViTConfig.from_dict(found["config"]), found["parameters"]
    lines = [
        f"{target}: {config.num_layers} blocks of width {config.width}, {config.num_heads} heads, {config.mlp} MLP of "
        f"{config.mlp_hidden}, patches of {config.patch_size}, {config.in_channels} slices",
        "",
        *(f"{part:<30}{count:>16,}" for part, count in parameters.items()),
        "",
        f"memory: {found['batch']} images, {found['precision']}, checkpointing {found['checkpointing']}",
        "",
        f"{'':<12}{'':>8}{'forward':>12}{'forward':>12}{'+ backward':>12}{'update':>12}{'update':>12}",
        f"{'size':<12}{'tokens':>8}{'GFLOP/image':>12}{'MiB':>12}{'MiB':>12}{'GFLOP/image':>12}{'MiB':>12}",
    ]
    for row in found["sizes"]:
        height, width = row["size"]
        training = row["training"]
        lines.append(
            f"{f'{height}x{width}':<12}{row['tokens']:>8,}{sum(row['forward_flops'].values()) / 1e9:>12,.2f}"
            f"{row['forward_bytes'] / 2**20:>12,.0f}{row['backward_bytes'] / 2**20:>12,.0f}"
            + (
                f"{training['flops']['per_image'] / 1e9:>12,.1f}{training['bytes']['peak'] / 2**20:>12,.0f}"
                if training
                else f"{'-':>12}{'-':>12}"
            )
        )
    for row in found["sizes"]:
        if row["training"]:
            lines += ["", f"an update at {row['size'][0]}, local views at {row['training']['local_size']}, MiB:"]
            lines += [f"  {name:<28}{size / 2**20:>12,.1f}" for name, size in row["training"]["bytes"].items()]
    return "\n".join(lines)


def _sizes(text: str) -> list[Size]:
    sizes: list[Size] = []
    for part in text.split(","):
        sides = part.split("x")
        if not 1 <= len(sides) <= 2 or not all(side.isdecimal() and int(side) for side in sides):
            raise argparse.ArgumentTypeError(f"{part!r} is no size: 224, or 96x160")
        sizes.append((int(sides[0]), int(sides[-1])))
    return sizes


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images: 1 or more")
    return int(text)
