"""Pack CT series (DICOM, NIfTI) into a set of shards. `--help` says how; docs/format.md says what comes out."""

import argparse
import sys
from pathlib import Path

from packing.options import add_common, add_split, add_split_gaps

from dinox_io import codec
from dinox_io.merge import merge
from dinox_io.output import OutputFolder, PackError
from dinox_io.pack import pack
from dinox_io.part import Part
from dinox_io.progress import ProgressReport
from dinox_io.remove import remove_patient
from dinox_io.report import PackReport
from dinox_io.series import SeriesRules
from dinox_io.settings import PackSettings

_EXAMPLES = """\
examples:
  python tools/pack_shards.py ~/scans --output shards
  python tools/pack_shards.py /data/hospital_a /data/hospital_b --output shards --workers 8 --key-file my.key
  python tools/pack_shards.py ~/scans --output shards --key-file my.key --part 3/16   (one job of an array of 16)
  python tools/pack_shards.py --output shards --merge                                 (when all 16 are done)
  python tools/pack_shards.py /shared/scans --output shards --ray auto                (on all machines of a Ray cluster)
  python tools/pack_shards.py --output shards --remove 0123456789abcdef0123456789abcdef

INPUT may hold anything: series are found by their headers, whatever files and folders are called. What is no CT volume,
or cannot be trusted, is left out and listed with the reason in OUT/rejected.jsonl. Names, dates and UIDs stay in
OUT/private; the rest of OUT names no one. Run the same command again to add what is new, or to go on after a kill: the
shards that were finished are kept, so a smaller --shard-size keeps more.

For one set the key and the split must stay the same (--key-file, --val-fraction, --test-fraction, --split-seed): others
are refused; keep --nifti-patient too, it says who a patient is. All others may change, and count for what is not in the
set yet. Shares of the split are by chance of the key: with few patients a side may get none.

exit code: 0 every series is in the set, or was skipped by rule; 3 some were rejected (they are listed);
           1 some were rejected and none is in the set; 2 the command cannot be carried out as it stands: wrong usage,
           another packer at work, no room, a damaged set (the set is as it was before); 130 interrupted by Ctrl-C.
           It is about the whole INPUT, whether packed now or before; with --part about that part, with --merge about
           all parts; --remove without INPUT gives 0 when nothing of it is left
"""


def part(text: str) -> Part:
    """`3/16` -> the part."""
    try:
        return Part.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Pack CT series (DICOM, also in .zip archives, and NIfTI) into shards of int16 Hounsfield units "
        "that dinox trains from.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("inputs", metavar="INPUT", nargs="*", type=Path, help="a folder or file: DICOM, .zip, NIfTI")
    add_common(command)
    command.add_argument(
        "--preset", choices=sorted(codec.PRESETS), default="small",
        help="small: the smallest shards (default); fast: larger ones that are packed and read faster; both lossless",
    )  # fmt: skip
    command.add_argument(
        "--nifti-patient", metavar="REGEX",
        help="whose a NIfTI file is: the first group of this regular expression in its path below INPUT, e.g. "
        r"'(case_\d+)' (default: sub-…, else the folder below INPUT; see docs/data.md)",
    )  # fmt: skip
    _add_operations(command)
    add_split(command)
    choices = command.add_argument_group("series that are rejected unless you say otherwise")
    add_split_gaps(choices)
    choices.add_argument("--allow-tilt", action="store_true", help="keep series with a tilted gantry, as they are")
    choices.add_argument("--allow-burned-in", action="store_true", help="keep images marked as having text burned in")
    return command


def _add_operations(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("many machines (docs/cluster.md), and withdrawal")
    group.add_argument(
        "--ray", metavar="ADDRESS",
        help="pack on the machines of a Ray cluster (extra `cluster`), which all see INPUT at the same path: auto, "
        "HOST:PORT, or local; the headers are read here, by --workers processes, and OUT is written here",
    )  # fmt: skip
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--part", metavar="I/N", type=part,
        help="pack the I-th of N parts of INPUT into OUT/part-I-of-N, beside the others; I from 1 to N, or from 0 to "
        "N - 1; needs --key-file",
    )  # fmt: skip
    which.add_argument(
        "--merge", action="store_true",
        help="unite OUT/part-*-of-N, and a set that is in OUT already, into OUT; INPUT may be given and is not read",
    )  # fmt: skip
    which.add_argument(
        "--remove", metavar="PSEUDONYM",
        help="a patient withdraws: remove this patient (or series) from OUT and keep it out; then pack INPUT, if given",
    )  # fmt: skip


def settings_of(given: argparse.Namespace) -> PackSettings:
    """What a command line asks for."""
    return PackSettings(
        inputs=tuple(given.inputs),
        output=given.output,
        workers=given.workers,
        shard_bytes=given.shard_size,
        rules=SeriesRules(
            min_slices=given.min_slices,
            split_gaps=given.split_gaps,
            allow_tilt=given.allow_tilt,
            allow_burned_in=given.allow_burned_in,
        ),
        val_fraction=given.val_fraction,
        test_fraction=given.test_fraction,
        split_seed=given.split_seed,
        key_file=given.key_file,
        preset=given.preset,
        nifti_patient=given.nifti_patient,
        part=given.part,
        about=given.about,
        ray=given.ray,
    )


def remove(output: Path, pseudonym: str) -> list[str]:
    """Carry out --remove; returns what to say."""
    if not output.is_dir():
        raise PackError(f"there is no {output}: --remove takes a patient out of the set in --output")
    with OutputFolder(output).held() as folder:
        return remove_patient(folder, pseudonym).lines()


def carry_out(given: argparse.Namespace) -> PackReport | None:
    """Do what the command line asks for; None: nothing was packed or merged."""
    settings = settings_of(given)
    if given.remove is not None:
        print("\n".join(remove(given.output, given.remove)), flush=True)
        if not given.inputs:
            return None
    with ProgressReport() as progress:
        if given.merge:
            return merge(settings, progress)
        return pack(settings, progress)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    command = parser()
    given = command.parse_args(arguments)
    if not given.inputs and not given.merge and given.remove is None:
        command.error("give INPUT: what to pack (only --merge and --remove work without)")
    if given.part is not None and given.key_file is None:
        command.error("--part needs --key-file: all parts must make the same pseudonyms")
    if given.ray is not None and (given.merge or not given.inputs):
        command.error("--ray packs INPUT: leave it out with --merge, and where there is no INPUT")
    try:
        report = carry_out(given)
    except PackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the set is as it was before; run the same command again to go on", file=sys.stderr)
        return 130
    if report is None:
        return 0
    output = given.output / given.part.folder if given.part else given.output
    print("\n".join(report.lines(str(output))))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
