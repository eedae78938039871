"""Features of CT volumes by a network: shards, DICOM or NIfTI in, safetensors or npz out. `--help` says how."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is imported when there is something to do: --help and readers of DICOM do without
    from inference.encoding import Writer
    from inference.network import Network

_EXAMPLES = """\
examples:
  python tools/infer.py runs/lung/checkpoints/step-00100000 --shards shards --split val --output features
  python tools/infer.py lung_pt2/model.pt2 --input ~/scans scan.nii.gz --output features --every 4
  python tools/infer.py lung_hf --shards shards --parts cls patches --format npz --output features
  python tools/infer.py runs/lung/checkpoints/step-00100000 --shape 8,3,224,224      (random pixels, for the clock only)

MODEL is a folder that `dinox_model.save`, a run's checkpoints or `python -m dinox_model export` made (ours, Hugging
Face's or Meta's), or the .pt2 file of an export. HU become its input as in training: by the folder's preprocess.json,
which a .pt2 has inside. It also says how far apart a window's slices were in training; --step and --step-mm are for
networks that nobody knows this of, and are followed with a note where they differ. A .pt2 takes one size: that of the
slices, rounded up to whole patches (export with --size 512 for CT of 512 x 512).

DIR gets one file a volume, named by the volume's pseudonym: cls (windows, width) and patches (windows, patches, width)
as float32, slice (from 0) and z_mm of each window's middle slice, grid (rows, columns of patches), and as metadata the
volume, its spacing, and how the features were made. A file is there when it is whole: the same command goes on where
one was stopped, and keeps what is there.

Files given by --input are read by the packer's own readers and held to its rules. DIR/rejected.jsonl lists what was
left out and why. Names stay in DIR/private: its sources.jsonl says which files are which pseudonym; its key makes the
same pseudonyms again. With the --key-file that a set was packed with, they are that set's.

exit code: 0 every volume has its features, or was skipped by rule; 3 some were rejected (they are listed);
           1 none has any, or something is damaged or cannot be computed; 2 wrong usage, or no MODEL, OUT
           or INPUT of that name; 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Run a network on CT volumes, write its features, and say how fast it was.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", metavar="MODEL", type=Path, help="a network's folder, or a .pt2 file")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--shards", metavar="OUT", help="a set of shards: the folder that pack_shards made, or s3://…")
    source.add_argument("--input", metavar="INPUT", type=Path, nargs="+", help="files and folders: DICOM, .zip, NIfTI")
    source.add_argument("--shape", metavar="B,C,Y,X", type=_shape, help="random windows; nothing is read or written")
    command.add_argument("--output", metavar="DIR", type=Path, help="folder of the features, new or to go on with")
    command.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1 … (default: cuda where there is one, else cpu)"
    )
    command.add_argument("--dtype", choices=("fp32", "bf16"), help="of matrix products and attention (default: fp32)")
    _add_windows(command)
    _add_rules(command)
    return command


def _add_windows(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("which windows, and what of them")
    group.add_argument("--split", choices=("train", "val", "test", "none"), help="volumes of this side (default: all)")
    group.add_argument("--every", metavar="N", type=_count, help="a window around every N-th slice (default: 1)")
    apart = group.add_mutually_exclusive_group()
    apart.add_argument(
        "--step", metavar="N", type=_count, help="slices of a window are N apart (default: as in training)"
    )
    apart.add_argument("--step-mm", metavar="MM", type=float, help="or about MM millimetres")
    group.add_argument("--batch-size", metavar="N", type=_count, help="windows at a time (default: 8)")
    group.add_argument("--parts", nargs="+", choices=("cls", "patches"), help="what is written (default: cls)")
    group.add_argument("--format", choices=("safetensors", "npz"), help="of the files (default: safetensors)")
    group.add_argument("--batches", metavar="N", type=_count, help="with --shape: how many are timed (default: 20)")


def _add_rules(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "with --input: pseudonyms, and series that are rejected unless you say otherwise"
    )
    group.add_argument("--key-file", metavar="K", type=Path, help="key of the pseudonyms (default: DIR/private/key)")
    group.add_argument("--min-slices", metavar="N", type=_count, help="reject series with fewer (default: 1)")
    group.add_argument("--split-gaps", action="store_true", help="keep the contiguous runs of series with gaps")
    group.add_argument("--allow-tilt", action="store_true", help="keep series with a tilted gantry, as they are")
    group.add_argument("--allow-burned-in", action="store_true", help="keep images marked as having text burned in")


_OF_SOURCE = {
    "split": ("shards",),
    **dict.fromkeys(("output", "every", "step", "step_mm", "batch_size", "format"), ("shards", "input")),
    "batches": ("shape",),
    **dict.fromkeys(("key_file", "min_slices", "split_gaps", "allow_tilt", "allow_burned_in"), ("input",)),
}
"""Options that mean something with some sources only."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    command = parser()
    given = command.parse_args(arguments)
    source = next(name for name in ("shards", "input", "shape") if getattr(given, name) is not None)
    for name, sources in _OF_SOURCE.items():
        if source not in sources and getattr(given, name) not in (None, False):
            command.error(f"--{name.replace('_', '-')} means nothing with --{source}")
    if source != "shape" and given.output is None:
        command.error(f"--{source} needs --output")
    try:
        return {"shards": run_shards, "input": run_input, "shape": run_shape}[source](given)
    except KeyboardInterrupt:
        print("interrupted: the files that are there are whole; the same command goes on", file=sys.stderr)
        return 130
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or given.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    except (ValueError, ImportError) as error:  # ShardError and WeightsError are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 1


class UsageError(Exception):
    """What was asked for cannot be begun."""


def run_shape(given: argparse.Namespace) -> int:
    """Time random windows."""
    from inference.encoding import measure

    network = opened(given)
    parts = parts_of(given, network)
    print("\n".join(measure(network, given.shape, given.batches or 20, parts).lines()))
    return 0


def run_shards(given: argparse.Namespace) -> int:
    """Features of a set's volumes."""
    from inference.scan import scans_of_set

    from dinox_io import open_shards
    from dinox_io.progress import ProgressReport

    if "://" not in given.shards and not Path(given.shards).exists():
        raise UsageError(f"{given.shards}: no such folder; --shards is what pack_shards made")
    if given.output.resolve().is_relative_to(Path(given.shards).resolve()):
        raise UsageError("--output lies in the set: features go elsewhere, a set holds nothing but what was packed")
    with open_shards(given.shards) as shards:
        scans = scans_of_set(shards, given.split)
        writer = begun(given)
        with ProgressReport() as progress:
            progress.stage("encoding", sum(scan.size_bytes for scan in scans))
            for scan in scans:
                writer.write(scan)
                progress.advance(scan.size_bytes)
    return ended(writer)


def run_input(given: argparse.Namespace) -> int:
    """Features of volumes that no set holds."""
    from inference.scan import scan_of_volume
    from inference.unpacked import UnpackedVolumes

    from dinox_io.output import PackError
    from dinox_io.progress import ProgressReport
    from dinox_io.series import SeriesRules

    volumes = UnpackedVolumes(
        inputs=tuple(given.input),
        folder=given.output,
        key_file=given.key_file,
        rules=SeriesRules(
            min_slices=given.min_slices or 1,
            split_gaps=given.split_gaps,
            allow_tilt=given.allow_tilt,
            allow_burned_in=given.allow_burned_in,
        ),
    )
    try:
        volumes.check()
        writer = begun(given)
        with ProgressReport() as progress:
            for volume in volumes.read(progress):
                writer.write(scan_of_volume(volume))
    except PackError as error:
        raise UsageError(error) from error
    for line in volumes.lines():
        print(line)
    return ended(writer, volumes.num_rejected)


def opened(given: argparse.Namespace) -> "Network":
    """The network, with what is to be said of it."""
    from inference.network import open_network

    from dinox_model.host_memory import keep_freed_memory

    if not given.model.exists():
        raise UsageError(f"{given.model}: no such file or folder; MODEL is a network's folder or a .pt2 file")
    network = open_network(given.model, given.device, given.dtype)
    if network.device == "cpu":
        keep_freed_memory()
    print("\n".join(network.notes))
    print(f"runs on {network.device} in {network.dtype}, windows of {network.depth} slices", flush=True)
    return network


def parts_of(given: argparse.Namespace, network: "Network") -> tuple[str, ...]:
    """What is wanted of each window."""
    parts = tuple(dict.fromkeys(given.parts or ("cls",)))
    if "cls" in parts and not network.has_cls:
        raise UsageError("this network has no CLS token: give --parts patches")
    return parts


def steps_of(given: argparse.Namespace, network: "Network") -> tuple[int, float | None]:
    """How far apart a window's slices are, in slices or millimetres: as asked for, else as in training; it is said."""
    trained = network.step, network.step_mm
    asked = given.step, given.step_mm
    if asked == (None, None):
        print(f"slices of a window are {_apart(*trained)}" + (", as in training" if trained != (None, None) else ""))
        return network.step or 1, network.step_mm
    if asked != trained and trained != (None, None):
        print(f"note: slices of a window are {_apart(*asked)} as you ask; in training they were {_apart(*trained)}")
    return given.step or 1, given.step_mm


def _apart(step: int | None, step_mm: float | None) -> str:
    return f"{step_mm:g} mm apart" if step_mm is not None else f"{step or 1} apart"


def begun(given: argparse.Namespace) -> "Writer":
    """The network opened, and DIR ready for its features."""
    from inference.encoding import Request, Writer
    from inference.meter import Meter

    network = opened(given)
    if network.depth % 2 == 0:
        raise UsageError(f"windows have an odd number of slices, one in the middle; this network takes {network.depth}")
    step, step_mm = steps_of(given, network)
    request = Request(
        parts=parts_of(given, network),
        every=given.every or 1,
        step=step,
        step_mm=step_mm,
        batch_size=given.batch_size or 8,
        format=given.format or "safetensors",
    )
    meter = Meter(request.batch_size, network.device, network.weights_bytes)
    return Writer(given.output, request, network, meter)


def ended(writer: "Writer", num_rejected: int = 0) -> int:
    """Say what was done; returns the exit code."""
    kept = f", {writer.kept} were there already" if writer.kept else ""
    print(f"{writer.written} {'file' if writer.written == 1 else 'files'} written to {writer.folder}{kept}")
    if writer.written:
        print("\n".join(writer.meter.lines()))
    if not writer.written + writer.kept:
        return 1
    return 3 if num_rejected + writer.unsuited else 0


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(map(int, text.split(",")))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write it like 8,3,224,224")
    return shape


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
