"""Take labels by SeriesInstanceUID into a set of shards, whose series have pseudonyms. `--help` says how."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import dinox_io
from dinox_io.labels import LabelError, LabelUsageError, label_path, read_labels
from dinox_io.output import PackError
from dinox_io.placed import check_given, given_key, join, of_set, put_labels, unchanging

_EXAMPLES = """\
examples:
  python tools/label_series.py phantom/labels/nodules.jsonl shards
  python tools/label_series.py my_marks.jsonl shards --key-file my.key --name findings

LABELS holds a mark a line as docs/format.md (Labels) says, but with the SeriesInstanceUID as series. Everything but the
series is taken over as it is: put no names of patients or readers into it.

exit code: 0 written; 1 it cannot be done with these labels or this set (nothing is written); 2 wrong usage, path or key
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Take labels that name series by SeriesInstanceUID into a set of shards.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("labels", metavar="LABELS", type=Path, help="a file of marks (.jsonl)")
    command.add_argument("folder", metavar="OUT", type=Path, help="folder that pack_shards made")
    command.add_argument(
        "--key-file", metavar="K", type=Path, help="the key that the set was packed with (default: OUT/private/key)"
    )
    command.add_argument("--name", help="name of the labels in the set (default: that of the file)")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = parser().parse_args(arguments)
    path = given.folder
    try:
        check_given(given.labels, given.folder)
        path = label_path(given.folder, given.labels.stem if given.name is None else given.name)
        marks = read_labels(given.labels)
        if not marks:
            raise LabelError(f"{given.labels} holds no marks: nothing was written")
        with unchanging(given.folder), dinox_io.open_shards(given.folder) as shards:
            chosen, foreign = of_set(marks, shards, given_key(shards, given.folder, given.key_file))
            joined = join(chosen, shards)
            if not joined.placed:
                why = "its series are not in the set" if not chosen else "no slice of the set lies at their z"
                raise LabelError(f"none of the {len(marks)} marks of {given.labels} belongs to the set: {why}")
            written = put_labels(path, chosen)
    except LabelUsageError as error:
        print(f"label_series: {error}", file=sys.stderr)
        return 2
    except (dinox_io.ShardError, PackError, ValueError) as error:
        print(f"label_series: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"label_series: {error.filename or path}: {error.strerror}", file=sys.stderr)
        return 1
    print(
        f"{written}, {foreign} left out: their series are not in the set\n"
        f"{joined.placed - joined.partial} lie wholly on slices of the set, {joined.partial} in part, "
        f"{joined.outside} on none"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
