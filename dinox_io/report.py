"""What packing says about its input: the rows of rejected.jsonl and private/sources.jsonl, the exit code, the summary.

Invariant: each series and each foreign file is told of once, however often it was looked at; the last look counts.
"""

import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dinox_io.discover import FoundFile, FoundSeries
from dinox_io.progress import size_text
from dinox_io.rules import RULES, verdict

Row = dict[str, Any]


def source_rows(found: Sequence[FoundSeries], foreign: Sequence[tuple[str, FoundFile]]) -> list[Row]:
    """Rows for private/sources.jsonl: {series, patient, …, files: [[path, bytes]]}; {code, files} of foreign files."""
    rows: list[Row] = [
        {
            "series": series.series,
            "patient": series.patient,
            "patient_from": series.patient_from,
            "patient_ids": [list(identity) for identity in sorted(series.identities)],
            "study_uid": series.identity.study_uid,
            "series_uid": series.identity.series_uid,
            "files": [[file.path, max(file.size, 0)] for file in series.files],
        }
        for series in found
    ]
    files: dict[str, list[list[Any]]] = {}
    for code, file in foreign:
        files.setdefault(code, []).append([file.path, max(file.size, 0)])
    return rows + [{"code": code, "files": of_code} for code, of_code in files.items()]


def merge_sources(before: Sequence[Row], new: Sequence[Row], packed: Collection[str] = ()) -> list[Row]:
    """private/sources.jsonl: what it was, and new rows, which tell of each of their files for good.

    Args:
        packed: pseudonyms of the series that were in the set before. Whose they are was settled when they were packed:
            their rows get new files, and are else as they were.
    """
    seen = {entry[0] for row in new for entry in row["files"]}
    merged: dict[str, Row] = {}
    for row in before:
        kept = [entry for entry in row["files"] if entry[0] not in seen]
        merged[row.get("series") or row["code"]] = {**row, "files": kept}
    for row in new:
        name = row.get("series") or row["code"]
        old = merged.get(name, {"files": []})
        told = merged[name] if name in packed and name in merged else row
        merged[name] = {**told, "files": old["files"] + row["files"]}
    for row in merged.values():
        row["files"].sort()
    return [row for _, row in sorted(merged.items()) if row["files"] or "series" in row]


def merge_rejected(before: Sequence[Row], new: Sequence[Row], sources: Sequence[Row], seen: set[str]) -> list[Row]:
    """rejected.jsonl: new rows, those of series that were not `seen` this time, and the foreign files of all runs.

    Args:
        sources: private/sources.jsonl as it will be: foreign files are counted there.
    """
    merged = [row for row in before if row["series"] is not None and row["series"] not in seen]
    # Of withdrawn patients there is a count only: a new one takes the place of the one before.
    for rows in (new, before):
        withdrawn = sum(row["files"] for row in rows if row["code"] == "WITHDRAWN")
        if withdrawn:
            merged.append(asdict(verdict("WITHDRAWN", series=None, files=withdrawn)))
            break
    merged += [row for row in new if row["series"] is not None]
    merged += [
        asdict(verdict(row["code"], series=None, files=len(row["files"]))) for row in sources if "series" not in row
    ]
    return sorted(merged, key=lambda row: (row["series"] or "", row["code"], row["reason"]))


def foreign_rows(foreign: Sequence[tuple[str, FoundFile]]) -> list[Row]:
    """Rows of rejected.jsonl for (code, file) of files that belong to no series."""
    counts = Counter(code for code, _ in foreign)
    return [asdict(verdict(code, series=None, files=count)) for code, count in sorted(counts.items())]


def rejected_by_code(rows: Sequence[Row]) -> dict[str, int]:
    """How many series, or foreign files, each code stands for."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["code"]] += 1 if row["series"] is not None else row["files"]
    return dict(sorted(counts.items()))


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """How a pack ended."""

    manifest: Mapping[str, Any] | None
    """Of the set as it is now; None: there is no volume in it, and so no set."""
    new_volumes: int
    series: int
    """Series of the input."""
    in_set: int
    """How many of them are in the set."""
    codes: Sequence[str]
    """Codes that this run gave."""
    rejected: Sequence[Row]
    """rejected.jsonl as it is now."""
    this_run: Sequence[Row] | None = None
    """Those of them that this run found; None: all."""
    other_options: Sequence[str] = ()
    """Options that differ from those that what was in the set before was packed with."""
    part_of: str | None = None
    """The folder that is to unite this part with the others."""
    by_folder: tuple[int, int] = (0, 0)
    """NIfTI files of the whole input that share a patient because they share a folder, and how many patients."""

    @property
    def exit_code(self) -> int:
        """0: every series is in the set or skipped by rule; 3: some rejected; 1: some rejected and none in the set."""
        if not any(RULES[code].kind == "rejected" for code in self.codes):
            return 0
        return 3 if self.in_set else 1

    def lines(self, output: str, *, comparable: bool = True) -> list[str]:
        """The summary for people. It never names the input: its path may hold a patient's name, and logs are passed on.

        Args:
            output: folder of the set. comparable: verify_shards.py can compare it with this input.
        """
        lines = [*self._about_set(output), *self._about_sides(), *self._about_rejected(output)]
        files, patients = self.by_folder
        if files:
            many = f"folders count as {patients} patients" if patients > 1 else "folder count as 1 patient"
            lines.append(f"{files} NIfTI files in {patients} {many} (give --nifti-patient REGEX to say otherwise).")
        if not self.series:
            lines.append(
                "No DICOM series was found in the input." if not self.part_of else "No series is of this part."
            )
        if self.part_of:
            part_of = shlex.quote(self.part_of)
            lines.append(f"Next, when all parts are done: python tools/pack_shards.py --merge --output {part_of}")
        elif self.manifest:
            more = "   # and with its source, voxel by voxel: --against INPUT" if comparable else ""
            lines.append(f"Next: python tools/verify_shards.py {shlex.quote(output)}{more}")
        else:
            lines.append(f"There is no set in {output}: no volume was packed, and no manifest.json written.")
        return lines

    def _about_set(self, output: str) -> list[str]:
        if not self.manifest:
            return []
        counts = self.manifest["counts"]
        holds = (
            f"{_counted(counts['volumes'], 'volume')} of {_counted(counts['patients'], 'patient')}, "
            f"{_counted(counts['slices'], 'slice')}, in {_counted(counts['shards'], 'shard')}."
        )
        if self.new_volumes:
            first = f"Packed {_counted(self.new_volumes, 'new volume')}. The set in {output} now holds {holds}"
        else:
            first = f"Nothing new: the set in {output} holds {holds}"
        raw, packed = counts["raw_bytes"], counts["shard_bytes"]
        lines = [first, f"{size_text(raw)} of HU in {size_text(packed)} of shards: {raw / packed:.2f} times smaller."]
        if self.other_options:
            lines.append(
                f"Other {', '.join(self.other_options)} than before: what is in the set already stays as it was packed."
            )
        return lines

    def _about_sides(self) -> list[str]:
        if not self.manifest:
            return []
        splits, options = self.manifest["splits"], self.manifest["options"]
        sides = ", ".join(
            f"{side} {share['volumes']} ({_counted(share['patients'], 'patient')})"
            for side, share in splits.items()
            if share["volumes"] or side in ("train", "val")
        )
        lines = [f"Sides: {sides}."]
        if splits["none"]["volumes"]:
            lines.append(
                "On no side (none): volumes that are identical under patients of different sides; manifest.json lists "
                "them in leaks."
            )
        if self.part_of:  # the other parts have patients too
            return lines
        if not splits["train"]["volumes"]:
            lines.append(
                "Warning: no patient fell to train: a smaller --val-fraction or another --split-seed in a new set; "
                "the trainer will have nothing to train on."
            )
        if not splits["val"]["volumes"] and options["val_fraction"]:
            lines.append(
                "Warning: no patient fell to val: a larger --val-fraction (such as 0.2) or another --split-seed in a "
                "new set; the trainer will validate on nothing."
            )
        return lines

    def _about_rejected(self, output: str) -> list[str]:
        if not self.rejected:
            return []
        rows = self.rejected if self.this_run is None else self.this_run
        files = {row["code"] for row in self.rejected if row["series"] is None}
        hints = {row["code"]: row["hint"] for row in self.rejected}
        counts, of_all = rejected_by_code(rows), rejected_by_code(self.rejected)
        where = f"which: {output}/rejected.jsonl, whose: {output}/private/sources.jsonl"
        lines = [f"Not packed whole ({where}):"]
        for title, kinds in _GROUPS:
            codes = [code for code in counts if RULES[code].kind in kinds]
            lines += [f" {title}:"] if codes else []
            for code in codes:
                unit = _unit(counts[code], code in files)
                lines.append(f"  {counts[code]:6d} {unit:6s} {code}: {hints.get(code, RULES[code].hint)}")
        earlier = {code: count - counts.get(code, 0) for code, count in of_all.items() if count > counts.get(code, 0)}
        if earlier:
            said = (f"{count} {_unit(count, code in files)} {code}" for code, count in earlier.items())
            lines.append(f" Also from earlier runs: {', '.join(said)}.")
        return lines


_GROUPS = (
    ("Rejected (look at these)", ("rejected",)),
    ("Skipped by rule", ("skipped", "foreign")),
    ("Packed, but not whole", ("note",)),
)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _unit(count: int, files: bool) -> str:
    if not files:
        return "series"
    return "file" if count == 1 else "files"
