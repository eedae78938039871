"""Pack a PNG set of DINO-X (16-bit gray slices and an index table) into shards: see `--help`, docs/import_png.md."""

import argparse
import sys
from pathlib import Path

from packing.options import add_common, add_split, add_split_gaps

from dinox_io.output import PackError
from dinox_io.pack import Found, pack
from dinox_io.png16 import ENCODINGS, SPACING_MAX_MM, Spacing
from dinox_io.png_index import IndexTable, check_encoding, check_present, found_series, patients_of, read_index
from dinox_io.progress import ProgressReport
from dinox_io.report import PackReport
from dinox_io.series import SeriesRules
from dinox_io.settings import PackSettings
from dinox_io.workers import WorkerPool

_EXAMPLES = """\
examples:
  python tools/import_png.py data/processed/lidc-idri/index.csv --encoding x1 --output shards
  python tools/import_png.py index.csv --encoding x10 --output shards --root /mnt/png --patient-from '.+'

--encoding: DINO-X stored rint(HU) + 32768 (x1), and from September 2026 on rint(10 HU) + 32768 (x10), and calls both
the same in its table. You have to know which; a choice that the pictures contradict is refused.

--patient-from: the table knows no patients. For LIDC-IDRI they are found in series_dir; for anything else say what in
series_dir tells them apart, with a regular expression: its first group counts, or the whole match. '.+' takes each
series for another patient: right for one-scan-a-patient sets such as the Medical Segmentation Decathlon.

What PNG does not hold is assumed: heights are slice_index times the z spacing, from 0, and slices lie as scanners write
them. Pack the original DICOM or NIfTI with pack_shards.py wherever you still have it: docs/import_png.md says what is
lost. What cannot be trusted is left out and listed with the reason in OUT/rejected.jsonl.

exit code: as pack_shards.py: 0 every series is in the set; 3 some were rejected (they are listed);
           1 some were rejected and none is in the set; 2 the command cannot be carried out as it stands
"""


def spacing_mm(text: str) -> Spacing:
    """`1.25,0.7,0.7` -> (z, y, x) in mm."""
    try:
        z, y, x = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no spacing: write Z,Y,X in mm, like 1.25,0.7,0.7") from None
    if not all(0 < value <= SPACING_MAX_MM for value in (z, y, x)):
        raise argparse.ArgumentTypeError(f"{text!r}: each must be above 0 and at most {SPACING_MAX_MM:.0f} mm")
    return z, y, x


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Pack a PNG set of DINO-X (16-bit gray slices and an index table) into shards of int16 HU.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("index", metavar="INDEX.csv", type=Path, help="the table: png_path, series_dir, slice_index …")
    command.add_argument(
        "--encoding", choices=sorted(ENCODINGS), required=True, help="how HU were stored; never guessed, see below"
    )
    add_common(command)
    command.add_argument(
        "--root", metavar="FOLDER", type=Path,
        help="where the pictures are now, if not where the table says: the longest tail of each path that exists there "
        "is taken (default: the folder of INDEX.csv and the one above it)",
    )  # fmt: skip
    command.add_argument(
        "--spacing", metavar="Z,Y,X", type=spacing_mm,
        help="spacing in mm of slices for which the table gives none, or the placeholder 1,1,1 (default: reject them)",
    )  # fmt: skip
    command.add_argument(
        "--patient-from", metavar="REGEX",
        help="what in series_dir tells patients apart (default: LIDC-IDRI-0001 and the like; else refused)",
    )  # fmt: skip
    add_split_gaps(command)
    add_split(command)
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = parser().parse_args(arguments)
    try:
        table = read_index(given.index, given.root)
        report = import_table(table, patients_of(table, given.patient_from), given)
    except PackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the set is as it was before; run the same command again", file=sys.stderr)
        return 130
    if table.repeated_rows:
        print(f"{table.repeated_rows} rows of the table repeat another one, and were taken once.")
    print("\n".join(report.lines(str(given.output), comparable=False)))
    return report.exit_code


def import_table(table: IndexTable, patients: list[str], given: argparse.Namespace) -> PackReport:
    """Pack what a table lists. Raises PackError."""
    settings = PackSettings(
        inputs=(table.path,),
        output=given.output,
        workers=given.workers,
        shard_bytes=given.shard_size,
        rules=SeriesRules(min_slices=given.min_slices, split_gaps=given.split_gaps),
        val_fraction=given.val_fraction,
        test_fraction=given.test_fraction,
        split_seed=given.split_seed,
        key_file=given.key_file,
        about=given.about,
    )
    settings.check()
    check_present(table)
    with WorkerPool(settings.workers) as pool:  # before OUT is touched
        check_encoding(table, given.encoding, pool)

    def find(_settings: PackSettings, key: bytes, _pool: WorkerPool, _progress: ProgressReport) -> Found:
        series = found_series(table, patients, encoding=given.encoding, spacing_mm=given.spacing, key=key)
        return series, []

    with ProgressReport() as progress:
        return pack(settings, progress, find=find)


if __name__ == "__main__":
    sys.exit(main())
