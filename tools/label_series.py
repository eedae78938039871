"""Take labels by SeriesInstanceUID into a set of shards, whose series have pseudonyms. `--help` says how."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import dinox_io
from dinox_io.labels import LabelError, label_path, read_labels, write_labels
from dinox_io.output import PackError
from dinox_io.placed import join, of_set, unchanging
from dinox_io.privacy import key_of_set

_EXAMPLES = """\
examples:
  python tools/label_series.py phantom/labels/nodules.jsonl shards
  python tools/label_series.py my_marks.jsonl shards --key-file my.key --name findings

LABELS holds a mark a line as docs/format.md (Labels) says, but with the SeriesInstanceUID as series. Everything but the
series is taken over as it is: put no names of patients or readers into it.

exit code: 0 written; 1 it cannot be done with these labels or this set (nothing is written); 2 wrong usage
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
    try:
        path = label_path(given.folder, given.name or given.labels.stem)
        marks = read_labels(given.labels)
        with unchanging(given.folder), dinox_io.open_shards(given.folder) as shards:
            key = key_of_set(given.folder / "private", shards.manifest["options"].get("key_id", ""), given.key_file)
            chosen, foreign = of_set(marks, shards, key)
            joined = join(chosen, shards)
            if marks and not joined.placed:
                why = "its series are not in the set" if not chosen else "no slice of the set lies at their z"
                raise LabelError(f"none of the {len(marks)} marks of {given.labels} belongs to the set: {why}")
            write_labels(path, chosen)
    except (dinox_io.ShardError, PackError, ValueError, OSError) as error:
        print(f"label_series: {error}", file=sys.stderr)
        return 1
    print(
        f"{len(chosen)} marks written to {path}, {foreign} left out: their series are not in the set\n"
        f"{joined.placed - joined.partial} lie wholly on slices of the set, {joined.partial} in part, "
        f"{joined.outside} on none"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
