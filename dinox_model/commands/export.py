"""`python -m dinox_model export`: a network written in another format, with its preprocessing and a model card."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dinox_model.convert.export import DROPPABLE, save_pretrained
from dinox_model.convert.pretrained import load_pretrained
from dinox_model.convert.source import FORMATS, OURS
from dinox_model.export import DEVICES, DTYPES, export_package
from dinox_model.package import PackageFacts, read_facts

_EXAMPLES = """\
examples:
  python -m dinox_model export runs/lung/checkpoints/step-00100000 --format hf --output lung_hf
  python -m dinox_model export runs/lung/checkpoints/step-00100000 --format meta --output lung_meta --provenance p.json
  python -m dinox_model export dinov3-vits16-pretrain-lvd1689m --format dinox --in-channels 5 --output start
  python -m dinox_model export meddinov3.safetensors --source-format meddinov3 --format hf --output meddinov3_hf
  python -m dinox_model export runs/lung/checkpoints/step-00100000 --format pt2 --size 512 --output lung_pt2

formats: hf, a folder that transformers' AutoModel.from_pretrained loads without our code; meta, a state dict for Meta's
dinov3; dinox, a folder that dinox_model.load and a run's init_from read; pt2, one model.pt2 that torch runs without our
Python, compiled for one input size and for processors like this one (docs/export.md).
FOLDER is any of them: what it is, its files tell.

exit code: 0 written; 1 refused, with the tensors or options by name; 2 wrong usage, or no FOLDER of that name
"""


def add_to(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "export",
        help="write a network in another format",
        description="Write a network in another format, with its preprocessing and a model card.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="a network: a folder, or a safetensors file of Meta's"
    )
    parser.add_argument("--format", required=True, choices=("hf", "meta", "pt2", OURS, *FORMATS), metavar="FORMAT",
                        help=f"hf, meta, pt2, {OURS}; or exactly: {', '.join(FORMATS)}")  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--source-format", choices=(OURS, *FORMATS), metavar="FORMAT",
                        help=f"where the files do not tell: {', '.join((OURS, *FORMATS))}")  # fmt: skip
    parser.add_argument("--in-channels", type=int, metavar="N",
                        help="slices in a window; another number than the source's is adapted to")  # fmt: skip
    parser.add_argument(
        "--norm-eps", type=float, metavar="EPS", help="epsilon of the norms, where the files do not tell"
    )
    parser.add_argument("--allow", action="append", default=[], metavar="NAME",
                        help="a tensor of the source that may be missing or unknown (* for any characters), or one "
                        f"that the target may leave out ({', '.join(DROPPABLE)}); repeatable")  # fmt: skip
    parser.add_argument("--provenance", type=Path, metavar="FILE.json", help="what the model card says of the training")
    compiled = parser.add_argument_group("with --format pt2 only")
    compiled.add_argument("--size", type=_size, metavar="PIXELS",
                          help="side of the input, or Y,X; multiples of the patch size (default: 224)")  # fmt: skip
    compiled.add_argument("--device", choices=DEVICES, help="what it runs on; it must be here (default: cpu)")
    compiled.add_argument("--dtype", choices=DTYPES, help="of matrix products and attention (default: fp32)")
    parser.set_defaults(run=run, usage_error=parser.error)


def run(options: argparse.Namespace) -> int:
    """Read, write, say what was done; returns the exit code."""
    package = {name: getattr(options, name) for name in ("size", "device", "dtype") if getattr(options, name)}
    if package and options.format != "pt2":
        options.usage_error(f"--{next(iter(package))} is for --format pt2")
    if not options.folder.exists():
        print(f"export: {options.folder}: no such file or folder", file=sys.stderr)
        return 2
    try:
        if options.output.exists():  # said before minutes of reading
            raise ValueError(f"{options.output}: exists already; an export makes a new folder")
        provenance = _provenance(options.provenance)
        dropped = [name for name in options.allow if name in DROPPABLE]
        if dropped and options.format == "pt2":
            raise ValueError(f"a pt2 has a place for all of a network: leave out --allow {dropped[0]}")
        model, report = load_pretrained(
            options.folder,
            format=options.source_format,
            in_channels=options.in_channels,
            norm_eps=options.norm_eps,
            allow=[name for name in options.allow if name not in DROPPABLE],
        )
        print("\n".join(report.lines()))
        if options.format == "pt2":
            path = export_package(model, options.output, provenance=provenance, **package)
            print(f"written: {path}, {_spoken(read_facts(path))}")
            return 0
        target = save_pretrained(model, options.output, format=options.format, allow=dropped, provenance=provenance)
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    print(f"written: {options.output}, {target.title if target else 'a network of dinox_model'}")
    return 0


def _size(text: str) -> tuple[int, int]:
    try:
        y, x = map(int, (text if "," in text else f"{text},{text}").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 224, or 320,512 for y and x") from None
    return y, x


def _spoken(facts: PackageFacts) -> str:
    inputs = f"float32 (b, {facts.in_channels}, {facts.size[0]}, {facts.size[1]})"
    more = "".join(f" and {name}" for name in facts.inputs[1:])
    return f"for {facts.device} in {facts.dtype}: {inputs}{more} in; {', '.join(facts.outputs)} out"


def _provenance(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return values
